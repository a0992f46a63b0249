"HOG: vectors of the release, a reference implementation in loops, invariances."

import math

import numpy as np
import pytest
import torch
from conftest import assert_close

from mimstudy.core.errors import StudyError
from mimstudy.core.task import Batch
from mimstudy.parts.hog import HOG, cell_histograms, gaussian_window, glyphs, gradients, hog, polar

MEAN, STD = (
    torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
    torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
)


def near(a, b, atol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= atol, (a - b).abs().max()


@pytest.fixture(scope='module')
def vectors(golden):
    return golden('hog')


@pytest.fixture(scope='module')
def noise(vectors):
    return vectors['noise64']


def test_gradient_magnitude_and_bin(vectors, noise):
    magnitude, bin_index = polar(*gradients(noise[:1]))
    assert_close(magnitude, vectors['noise64_magnitude'], rel=5e-7)
    assert bin_index.equal(vectors['noise64_bin'].long())


def test_gradients_are_a_convolution_to_the_last_bit(vectors, noise):
    photo = (vectors['photo64_u8'].float() - MEAN) / STD
    weight = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(3, 1, 3, 3)
    for x in (noise, photo):
        around = torch.nn.functional.pad(x, (1, 1, 1, 1), mode='reflect')
        horizontal, vertical = gradients(x)
        assert horizontal.equal(torch.nn.functional.conv2d(around, weight, groups=3))
        assert vertical.equal(torch.nn.functional.conv2d(around, weight.transpose(2, 3), groups=3))


def test_window(vectors):
    assert gaussian_window(16, 16, 8).equal(vectors['gaussian_kernel'])
    near(gaussian_window(12, 20, 8), vectors['gaussian_kernel'].repeat(1, 2)[:12, :20])


@pytest.mark.parametrize('window, name', [(True, ''), (False, '_nogauss')])
def test_noise_cells(vectors, noise, window, name):
    near(hog(noise, window=window), vectors[f'noise64_cells{name}'])


@pytest.mark.parametrize('patch, window, name', [(16, True, 'p16'), (8, True, 'p8'), (16, False, 'nogauss')])
def test_noise_tokens(vectors, noise, patch, window, name):
    near(HOG(patch, cell=8, window=window)(Batch([noise])), vectors[f'noise64_tokens_{name}'])


@pytest.mark.parametrize('size', [64, 224])
def test_photographs(vectors, size):
    "The same order of sums gives the same bins on photographs, so they agree to 1e-6."
    tokens, theirs = (
        HOG(16)(Batch([(vectors[f'photo{size}_u8'].float() - MEAN) / STD])),
        vectors[f'photo{size}_tokens'],
    )
    assert torch.nn.functional.cosine_similarity(tokens, theirs, dim=-1).min() >= 0.99
    assert (tokens - theirs).abs().mean() <= 5e-3
    near(tokens, theirs, 1e-6)


def test_target_of_the_release_model(golden):
    m = golden('semanticmim_maskfeat_k8')
    x = (m['images_u8'].float() - MEAN) / STD
    near(HOG(16)(Batch([x]))[m['mask_index'].flatten(1)].view(2, 118, 108), m['target'], 1e-6)


def loop_hog(x, cell, bins, window):
    "One channel (S,S) -> (bins,S/cell,S/cell), pixel by pixel."
    side, around = len(x), np.pad(x, 1, mode='reflect')
    out = np.zeros((bins, side // cell, side // cell))
    middle = cell - 0.5
    for i in range(side):
        for j in range(side):
            part = around[i : i + 3, j : j + 3]
            gx = (part[:, 0] - part[:, 2]) @ [1, 2, 1]
            gy = (part[0] - part[2]) @ [1, 2, 1]
            weight = (
                math.exp(
                    -0.5 * (((i % (2 * cell) - middle) / cell) ** 2 + ((j % (2 * cell) - middle) / cell) ** 2)
                )
                if window
                else 1.0
            )
            out[math.floor(math.atan2(gx, gy) / math.pi * bins) % bins, i // cell, j // cell] += (
                weight * math.hypot(gx, gy)
            )
    return out / np.linalg.norm(out, axis=0)


@pytest.mark.parametrize(
    'side, cell, bins, window', [(24, 8, 9, True), (24, 8, 9, False), (12, 2, 9, True), (20, 5, 7, True)]
)
def test_reference_in_loops(side, cell, bins, window):
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side + bins))
    expected = np.stack([loop_hog(c.double().numpy(), cell, bins, window) for c in x[0]])
    near(hog(x, cell, bins, window)[0].double(), torch.from_numpy(expected), 1e-5)


def test_a_quarter_turn_turns_the_bins(noise):
    "With 8 bins a quarter turn moves each bin by 4, except at the border of the image."
    straight, turned = hog(noise, bins=8, window=False), hog(noise.rot90(1, (2, 3)), bins=8, window=False)
    near(turned[..., 1:-1, 1:-1], straight.rot90(1, (3, 4)).roll(4, 2)[..., 1:-1, 1:-1], 1e-4)


def test_brightness_and_contrast_have_no_effect(noise):
    near(hog(3 * noise + 5), hog(noise), 1e-3)


def test_histograms_have_length_one_or_zero():
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16:] = torch.randn(1, 3, 32, 16)
    length = hog(x).norm(dim=2)
    assert (length[..., 0] == 0).all() and (length[..., 2:] - 1).abs().max() < 1e-6


def test_any_image_and_half_precision():
    x = torch.randn(2, 3, 24, 40)
    assert hog(x).shape == (2, 3, 9, 3, 5) and hog(x.bfloat16()).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        inside = hog(x)
    assert inside.equal(hog(x))


def test_target_has_no_gradient_and_K_numbers():
    target = HOG(8)
    t = target(Batch([torch.randn(2, 3, 32, 32, requires_grad=True)]))
    assert (
        not t.requires_grad and t.shape == (2, 16, target.K) and target.K == 108 and not target.state_dict()
    )


def test_cells_that_do_not_tile_are_named():
    magnitude, bin_index = polar(*gradients(torch.randn(1, 3, 64, 64)))
    with pytest.raises(StudyError, match='cells of 7 px do not tile an image of 64 x 64'):
        cell_histograms(magnitude, bin_index, 7)
    with pytest.raises(StudyError, match='do not tile a patch of 16'):
        HOG(16, cell=5)


def test_glyphs_stay_images(noise):
    drawn = glyphs(hog(noise), 10)
    assert drawn.shape == (2, 3, 80, 80) and drawn.min() >= 0 and drawn.max() <= 1

"""Measures of representations: closed forms, invariances, slow references, bad input."""

import math

import pytest
import torch
from conftest import assert_close

from mimstudy.analysis.block_outputs import block_outputs, patch_outputs
from mimstudy.analysis.representation_figures import cka_matrix, measures_by_block
from mimstudy.analysis.representations import (
    alignment,
    cka,
    effective_rank,
    fourier_log_amplitude,
    pca_colours,
    separability,
    uniformity,
)
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.views import normalise


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def rotation(n, g):
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q


def test_cka_with_its_own_rotation_is_1(g):
    x = torch.randn(40, 12, generator=g).double() * torch.linspace(0.1, 3, 12)
    assert_close(cka(x, -2.5 * x @ rotation(12, g) + torch.randn(12, generator=g)), 1.0, 1e-9)


def test_cka_agrees_with_sums_over_quadruples(g):
    "The unbiased criterion is a mean over all quadruples of different rows."
    x, y = torch.randn(6, 3, generator=g).double(), torch.randn(6, 2, generator=g).double()

    def criterion(K, L):
        total, count = 0.0, 0
        n = range(6)
        for i in n:
            for j in n:
                for q in n:
                    for r in n:
                        if len({i, j, q, r}) == 4:
                            total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                            count += 1
        return total / count

    K, L = x @ x.T, y @ y.T
    slow = criterion(K, L) / (criterion(K, K) * criterion(L, L)).sqrt()
    assert_close(cka(x, y), slow, 1e-9)


def test_cka_of_unrelated_wide_representations_is_0_on_average(g):
    pairs = [(torch.randn(20, 500, generator=g), torch.randn(20, 500, generator=g)) for _ in range(50)]
    assert abs(sum(cka(x, y).item() for x, y in pairs) / 50) < 0.05


@pytest.mark.parametrize('r', [1, 4, 10])
def test_effective_rank_of_equal_singular_values_is_their_number(g, r):
    left, right = rotation(30, g)[:, :10], rotation(10, g)
    assert_close(effective_rank(left * (torch.arange(10) < r) @ right), float(r), 1e-6)


def test_effective_rank_of_a_geometric_spectrum(g):
    "The entropy of p_i = (1 - a) a^i is (-a log a - (1 - a) log(1 - a)) / (1 - a)."
    a = 0.3
    spectrum = a ** torch.arange(25.0, dtype=torch.float64)
    entropy = (-a * math.log(a) - (1 - a) * math.log(1 - a)) / (1 - a)
    assert_close(effective_rank(rotation(25, g) * spectrum), math.exp(entropy), 1e-6)
    assert effective_rank(torch.zeros(5, 3)) == 0


def test_alignment_and_uniformity_of_known_points(g):
    circle = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 0], [0, -4.0]])  # the length does not matter
    assert_close(uniformity(circle), math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6), 1e-6)
    assert_close(alignment(circle, circle.roll(1, 0)), 2.0, 1e-6)
    assert alignment(circle, 7 * circle) < 1e-12
    assert uniformity(circle[:1].expand(5, 2)).abs() < 1e-12
    turned = circle.double() @ rotation(2, g)
    assert_close(uniformity(turned), uniformity(circle), 1e-6)


def test_separability(g):
    labels = torch.arange(300) % 3
    means = torch.tensor([-1.0, 0, 1])
    assert_close(separability(means[labels][:, None], labels), 1.0, 1e-9)
    noise = torch.randn(300, 50, generator=g)
    assert separability(noise, labels).abs() < 0.01
    within = torch.tensor([-1.0, 1])[torch.arange(300) // 3 % 2]
    x = (means[labels] + within)[:, None]  # the variance within is 1, that of the means is 2/3
    expected = 1 - (300 / 297) / (300 * (1 + 2 / 3) / 299)
    assert_close(separability(x, labels), expected, 1e-6)
    assert_close(separability(noise.double() @ rotation(50, g), labels), separability(noise, labels), 1e-4)


def test_a_wave_has_the_amplitude_of_its_frequency():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    wave = 1 + 0.5 * torch.cos(2 * math.pi * 2 * (rows + columns) / 8)
    measured = fourier_log_amplitude(wave.reshape(1, 64, 1))
    assert_close(measured[2], math.log(0.25), 1e-5)
    assert measured[[1, 3, 4]].max() < -10
    checkerboard = 1 + 0.5 * (-1.0) ** (rows + columns)
    assert_close(fourier_log_amplitude(checkerboard.reshape(1, 64, 1))[4], math.log(0.5), 1e-5)


def test_colours_do_not_depend_on_scale_or_order(g):
    features = torch.randn(3, 16, 10, generator=g) * torch.linspace(3, 0.1, 10)
    colours = pca_colours(features, (4, 4))
    assert colours.shape == (3, 3, 4, 4) and colours.min() == 0 and colours.max() == 1
    assert_close(pca_colours(5 * features + 1, (4, 4)), colours, 1e-3)
    assert_close(pca_colours(features.flip(0), (4, 4)), colours.flip(0), 1e-3)


def test_outputs_of_blocks_are_those_of_the_encoder():
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=4, prefix=3).eval()
    images = scenes(140, 32).images  # more than are encoded together
    prefix, patches = block_outputs(encoder, images)
    assert prefix.shape == (2, 140, 3, 32) and patches.shape == (2, 140, 16, 32)
    with torch.no_grad():
        slow = encoder.forward_features(normalise(images.float() / 255))
        tokens = torch.cat([prefix[1], patches[1]], 1)
        assert_close(encoder.norm(tokens), slow, 1e-4)
    assert torch.equal(patch_outputs(encoder, images, 0), patches[0])


def test_blocks_are_measured_and_compared():
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=16, depth=2, heads=4).eval()
    world = scenes(24, 32)
    frame = measures_by_block(encoder, world.images, world.maps)
    assert list(frame.index) == [0, 1] and frame.notna().all(axis=None)
    matrix = cka_matrix({'a': encoder, 'b': encoder}, world.images)
    assert matrix.loc[('a', 1), ('b', 1)] == pytest.approx(1)
    assert matrix.loc[('a', 0), ('b', 1)] == pytest.approx(matrix.loc[('a', 1), ('b', 0)])


def test_bad_input_is_one_line(g):
    x = torch.randn(20, 30, generator=g)
    encoder = Encoder(size=32, patch=8, width=16, depth=2, heads=4).eval()
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for call, message in (
        (lambda: cka(x[:3], x[:3]), 'CKA needs at least 4 images, not 3'),
        (lambda: cka(x, x[:10]), 'not of 20 and 10'),
        (lambda: effective_rank(x), 'needs at least 30 images, not 20'),
        (lambda: uniformity(x[:1]), 'needs at least 2 images, not 1'),
        (lambda: alignment(x, x[:5]), 'two views of the same images'),
        (lambda: separability(x, torch.zeros(20)), 'needs at least 2 classes, not 1'),
        (lambda: separability(x[:2], torch.arange(2)), 'of 2 classes needs at least 3 rows, not 2'),
        (lambda: fourier_log_amplitude(torch.zeros(1, 12, 4)), 'square grids, not on 12 patches'),
        (lambda: pca_colours(torch.zeros(1, 16, 2), (4, 4)), 'needs at least 3'),
        (
            lambda: patch_outputs(encoder, images, 2),
            'no block 2: the encoder has 2 blocks, counted from 0 to 1',
        ),
        (lambda: patch_outputs(encoder, images, -3), 'no block -3'),
        (lambda: block_outputs(encoder, images[..., :6, :6]), '6 x 6 px are smaller than one patch of 8 px'),
    ):
        with pytest.raises(StudyError, match=message):
            call()

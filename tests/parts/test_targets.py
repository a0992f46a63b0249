"Targets: vectors of MAE's release, loops, and which view each target is computed from."

import pytest
import torch
from conftest import assert_close

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.parts.ema import EMATeacher
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.targets import Codes, Pixels, TeacherFeatures, patchify, unpatchify
from mimstudy.parts.tokenizers import DallE, KMeansCodes
from mimstudy.parts.views import normalise


@pytest.fixture(scope='module')
def mae(golden):
    return golden('mae')


def test_patches_are_maes(mae):
    rows = patchify(mae['images'].float(), 8)
    assert rows[:1, :4].equal(mae['patches']) and unpatchify(rows, 8).equal(mae['images'].float())


@pytest.mark.parametrize('norm', [False, True])
def test_losses_are_maes(mae, norm):
    target, hidden = Pixels(8, norm)(Batch([mae['images'].float()])), mae['mask']
    for pred, name in (
        (mae['pred'], f'loss.norm_pix_{norm}'),
        (mae['lossonly.pred'], f'lossonly.loss.norm_pix_{norm}'),
    ):
        assert_close(((pred - target).square().mean(-1) * hidden).sum() / hidden.sum(), mae[name])


def test_patchify_by_loops():
    x = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    rows = patchify(x, 4)
    for n in range(15):
        for k in range(48):
            row, column, colour = k // 12, k // 3 % 4, k % 3
            assert rows[1, n, k] == x[1, colour, n // 5 * 4 + row, n % 5 * 4 + column]


def test_wrong_patch_size():
    with pytest.raises(StudyError, match='patches of 5 px do not tile an image of 12 x 12'):
        Pixels(5)(Batch([torch.zeros(1, 3, 12, 12)]))


def test_a_flat_patch_is_zero_and_not_nan():
    assert Pixels(4, norm=True)(Batch([torch.full((1, 3, 8, 8), 0.3)])).abs().max() < 1e-3


@pytest.fixture(scope='module')
def images():
    return scenes(8, size=64, seed=71).images


@pytest.fixture(scope='module')
def tokenizer(images):
    return KMeansCodes(16, 8).fit(images, torch.Generator().manual_seed(0), rounds=3)


def test_codes_of_the_unchanged_image(images, tokenizer):
    ids = Codes(tokenizer, 8)(Batch([normalise(images / 255), torch.zeros(8, 3, 64, 64)]))
    assert ids.equal(tokenizer.codes(images / 255).flatten(1))  # a second view has no effect


class Recorder(torch.nn.Module):
    "A tokenizer that stores its input."

    vocabulary, stride = 2, 8

    def codes(self, x):
        self.input = x
        return x.new_zeros(len(x), x.shape[2] // 8, x.shape[3] // 8, dtype=torch.long)


@pytest.mark.parametrize('size, patch, shown', [(224, 16, 112), (64, 8, 64), (64, 16, 32), (64, 4, 128)])
def test_the_grid_of_codes_is_the_grid_of_patches(size, patch, shown):
    recorder = Recorder()
    target = Codes(recorder, patch)
    ids = target(Batch([3 * torch.randn(2, 3, size, size)]))
    assert recorder.input.shape == (2, 3, shown, shown) and ids.shape == (2, (size // patch) ** 2)
    assert recorder.input.min() == 0 and recorder.input.max() == 1


def test_resizing_is_antialiased():
    "A fine grid of black and white becomes grey when it is resized."
    recorder, grid = Recorder(), torch.ones(1, 3, 64, 64) * (torch.arange(64) % 2)
    Codes(recorder, 32)(Batch([normalise(grid)]))
    assert (recorder.input - 0.5).abs()[..., 2:-2].max() < 0.05


def test_dalle_parity_through_the_target(golden):
    v = golden('dvae')
    tokenizer = DallE(8, 32)
    tokenizer.load_state_dict(
        {k: v['encoder.' + k.replace('.weight', '.w').replace('.bias', '.b')] for k in tokenizer.state_dict()}
    )
    ids = Codes(tokenizer, 8)(Batch([normalise(v['images_u8'].float() / 255)]))
    assert (ids == v['tokens'].flatten(1)).float().mean() > 0.99


def test_targets_have_no_gradient_and_K_numbers(tokenizer, images):
    batch = Batch([normalise(images / 255).requires_grad_()])
    for target in (Pixels(8), Pixels(8, norm=True)):
        assert not target(batch).requires_grad and target(batch).shape == (8, 64, target.K)
    codes = Codes(DallE(4, 32), 8)
    assert (
        codes.K == 32
        and not any(p.requires_grad for p in codes.parameters())
        and 'tokenizer.blocks.input.weight' in codes.state_dict()
    )


def test_teacher_features_are_those_of_the_last_view(images):
    torch.manual_seed(0)
    encoder = Encoder(size=64, patch=16, width=32, depth=2, heads=2)
    head = torch.nn.Linear(32, 8)
    target = TeacherFeatures(EMATeacher({'encoder': encoder, 'head': head}))
    weak, strong = normalise(images / 255), normalise(images.flip(1) / 255)
    keys = target(Batch([weak, strong]))
    assert keys.equal(target(Batch([strong]))) and not keys.equal(target(Batch([weak])))
    assert_close(keys, head(encoder.forward_features(strong))[:, 1:].detach())
    assert not keys.requires_grad

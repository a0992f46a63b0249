"RandAugment and random erasing: compared with timm's functions on Pillow images; seeds, independence."

import random

import numpy as np
import pytest
import torch
from conftest import assert_close
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data.random_erasing import RandomErasing

from mimstudy.core.scenes import scenes
from mimstudy.parts.rand_augment import (
    RAND_AUGMENT_OPERATIONS,
    draw_operations,
    erase,
    erase_boxes,
    rand_augment,
)

TIMM_NAMES = dict(zip(RAND_AUGMENT_OPERATIONS, timm_augment._RAND_INCREASING_TRANSFORMS, strict=True))
MOVES = 'rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'
SIGNED = *MOVES, 'color', 'contrast', 'brightness', 'sharpness'
EXACT = 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add', 'brightness', 'sharpness'
RANGES = (0.02, 1 / 3), (0.3, 1 / 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def images():
    x = scenes(8, size=48, seed=7).images
    x[6], x[7] = (
        x[6] // 3 + 60,
        torch.randint(0, 256, x[7].shape, generator=seeded()),
    )  # one of low contrast, one noise
    x[0, 1] = 77  # a colour channel with only one value
    return x


@pytest.fixture(scope='module')
def x(images):
    return images.float() / 255


def timms_argument(name, level, sign, monkeypatch):
    "The argument that timm computes from a level 0 … 1 and a sign."
    monkeypatch.setattr(random, 'random', lambda: 1.0 if sign < 0 else 0.0)
    of = timm_augment.LEVEL_TO_ARG[TIMM_NAMES[name]]
    return of(10 * level, {}) if of else ()


def timms(name, images, arguments):
    "timm's operation, applied to one Pillow image after the other."
    for image, argument in zip(images, arguments):
        if (name, *argument) == (
            'posterize',
            0,
        ):  # older versions of Pillow returned black, newer ones refuse
            yield torch.zeros(image.shape)
            continue
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        done = timm_augment.NAME_TO_OP[TIMM_NAMES[name]](
            image, *argument, resample=Image.Resampling.BILINEAR, fillcolor=(124, 116, 104)
        )
        yield torch.from_numpy(np.array(done)).permute(2, 0, 1).float()


@pytest.mark.parametrize('name', RAND_AUGMENT_OPERATIONS)
def test_operations_are_timms(images, name, monkeypatch):
    for levels in (
        torch.linspace(0.06, 0.97, 8),
        torch.tensor([0.88, -0.88, 1.0, -1.0, 0.8125, -0.84375, 0.5, -0.25]),
    ):
        result = RAND_AUGMENT_OPERATIONS[name].change(
            images.float(), RAND_AUGMENT_OPERATIONS[name].argument(levels)
        )
        arguments = [
            timms_argument(name, abs(level), level, monkeypatch) for level in levels.double().tolist()
        ]
        difference = (result - torch.stack(list(timms(name, images, arguments)))).abs()
        if name in EXACT:
            assert difference.max() == 0
        elif name in MOVES:
            assert difference.mean() < 0.1 and (difference > 1).float().mean() < 1e-3, (
                'on an edge rounding may choose either pixel'
            )
        else:
            assert difference.max() <= 1 and difference.mean() < 0.1


@pytest.mark.parametrize('name', RAND_AUGMENT_OPERATIONS)
def test_arguments_are_timms(name, monkeypatch):
    for level in draw_operations(50, seeded(), 5.0, 4.0)[1].flatten():
        argument_of_timm = timms_argument(name, level.abs().double().item(), level, monkeypatch)
        if argument_of_timm:
            assert (
                abs(RAND_AUGMENT_OPERATIONS[name].argument(level[None]).item() - argument_of_timm[0]) < 1e-5
            )
        if argument_of_timm and name in SIGNED:
            assert (argument_of_timm[0] > (name not in MOVES)) == (level > 0)


def test_draws_are_distributed_as_timms():
    which, level = draw_operations(30_000, seeded())
    assert which.shape == level.shape == (2, 30_000)
    for layer in which:
        assert abs((layer < 0).float().mean() - 0.5) < 0.01
    often = torch.bincount(which[which >= 0], minlength=15)
    assert len(often) == 15 and (often / often.sum() - 1 / 15).abs().max() < 0.006
    assert abs((which[0] == which[1])[(which >= 0).all(0)].float().mean() - 1 / 15) < 0.01, (
        'drawn with replacement'
    )
    random.seed(0)
    expected = torch.tensor([max(0.0, min(random.gauss(9.0, 0.5), 10.0)) for _ in range(30_000)]) / 10
    assert_close(level.abs().mean(), expected.mean(), 2e-3)
    assert_close(level.abs().std(), expected.std(), 0.03)
    assert level.abs().max() == 1 and abs((level > 0).float().mean() - 0.5) < 0.01


def test_seeds(x):
    assert torch.equal(rand_augment(x, seeded(3)), rand_augment(x, seeded(3))) and torch.equal(
        erase(x, seeded(3), 0.5), erase(x, seeded(3), 0.5)
    )
    assert not torch.equal(rand_augment(x, seeded(3)), rand_augment(x, seeded(4))) and not torch.equal(
        erase(x, seeded(3), 1.0), erase(x, seeded(4), 1.0)
    )


@pytest.mark.parametrize('seed', range(4))
def test_images_of_a_batch_do_not_affect_each_other(x, seed):
    other = torch.rand(x.shape, generator=seeded(9))
    other[3] = x[3]
    for change in (
        lambda x: rand_augment(x, seeded(seed), probability=0.9, layers=3),
        lambda x: erase(x, seeded(seed), 0.7),
    ):
        assert torch.equal(change(x)[3], change(other)[3])


def test_probability_zero_changes_nothing(x):
    before = x.clone()
    assert torch.equal(rand_augment(x, seeded(), probability=0.0), x) and torch.equal(
        erase(x, seeded(), 0.0), x
    )
    rand_augment(x, seeded(), probability=1.0), erase(x, seeded(), 1.0)
    assert torch.equal(x, before), 'the given images are not changed in place'


def test_unchanged_images_are_equal_bit_for_bit_and_values_stay_in_their_range(x):
    many = (x * 0.999 + 0.0005).repeat(20, 1, 1, 1)
    done, (which, _) = rand_augment(many, seeded(1)), draw_operations(160, seeded(1))
    skipped = (which < 0).all(0)
    assert 20 < skipped.sum() < 60 and torch.equal(done[skipped], many[skipped])
    assert done.min() >= 0 and done.max() <= 1 and (done[~skipped] != many[~skipped]).flatten(1).any(1).all()


def test_one_image(x):
    for seed in range(20):
        assert (
            rand_augment(x[:1], seeded(seed)).shape == erase(x[:1], seeded(seed), 0.5).shape == (1, 3, 48, 48)
        )


@pytest.mark.parametrize('ranges', [RANGES, ((0.3, 0.9), (0.2, 5.0))])
def test_boxes_are_distributed_as_timms(ranges):
    random.seed(0)
    timms, side = RandomErasing(1.0, *ranges[0], *ranges[1], device='cpu'), 24
    expected = torch.stack([timms(torch.ones(1, side, side))[0] == 0 for _ in range(4000)])
    high, wide = expected.any(2), expected.any(1)
    expected = torch.stack([high.int().argmax(1), wide.int().argmax(1), high.sum(1), wide.sum(1)], 1)
    for result, wanted in zip(erase_boxes(4000, side, *ranges, seeded()).T, expected.T):
        grid = torch.arange(side + 1)
        difference = (
            torch.searchsorted(result.sort().values, grid, right=True)
            - torch.searchsorted(wanted.sort().values, grid, right=True)
        ).abs().max() / 4000
        assert difference < 0.044, 'Kolmogorov-Smirnov distance beyond the 0.1 % level'


def test_erasing_is_a_box_of_noise_and_nothing_else():
    x = torch.full((600, 3, 40, 40), 7.0)
    done = erase(x, seeded())
    lost = (done != x).any(1)
    some = lost.flatten(1).any(1)
    assert abs(some.float().mean() - 0.25) < 0.05
    share = lost[some].float().mean((1, 2))
    assert 0.015 < share.min() < 0.04 and 0.28 < share.max() < 0.35
    assert torch.equal(lost, lost.any(1, keepdim=True) & lost.any(2, keepdim=True)), 'rows by columns'
    noise = done.movedim(1, -1)[lost]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.equal(done.movedim(1, -1)[~lost], x.movedim(1, -1)[~lost])

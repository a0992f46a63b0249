"Schedules: the values of both releases to 1e-12, and properties of the closed form."

import numpy as np
import pytest
import torch

from mimstudy.engine.config import OptimConfig
from mimstudy.engine.schedules import cosine, cosine_at, decay_at, layer_scales, learning_rate


@pytest.fixture(scope='module')
def curves(golden):
    return {name: values.numpy() for name, values in golden('schedules').items()}


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    'name, ours',
    [
        ('conmim.momentum_e5_n7', dict(base=0.996, end=1.0, steps=35)),
        ('conmim.lr_e5_n7_warm2', dict(base=5e-4, end=1e-5, steps=35, warmup=14)),
        ('conmim.lr_e5_n7_warmsteps3', dict(base=5e-4, end=1e-5, steps=35, warmup=3)),
        ('conmim.wd_e5_n7_end0.2', dict(base=0.05, end=0.2, steps=35)),
        ('semanticmim.beit_lr_e6_n5_warm2', dict(base=1.5e-3, end=1e-5, steps=30, warmup=10, start=1e-4)),
        ('semanticmim.maskfeat_lr_e6_n5_warm2', dict(base=1.6e-3, end=1e-6, steps=30, warmup=10, start=1e-6)),
        ('semanticmim.lp_lr_e4_n5', dict(base=4e-3, end=0.0, steps=20)),
    ],
)
def test_whole_curves(curves, name, ours):
    assert_close(cosine(**ours), curves[name])


@pytest.mark.parametrize(
    'name, index, ours',
    [
        ('conmim.lr_full_800', 'full_index_800', dict(base=5e-4, end=1e-5, steps=800 * 625, warmup=10 * 625)),
        ('conmim.momentum_full_800', 'full_index_800', dict(base=0.996, end=1.0, steps=800 * 625)),
        (
            'semanticmim.beit_lr_full_300',
            'full_index_300',
            dict(base=1.5e-3, end=1e-5, steps=300 * 625, warmup=10 * 625, start=1e-4),
        ),
        (
            'semanticmim.maskfeat_lr_full_300',
            'full_index_300',
            dict(base=1.6e-3, end=1e-6, steps=300 * 625, warmup=30 * 625, start=1e-6),
        ),
    ],
)
def test_paper_length(curves, name, index, ours):
    assert_close(cosine_at(curves[index], **ours), curves[name])


@pytest.mark.parametrize(
    'name, decay', [('finetune.layer_scale.vit_b_0.65', 0.65), ('finetune.layer_scale.vit_s_0.8', 0.8)]
)
def test_layer_scales(curves, name, decay):
    assert_close(layer_scales(12, decay), curves[name])


@pytest.mark.parametrize(
    'change, name, index',
    [
        (
            dict(epochs=800, lr=5e-4, min_lr=1e-5, warmup=10, warmup_start=0.0),
            'conmim.lr_full_800',
            'full_index_800',
        ),
        (
            dict(epochs=300, lr=1.5e-3, min_lr=1e-5, warmup=10, warmup_start=1e-4),
            'semanticmim.beit_lr_full_300',
            'full_index_300',
        ),
        (
            dict(epochs=300, lr=1.6e-3, min_lr=1e-6, warmup=30, warmup_start=1e-6),
            'semanticmim.maskfeat_lr_full_300',
            'full_index_300',
        ),
    ],
)
def test_learning_rate(curves, change, name, index):
    optim = OptimConfig(**change)
    assert_close([learning_rate(optim, int(step), 625) for step in curves[index]], curves[name])


def test_weight_decay(golden):
    optim = OptimConfig(epochs=4, weight_decay=0.04, weight_decay_end=0.4, warmup=1)
    assert_close([decay_at(optim, step, 3) for step in range(12)], golden('dino')['wd_e4_n3'].numpy())
    assert {decay_at(optim.but(weight_decay_end=None), step, 3) for step in range(12)} == {0.04}


def test_linear_schedule():
    optim = OptimConfig(epochs=4, lr=1.0, min_lr=0.2, warmup=1, schedule='linear')
    rates = [learning_rate(optim, step, 5) for step in range(20)]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and rates[5] == 1.0
    assert_close(np.diff(rates[5:]), np.full(14, -0.8 / 15))


def test_steps_divide_by_ten():
    optim = OptimConfig(epochs=6, lr=1.0, min_lr=0.0, warmup=0, schedule='steps', step_epochs=2.0)
    assert_close(
        [learning_rate(optim, step, 3) for step in (0, 5, 6, 11, 12, 17)], [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_one_step_equals_the_array():
    curve = cosine(1e-3, 1e-6, 50, warmup=7, start=0.1)
    assert [float(cosine_at(step, 1e-3, 1e-6, 50, 7, 0.1)) for step in range(50)] == curve.tolist()


@pytest.mark.parametrize('warmup, first', [(0, 1.0), (1, 0.25), (2, 0.25)])
def test_short_warmups(warmup, first):
    curve = cosine(1.0, 0.0, 10, warmup, start=0.25)
    assert (
        curve[0] == first and curve[warmup] == 1.0 and curve.dtype == np.float64 and np.isfinite(curve).all()
    )


def test_progress_is_step_over_steps(curves):
    "A function of progress with progress = step/steps is the per-step momentum of the release."
    progress = torch.arange(35, dtype=torch.float64) / 35
    momentum = 1 - (1 - 0.996) * (1 + torch.cos(torch.pi * progress)) / 2
    assert_close(momentum.numpy(), curves['conmim.momentum_e5_n7'])

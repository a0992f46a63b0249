"""What every method must hold: run over the catalogue with the published configurations at smoke scale.

A new method is tested as soon as it has its line in the catalogue and its configuration."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.conditions import warn_about_parts
from mimstudy.methods.catalogue import METHODS, MIM_METHODS
from mimstudy.papers.pretraining import PRETRAININGS, with_absolute_positions, with_proxies
from mimstudy.papers.scales import at_scale
from mimstudy.parts.ema import EMATeacher
from mimstudy.study.build import build_batch_function, build_mask, build_task, evaluated_encoder

IMAGES = scenes(32, size=32, seed=0)
DATASET = InMemoryDataset(IMAGES.images, IMAGES.label, ['any'] * 12)
BASELINES = {f'semanticmim({name})': name for name in MIM_METHODS}  # of those with proxies


def published_config(name):
    """The first published configuration of a method; with proxies, otherwise that of its baseline with
    proxies."""
    for config in PRETRAININGS.values():
        if config.method == name:
            return config
    assert name in BASELINES, f'{name} has no configuration in papers.pretraining'
    return with_proxies(with_absolute_positions(published_config(BASELINES[name])), 'no source')


def config_of(name):
    return at_scale(published_config(name), 'smoke')


def build(name, batch=8, seed=0):
    "A task and a batch of it."
    config = config_of(name)
    task = build_task(config, DATASET, seed)
    make_batch = build_batch_function(config)
    generator = torch.Generator().manual_seed(seed)
    return task, make_batch(IMAGES.images[:batch], IMAGES.label[:batch], generator)


def teacher_of(task):
    "The EMA teacher of a task, or None."
    return next((module for module in task.modules() if isinstance(module, EMATeacher)), None)


@pytest.fixture(params=list(METHODS))
def name(request):
    return request.param


def test_loss_is_finite_and_gradients_reach_the_encoder(name):
    task, batch = build(name)
    loss = task(batch, 0.5)['loss']
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    for p in task.encoder.blocks.parameters():
        assert p.grad is not None and p.grad.isfinite().all()
    for p in task.parameters():
        assert p.requires_grad or p.grad is None


def test_same_seed_same_loss(name):
    def loss(seed):
        task, batch = build(name, seed=seed)
        return task(batch, 0.3)['loss'].item()

    assert loss(0) == loss(0)
    assert loss(1) != loss(0)


def test_a_hidden_pixel_cannot_reach_the_prediction(name):
    task, batch = build(name)
    if batch.mask is None or not hasattr(task, 'predict'):
        pytest.skip(f'{name} has no masks, or no predict(batch)')
    task.eval()
    x, patch, grid = batch.views[0], task.encoder.patch, task.encoder.grid
    hidden = batch.mask.hidden.reshape(-1, 1, *grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    noise = torch.randn_like(x)

    def predict(view):
        return task.predict(batch._replace(views=[view, *batch.views[1:]]))

    with torch.no_grad():
        unchanged = task.predict(batch)
        assert predict(torch.where(hidden, noise, x)).equal(unchanged)
        assert not predict(torch.where(hidden, x, noise)).equal(unchanged)


@pytest.mark.parametrize('proxied', BASELINES)
def test_pixels_reach_mask_tokens_through_the_proxies_only(proxied):
    "With constant proxies, the mask tokens do not depend on the image."
    task, batch = build(proxied)
    pathway = task.pathway.eval()
    constant = torch.randn(len(batch.views[0]), pathway.encoder.P, pathway.width)

    def replace_proxies(module, args, out):
        return torch.cat([constant, out[:, constant.shape[1] :]], 1)

    for block in pathway.encoder.blocks:
        block.register_forward_hook(replace_proxies)
    with torch.no_grad():
        outputs = [pathway(x, batch.mask) for x in (batch.views[0], torch.randn_like(batch.views[0]))]
    assert outputs[0].equal(outputs[1])


def test_the_teacher_moves_towards_the_student(name):
    "All its parameters by the same share 1 − α, and α is not below its value at the start."
    task, _ = build(name)
    teacher = teacher_of(task)
    if teacher is None:
        pytest.skip(f'{name} has no EMA teacher')
    with torch.no_grad():
        for p in task.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    old = [p.clone() for p in teacher.parameters()]
    students = [p.detach().clone() for student in teacher.students for p in student.parameters()]
    task.after_step(0.5)
    new = list(teacher.parameters())

    def flat(parameters):
        return torch.cat([p.flatten() for p in parameters]).double()

    distance = flat(students) - flat(old)
    share = float((flat(new) - flat(old)) @ distance / distance.square().sum())  # 1 − α
    assert 0 < share <= (1 - teacher.momentum) * (1 + 1e-4)
    for before, student, after in zip(old, students, new, strict=True):
        torch.testing.assert_close(after, before + share * (student - before), rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip(name):
    task, batch = build(name)
    other, _ = build(name, seed=5)
    other.load_state_dict(copy.deepcopy(task.state_dict()))
    losses = []
    for one in (task, other):
        torch.manual_seed(0)  # sampled codes draw from it
        losses.append(one.eval()(batch, 0.5)['loss'])
    assert losses[0].equal(losses[1])


def test_bfloat16_runs_with_losses_in_float32(name):
    task, batch = build(name)
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(batch, 0.0)['loss']
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert {p.dtype for p in task.parameters()} == {torch.float32}


def test_a_batch_of_one_image_works_or_is_refused_in_one_line(name):
    task, batch = build(name, batch=1)
    try:
        assert task(batch, 0.0)['loss'].isfinite()
    except StudyError as e:
        assert 'batch' in str(e) and '\n' not in str(e)


def test_evaluated_encoder(name):
    task, _ = build(name)
    config = config_of(name)
    assert evaluated_encoder(config.but(eval_model='student'), task) is task.encoder
    if teacher_of(task) is None:
        with pytest.raises(StudyError, match='no EMA teacher'):
            evaluated_encoder(config.but(eval_model='teacher'), task)
        return
    teacher = evaluated_encoder(config.but(eval_model='teacher'), task)
    assert teacher is not task.encoder and teacher.config == task.encoder.config
    assert not any(p.requires_grad for p in teacher.parameters())


def test_masks_reach_every_patch(name):
    "No patch is nearly always visible or nearly always hidden, so every position embedding is trained."
    config = config_of(name)
    if config.mask is None:
        pytest.skip(f'{name} has no masks')
    hidden = build_mask(config, 200, torch.Generator().manual_seed(0)).hidden.float().mean(0)
    for share in (hidden, 1 - hidden):  # of 200 masks in which a patch is hidden, and visible
        assert share.min() > share.mean() / 3


def test_the_loss_of_a_constant_prediction(name):
    "A prediction that ignores the image cannot be better than it, on the batch for which it was computed."
    task, batch = build(name, batch=16)
    constant = task.eval().constant_loss(batch)
    if batch.mask is None or name == 'ibot':
        assert constant is None
        return
    assert constant.isfinite() and constant > 0
    if hasattr(task, 'criterion'):
        b, m = batch.mask.predict.shape
        target = task.target(batch)
        k = task.target.K if target.ndim == 2 else target.shape[-1]
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            other = torch.randn(k, generator=generator).expand(b, m, k)
            assert task.criterion(other, target, batch.mask) > constant


def gradient_of_slices(name, slices):
    "The gradient of a batch of 8 images, summed over slices; masks, views and layers without randomness."
    config = config_of(name).but(encoder=dict(drop_path=0.0))
    task = build_task(config, DATASET, 0)
    whole = build_batch_function(config)(
        IMAGES.images[:8], IMAGES.label[:8], torch.Generator().manual_seed(0)
    )
    for part in torch.arange(8).chunk(slices):
        mask = whole.mask
        if mask is not None and len(mask.hidden) == 8:
            mask = type(mask)(*[field[part] if torch.is_tensor(field) else field for field in mask])
        batch = whole._replace(views=[view[part] for view in whole.views], mask=mask, label=whole.label[part])
        (task(batch, 0.5)['loss'] / slices).backward()
    return torch.cat([p.grad.flatten() for p in task.encoder.parameters() if p.grad is not None])


def test_slices_add_up_or_the_method_says_that_they_do_not(name):
    "Where `warn_about_parts` is silent, the gradient of two slices is that of the whole batch."
    task, _ = build(name)
    config = config_of(name)
    if config.mask and config.mask.kind == 'ibot' or name in ('deit', 'cim'):
        pytest.skip('draws masks of two views, mixes images, or samples codes')
    accelerator = SimpleNamespace(gradient_accumulation_steps=2, num_processes=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        warn_about_parts(task, config, accelerator)
    whole, halves = gradient_of_slices(name, 1), gradient_of_slices(name, 2)
    difference = (whole - halves).norm() / whole.norm()
    assert (difference > 0.01) if caught else (difference < 1e-4), difference

"What every method of the catalogue must hold, whatever it is: run over METHODS, so a new line is tested the moment it is there."

import copy

import pytest
import torch
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine.config import Recipe
from mimstudy.methods.catalogue import METHODS, MIM_METHODS
from mimstudy.study.build import build_batch_function, build_mask, build_task, evaluated_encoder
from mimstudy.engine.datasets import InMemoryDataset

IMAGES = scenes(32, size=32, seed=0)
SET = InMemoryDataset(IMAGES.images, IMAGES.label, ['any'] * 12)
BLIND = [*(m.__name__ for m in MIM_METHODS), *(f'semanticmim({m.__name__})' for m in MIM_METHODS)]
OPTIONS = {
    'mocov3': dict(hidden=32, out=16),
    'dino': dict(out=24, hidden=32, bottleneck=8, frozen=0),
    'ibot': dict(out=24, hidden=32, bottleneck=8, frozen=0),
}
FEEDS = {
    'mocov3': dict(views='two'),
    'dino': dict(views='multicrop', locals=2, local_size=16),
    'ibot': dict(views='multicrop', locals=2, local_size=16, mask='chance'),
}


def read_config(name):
    contrast = 'conmim' in name
    small = dict(hidden=32, out=16) if contrast else OPTIONS.get(name, {})
    make_batch = dict(views='weak,strong') if contrast else FEEDS.get(name, {})
    return Recipe(
        name='contract',
        method=name,
        options=small,
        tokenizer='kmeans',
        size=32,
        patch=8,
        width=32,
        depth=2,
        heads=2,
        prefix=8 if name.startswith('semanticmim') else 1,
        codes=16,
        ratio=0.6,
        batch=8,
        **make_batch,
    )


def made(name, batch=8, seed=0):
    recipe = read_config(name)
    task = build_task(recipe, SET, seed)
    return task, build_batch_function(recipe)(
        IMAGES.images[:batch], IMAGES.label[:batch], torch.Generator().manual_seed(seed)
    )


@pytest.fixture(params=list(METHODS))
def name(request):
    return request.param


def test_loss_is_finite_and_gradients_reach_the_encoder_only(name):
    task, batch = made(name)
    loss = task(batch, 0.0)['loss']
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.encoder.blocks.parameters())
    frozen = [p for p in task.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    if hasattr(task, 'target'):
        assert not any(p.requires_grad for p in task.target.parameters())


def test_same_seed_same_loss(name):
    losses = [made(name)[0](made(name)[1], 0.3)['loss'].item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert made(name, seed=1)[0](made(name, seed=1)[1], 0.3)['loss'].item() != losses[0]


@pytest.mark.parametrize('blind', BLIND)
def test_a_hidden_pixel_cannot_reach_the_prediction(blind):
    task, batch = made(blind)
    task.eval()
    x, mask = batch.views[0], batch.mask
    holes = mask.hidden.reshape(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn_like(x)
    with torch.no_grad():
        plain = task.predict(batch)
        assert task.predict(batch._replace(views=[torch.where(holes, noise, x), *batch.views[1:]])).equal(
            plain
        )
        assert not task.predict(batch._replace(views=[torch.where(holes, x, noise), *batch.views[1:]])).equal(
            plain
        )


@pytest.mark.parametrize('blind', [n for n in BLIND if n.startswith('semanticmim')])
def test_proxies_are_the_only_road(blind):
    "With the proxies held still, no pixel, visible or not, moves a mask token."
    task, batch = made(blind)
    pathway = task.pathway.eval()
    still = torch.randn(len(batch.views[0]), pathway.encoder.P, pathway.width)
    for block in pathway.encoder.blocks:
        block.register_forward_hook(lambda m, args, out: torch.cat([still, out[:, still.shape[1] :]], 1))
    with torch.no_grad():
        a, b = (pathway(x, batch.mask) for x in (batch.views[0], torch.randn_like(batch.views[0])))
    assert a.equal(b)


def test_teacher_moves_by_one_minus_alpha(name):
    task, batch = made(name)
    teacher_names = [
        n
        for n, p in task.named_parameters()
        if not p.requires_grad and n.startswith(('target.', 'teacher.'))
    ]
    if not teacher_names:
        pytest.skip(f'{name} has no EMA teacher')
    with torch.no_grad():
        for p in task.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    parameters = dict(task.named_parameters())
    before = {n: parameters[n].clone() for n in teacher_names}
    task.after_step(0.5)
    teacher = task.teacher if hasattr(task, 'teacher') else task.target.teacher
    alpha = 1 - (1 - teacher.momentum) / 2
    for n in teacher_names:
        student = parameters[
            n.replace('target.teacher.encoder.', 'pathway.encoder.')
            .replace('target.teacher.head.', 'head.')
            .removeprefix('teacher.')
        ]
        torch.testing.assert_close(parameters[n], alpha * before[n] + (1 - alpha) * student, rtol=1e-5, atol=1e-7)


def test_state_dict_round_trip(name):
    task, batch = made(name)
    other, _ = made(name, seed=5)
    other.load_state_dict(copy.deepcopy(task.state_dict()))
    losses = []
    for one in (task, other):
        torch.manual_seed(0)  # mixup and sampled codes draw from it
        losses.append(one(batch, 0.1)['loss'])
    assert losses[0].equal(losses[1])


def test_bfloat16_runs_with_losses_in_float32(name):
    task, batch = made(name)
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(batch, 0.0)['loss']
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert {p.dtype for p in task.parameters()} == {torch.float32}


REFUSE_ONE = {'mocov3': 'at least 2', 'deit': 'must be even'}


def test_a_batch_of_one(name):
    "Every method survives it, or says in one line why it cannot."
    task, batch = made(name, batch=1)
    if name not in REFUSE_ONE:
        assert task(batch, 0.0)['loss'].isfinite()
    else:
        with pytest.raises(StudyError, match=REFUSE_ONE[name]) as e:
            task(batch, 0.0)
        assert '\n' not in str(e.value)


def test_the_encoder_that_is_kept(name):
    task, _ = made(name)
    recipe = read_config(name)
    assert evaluated_encoder(recipe, task) is task.encoder
    if getattr(task, 'teacher_encoder', None) is None:
        with pytest.raises(StudyError, match='no EMA teacher'):
            evaluated_encoder(recipe.but(kept='teacher'), task)
    else:
        teacher = evaluated_encoder(recipe.but(kept='teacher'), task)
        assert (
            teacher is not task.encoder
            and teacher.config == task.encoder.config
            and not any(p.requires_grad for p in teacher_names.parameters())
        )


def test_masks_reach_every_patch(name):
    "No patch is always visible or always hidden, so every position embedding is trained."
    recipe = read_config(name)
    hidden = build_mask(recipe, 200, torch.Generator().manual_seed(0)).hidden.float().mean(0)
    low, high = (
        (0.05, 0.5) if recipe.mask == 'chance' else (0.3, 0.9)
    )  # iBOT hides on half of the crops, and less
    assert hidden.min() > low and hidden.max() < high

"iBOT has no golden file: closed forms, a reference implementation of the loss in loops, and invariances."

import math

import pytest
import torch
from conftest import assert_close
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.engine.hardware import make_accelerator
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.config import Recipe
from mimstudy.engine.train import begin, train_step, micro_batches
from mimstudy.methods.dino import dino
from mimstudy.methods.ibot import ibot, patch_ce
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import ibot_mask, gather, make_mask
from mimstudy.study.build import build_batch_function, build_task


def encoder_of(prefix=1):
    return Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=prefix)


def task_of(prefix=1, **options):
    torch.manual_seed(0)
    return ibot(encoder_of(prefix), **(dict(out=24, hidden=32, bottleneck=8) | options))


def views(batch=3, locals=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, s, s, generator=g) for s in [32, 32] + [16] * locals]


def mask_of(batch=3, seed=0, **options):
    return ibot_mask(2 * batch, (4, 4), torch.Generator().manual_seed(seed), **options)


def settle(task, batch):
    "Leave the state in which student and teacher are equal and both centres at zero."
    with torch.no_grad():
        for p in task.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    task(batch, 0.0), task.after_step(0.0)
    return task


@pytest.mark.parametrize('name, options', [('dino', {}), ('ibot', {}), ('ibot', dict(shared=False))])
def test_frozen_last_layers_are_neither_moved_nor_decayed(name, options):
    "The release takes their gradient away, so AdamW passes them over; with a gradient of zero it would decay them and count the step."
    recipe = Recipe(
        'freeze',
        method=name,
        options=dict(out=24, hidden=32, bottleneck=8, frozen=0.5) | options,
        views='multicrop',
        locals=2,
        local_size=16,
        mask='chance' if name == 'ibot' else 'none',
        size=32,
        patch=8,
        width=32,
        depth=2,
        heads=2,
        epochs=2,
        batch=8,
        warmup=0,
        lr=1e-2,
        clip_each=True,
    )
    world = scenes(8, size=32, seed=0)
    data = InMemoryDataset(world.images, world.label, ['any'] * 12)
    task, make_batch = build_task(recipe, data), build_batch_function(recipe)
    lasts = [w for n, w in task.named_parameters() if w.requires_grad and n.endswith('last.weight')]
    before = [w.detach().clone() for w in lasts]
    assert len(lasts) == 1 + ('shared' in options)
    run = begin(task, data, make_batch, recipe, None, 0, make_accelerator('cpu'))
    batches = data.batches(run.orders)
    train_step(run, micro_batches(run, batches))  # progress 0
    assert all(w.equal(b) for w, b in zip(lasts, before)) and not any(w in run.optimiser.state for w in lasts)
    train_step(run, micro_batches(run, batches))  # progress .5
    assert not any(w.equal(b) for w, b in zip(lasts, before)) and all(
        run.optimiser.state[w]['step'] == 1 for w in lasts
    )


@pytest.mark.parametrize('shared', [True, False])
def test_reference_in_loops(shared):
    "The release's order of things, in loops over teacher's views, student's views, images and patches."
    torch.manual_seed(3)
    B, mask, v = 3, mask_of(3, 5), [x.double() for x in views()]
    task = settle(task_of(shared=shared).double(), Batch(v, mask))
    student, teacher = (lambda x, n=net: n(x) for net in (task.net.head, task.teacher.net.head))
    own = dict(
        student=task.net.head.last if shared else task.net.patch_last,
        teacher=task.teacher.net.head.last if shared else task.teacher.net.patch_last,
    )
    seen = torch.cat(v[:2])
    with torch.no_grad():
        hidden, full = task.net.pathway(seen, mask), task.teacher.net.pathway.encoder.forward_features(seen)
        s_cls = [*student(hidden[:, 0]).chunk(2)]
        for x in v[2:]:
            places = torch.nn.functional.interpolate(
                task.encoder.pos_embed[:, 1:].float().reshape(1, 4, 4, 32).permute(0, 3, 1, 2),
                (2, 2),
                mode='bicubic',
            ).double()
            z = task.encoder.patch_embed.proj(x).flatten(2).transpose(1, 2) + places.flatten(2).transpose(
                1, 2
            )
            s_cls.append(student(task.encoder.encode(torch.cat([task.encoder.prefix_tokens(B), z], 1))[:, 0]))
        s_patch = own['student'](task.net.head.bottleneck_features(hidden[:, 1:])).chunk(2)
        t_cls_logits, t_patch_logits = teacher(full[:, 0]), own['teacher'](task.teacher.net.head.bottleneck_features(full[:, 1:]))
    tau = 0.04 + 0.03 * 0.05 / 0.1
    t_cls, t_patch = (
        (x - c.value) / tau for x, c in ((t_cls_logits, task.centre), (t_patch_logits, task.patch_centre))
    )
    t_cls, t_patch, holes = t_cls.softmax(-1).chunk(2), t_patch.softmax(-1).chunk(2), mask.hidden.chunk(2)
    whole, part, pairs = 0.0, 0.0, 0
    for q in range(2):
        for i in range(B):
            losses = [
                -(t_patch[q][i, j] * (s_patch[q][i, j] / 0.1).log_softmax(-1)).sum()
                for j in range(16)
                if holes[q][i, j]
            ]
            part += sum(losses) / max(1, len(losses)) / B / 2
        for view in range(4):
            if view == q:
                continue
            pairs += 1
            for i in range(B):
                whole -= (t_cls[q][i] * (s_cls[view][i] / 0.1).log_softmax(-1)).sum() / B
    told = task(Batch(v, mask), 0.05)
    assert_close(told['cls'], whole / pairs, rel=1e-5)
    assert_close(told['patch'], part, rel=1e-5)
    assert_close(told['loss'].detach(), whole / pairs + part, rel=1e-5)
    before = task.centre.value.clone(), task.patch_centre.value.clone()
    task.zero_grad(), task.centre.after_step(), task.patch_centre.after_step()
    for centre, old, logits in zip(
        (task.centre, task.patch_centre), before, (t_cls_logits.mean(0), t_patch_logits.mean((0, 1)))
    ):
        assert_close(centre.value, 0.9 * old + 0.1 * logits, rel=1e-5)


def test_closed_forms():
    mask = mask_of(3, chance=1.0)
    M = mask.predict.shape[1]
    flat = torch.full((6, M, 7), 1 / 7)
    assert_close(
        patch_ce(torch.randn(6, 1, 1).expand(6, M, 7), flat, mask), torch.tensor(math.log(7)), rel=1e-5
    )
    sure = torch.eye(7)[torch.randint(7, (6, M))]
    assert patch_ce(100 * sure, sure, mask) == 0
    nothing = make_mask(torch.zeros(6, 16, dtype=torch.bool))
    assert patch_ce(torch.zeros(6, 0, 7), torch.zeros(6, 0, 7), nothing) == 0


def test_padding_does_not_count():
    torch.manual_seed(0)
    mask = mask_of(4, 2)
    assert mask.weight is not None and not mask.weight.all()
    M = mask.predict.shape[1]
    student, target = torch.randn(8, M, 7), torch.randn(8, M, 7).softmax(-1)
    other = torch.where(mask.weight[..., None] > 0, student, torch.randn(8, M, 7))
    assert patch_ce(student, target, mask).equal(patch_ce(other, target, mask))


def test_a_hidden_pixel_cannot_reach_the_students_answer():
    task, v, mask = task_of().eval(), views(3, 0), mask_of(3, 1)
    holes = mask.hidden.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    seen = torch.cat(v)
    with torch.no_grad():
        plain = task.net(v, mask)
        noisy = task.net([*torch.where(holes, torch.randn_like(seen), seen).chunk(2)], mask)
        other = task.net([*torch.where(holes, seen, torch.randn_like(seen)).chunk(2)], mask)
    assert all(a.equal(b) for a, b in zip(plain, noisy)) and not any(
        a.allclose(b) for a, b in zip(plain, other)
    )


def test_without_holes_it_is_dino():
    "With nothing hidden the patches' loss is zero, and the rest is DINO of the same weights."
    task, v = task_of(), views()
    twin = dino(encoder_of(), out=24, hidden=32, bottleneck=8)
    state = {
        k.replace('net.pathway.', '').replace('net.', ''): x
        for k, x in task.state_dict().items()
        if 'mask_token' not in k and not k.startswith('patch_centre')
    }
    twin.load_state_dict(state)
    told = task(Batch(v, make_mask(torch.zeros(6, 16, dtype=torch.bool))), 0.05)
    assert told['patch'] == 0
    assert_close(told['loss'].detach(), twin(Batch(v), 0.05)['loss'].detach())


def test_crops_may_change_places():
    task, (a, b, c, d), mask = task_of(), views(), mask_of(3, 4)
    swapped = make_mask(torch.cat([mask.hidden[3:], mask.hidden[:3]]))
    assert_close(
        task(Batch([b, a, d, c], swapped), 0.2)['loss'].detach(),
        task(Batch([a, b, c, d], mask), 0.2)['loss'].detach(),
    )


def test_mask_statistics():
    mask = ibot_mask(4000, (14, 14), torch.Generator().manual_seed(0))
    share = mask.hidden.float().mean(1)
    assert abs((share == 0).float().mean() - 0.5) < 0.03 and share.max() <= 0.5
    assert 0.22 < share[share > 0].mean() < 0.30  # up to the drawn share, which is .3 on average
    assert mask.weight is not None and mask.weight.sum(1).equal(mask.hidden.sum(1).float())
    assert ibot_mask(50, (14, 14), torch.Generator().manual_seed(7)).hidden.equal(
        ibot_mask(50, (14, 14), torch.Generator().manual_seed(7)).hidden
    )
    often = mask.hidden.float().mean(0)
    assert often.min() > 0.01 and often.max() < 0.3  # every patch is hidden at times, corners seldom


@pytest.mark.parametrize('shared', [True, False])
def test_gradients_and_the_teacher(shared):
    task = task_of(shared=shared, momentum=0.9)
    task(Batch(views(), mask_of(chance=1.0)), 0.5)['loss'].backward()
    for n, p in task.named_parameters():
        if n.startswith('teacher.'):
            assert p.grad is None and not p.requires_grad
        else:
            assert p.grad.isfinite().all() and p.grad.any(), n
    with torch.no_grad():
        for p in task.parameters():
            p.add_(torch.randn_like(p))
    named = dict(task.named_parameters())
    before = {n: p.clone() for n, p in named.items()}
    task.after_step(0.5)
    for n in named:
        if n.startswith('teacher.'):
            torch.testing.assert_close(
                named[n], 0.95 * before[n] + 0.05 * before[n.removeprefix('teacher.')], rtol=1e-5, atol=1e-6
            )
        else:
            assert named[n].equal(before[n])


@pytest.mark.parametrize('shared', [True, False])
def test_frozen_dictionaries_get_no_gradient(shared):
    task = task_of(shared=shared, frozen=0.1)
    task(Batch(views(), mask_of(chance=1.0)), 0.05)['loss'].backward()
    lasts = [p for n, p in task.named_parameters() if 'last' in n and p.requires_grad]
    assert len(lasts) == 2 - shared and all(p.grad is not None and not p.grad.any() for p in lasts)


def test_forward_changes_nothing_but_a_note():
    task, batch = task_of(), Batch(views(), mask_of())
    assert task(batch, 0.1)['loss'].equal(task(batch, 0.1)['loss'])
    assert not task.centre.value.any() and not task.patch_centre.value.any()
    task.after_step(0.1)
    assert task.centre.value.any() and task.patch_centre.value.any()


@pytest.mark.parametrize('prefix', [1, 4])
def test_bfloat16_keeps_losses_in_float32(prefix):
    task = task_of(prefix)
    with torch.autocast('cpu', torch.bfloat16):
        told = task(Batch(views(), mask_of()), 0.0)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in told.values())


def test_a_batch_of_one():
    task = task_of()
    for seed in range(4):
        loss = task(Batch(views(1), mask_of(1, seed)), 0.0)['loss']
        assert loss.isfinite()
        loss.backward()
    assert task(Batch(views(1, 0), make_mask(torch.zeros(2, 16, dtype=torch.bool))), 0.0)['loss'].isfinite()


def test_what_cannot_be_asked():
    task, half = task_of(), make_mask(mask_of(3).hidden[:3])
    for wrong in (Batch(views(), None), Batch(views(), half), Batch(views()[:1], half)):
        with pytest.raises(StudyError, match='a mask for both'):
            task(wrong, 0.0)


def test_state_round_trip():
    task, batch = task_of(shared=False), Batch(views(), mask_of())
    task(batch, 0.0), task.after_step(0.0)
    torch.manual_seed(9)
    other = ibot(encoder_of(), out=24, hidden=32, bottleneck=8, shared=False)
    other.load_state_dict(task.state_dict())
    assert other(batch, 0.3)['loss'].equal(task(batch, 0.3)['loss'])
    assert gather(batch.mask.hidden, batch.mask.predict).sum() == batch.mask.hidden.sum()

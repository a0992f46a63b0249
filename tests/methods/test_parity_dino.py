"""DINO against the official code: loss, gradient, centre and temperature over three calls, head, schedules;
and what must hold besides."""

import numpy as np
import pytest
import torch
from conftest import assert_close, sub
from mimstudy.core.errors import StudyError
from mimstudy.core.task import Batch
from mimstudy.engine.schedules import cosine
from mimstudy.methods.dino import dino
from mimstudy.parts.centering import Centre, cross_view_ce, teacher_temperature
from mimstudy.parts.crop_features import crop_tokens, view_features
from mimstudy.parts.ema import cosine_momentum
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.mlp_heads import DINOHead
from mimstudy.parts.relative_encoder import RelativeEncoder


def task_of(prefix=1, drop_path=0.0, **options):
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=prefix, drop_path=drop_path)
    return dino(encoder, **(dict(out=24, hidden=32, bottleneck=8) | options))


def views(batch=3, locals=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, s, s, generator=g) for s in [32, 32] + [16] * locals]


def test_loss_gradient_and_centre(golden):
    g = golden('dino')
    centre = Centre(12)
    centre.value.copy_(g['center_0'][0])
    for k, epoch in enumerate(g['epochs_used'].tolist()):
        student = g[f'student_{k}'].clone().requires_grad_()
        teacher = g[f'teacher_{k}']
        target = centre(teacher, teacher_temperature((0.04, 0.07), 2 / 5, epoch / 5)).unflatten(
            0, (2, 3)
        )  # arrives after 2 of 5 epochs
        loss = cross_view_ce(student.unflatten(0, (4, 3)), target)
        loss.backward()
        centre.accumulate(teacher)
        assert_close(centre.value, g[f'center_{k}'][0])  # nothing moves before the step
        centre.after_step()
        assert_close(loss.detach(), g[f'loss_{k}'])
        assert_close(student.grad, g[f'grad_student_{k}'])
        assert_close(centre.value, g[f'center_{k + 1}'][0])


def test_teacher_temperature(golden):
    ours = [teacher_temperature((0.04, 0.07), 2 / 5, epoch / 5) for epoch in range(5)]
    assert np.abs(np.array(ours) - golden('dino')['teacher_temp_schedule'].numpy()).max() < 1e-12


def test_head(golden):
    g = golden('dino')
    head = DINOHead(16, out=12, hidden=20, bottleneck=8)
    state = sub(g, 'head.mlp.')
    head.load_state_dict(
        {f'mlp.{k}': v for k, v in state.items()} | {'last.weight': g['head.last_layer.weight_v']}
    )
    assert g['head.last_layer.weight_g'].eq(1).all()  # the gain of the release's weight norm is held at 1
    assert_close(head(g['head.in']).detach(), g['head.out'])


def test_schedules_are_the_engines(golden):
    g = golden('dino')
    lr = cosine(5e-4, 1e-6, 12, warmup=3)
    for name, ours in dict(
        wd_e4_n3=cosine(0.04, 0.4, 12), momentum_e4_n3=cosine(0.996, 1.0, 12), lr_e4_n3_warm1=lr
    ).items():
        assert np.abs(ours - g[name].numpy()).max() < 1e-12, name
    assert (
        max(abs(cosine_momentum(0.996, step / 12) - m) for step, m in enumerate(g['momentum_e4_n3'].tolist()))
        < 1e-12
    )


def test_loss_is_what_it_says():
    "Loops over teacher's views, student's views and images."
    torch.manual_seed(1)
    student, target = (
        torch.randn(4, 3, 7, dtype=torch.float64),
        torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1),
    )
    total, terms = 0.0, 0
    for q in range(2):
        for v in range(4):
            if v == q:
                continue
            terms += 1
            for i in range(3):
                total -= (target[q, i] * (student[v, i] / 0.1).log_softmax(-1)).sum() / 3
    assert_close(cross_view_ce(student, target), total / terms, rel=1e-6)


def test_loss_is_the_teachers_entropy_at_least():
    torch.manual_seed(1)
    target = torch.randn(2, 5, 9).softmax(-1)
    entropy = -(target * target.log()).sum(-1).mean()
    assert all(cross_view_ce(torch.randn(4, 5, 9), target) > entropy for _ in range(5))


def test_views_in_any_order_after_the_first_two():
    task, (a, b, c, d) = task_of(), views()
    loss = task(Batch([a, b, c, d]), 0.5)['loss'].detach()
    assert_close(task(Batch([a, b, d, c]), 0.5)['loss'].detach(), loss, rel=1e-6)
    assert_close(task(Batch([b, a, c, d]), 0.5)['loss'].detach(), loss, rel=1e-6)


def test_forward_changes_nothing_but_a_note():
    task, batch = task_of(), Batch(views())
    assert task(batch, 0.1)['loss'].equal(task(batch, 0.1)['loss']) and not task.centre.value.any()
    task.after_step(0.1)
    logits, _ = task.teacher_targets(batch.views[:2], 0.1)
    assert_close(task.centre.value, 0.1 * logits.flatten(0, 1).mean(0), rel=1e-4)


def test_slices_of_a_batch_move_the_centre_as_the_whole_does():
    whole, sliced = task_of(), task_of()
    v = views(4)
    whole(Batch(v), 0.0), whole.after_step(0.0)
    for half in (slice(0, 2), slice(2, 4)):
        sliced(Batch([x[half] for x in v]), 0.0)
    sliced.after_step(0.0)
    assert_close(whole.centre.value, sliced.centre.value)


def test_gradients_and_the_teacher():
    task = task_of(momentum=0.9)
    task(Batch(views()), 0.5)['loss'].backward()
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


def test_a_frozen_dictionary_does_not_turn():
    task = task_of(frozen=0.1)
    directions = torch.nn.functional.normalize(task.head.last.weight.detach(), dim=1)
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for progress, moved in ((0.0, False), (0.05, False), (0.1, True)):
        optimiser.zero_grad()
        task(Batch(views()), progress)['loss'].backward()
        optimiser.step()
        now = torch.nn.functional.normalize(task.head.last.weight.detach(), dim=1)
        assert ((now - directions).abs().max() > 1e-3) == moved


def test_the_teacher_has_no_stochastic_depth():
    task, batch = task_of(drop_path=0.5), Batch(views())
    task.train()
    assert task.teacher_targets(batch.views[:2], 0.0)[0].equal(task.teacher_targets(batch.views[:2], 0.0)[0])
    assert not task(batch, 0.0)['loss'].equal(task(batch, 0.0)['loss'])


def test_a_crop_of_another_size_is_another_grid():
    """At the encoder's size nothing changes; elsewhere the tokens are those of an encoder of that size with
    resized positions."""
    torch.manual_seed(0)
    large, x = Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=3), torch.randn(2, 3, 16, 24)
    whole = torch.randn(2, 3, 32, 32)
    assert crop_tokens(large, whole).equal(torch.cat([large.prefix_tokens(2), large.patch_tokens(whole)], 1))
    places = large.pos_embed[:, 3:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    places = torch.nn.functional.interpolate(places, (2, 3), mode='bicubic').flatten(2).transpose(1, 2)
    patches = (
        torch.nn.functional.conv2d(x, large.patch_embed.proj.weight, large.patch_embed.proj.bias, 8)
        .flatten(2)
        .transpose(1, 2)
    )
    assert_close(
        crop_tokens(large, x).detach(), torch.cat([large.prefix_tokens(2), patches + places], 1).detach()
    )
    with pytest.raises(StudyError, match='cannot be cut'):
        crop_tokens(large, x[..., :20])


def test_grouping_by_size_changes_nothing():
    task, v = task_of(prefix=2), views(2, 3)
    v = [v[0], v[2], v[3], v[1], v[4]]
    assert_close(
        view_features(task.encoder, v).detach(),
        torch.cat([view_features(task.encoder, [x]) for x in v]).detach(),
    )


@pytest.mark.parametrize('prefix', [1, 4])
def test_bfloat16_keeps_cosines_and_losses_in_float32(prefix):
    task = task_of(prefix)
    with torch.autocast('cpu', torch.bfloat16):
        loss, head = task(Batch(views()), 0.0)['loss'], task.head(torch.randn(3, 32))
        student, target = torch.randn(4, 3, 7), torch.randn(2, 3, 7).softmax(-1)
        inside = cross_view_ce(student, target)
    assert (
        loss.dtype == head.dtype == torch.float32
        and loss.isfinite()
        and inside.equal(cross_view_ce(student, target))
    )


def test_a_batch_of_one_and_no_small_crops():
    assert task_of()(Batch(views(1, 0)), 0.0)['loss'].isfinite()
    with pytest.raises(StudyError, match='two large crops'):
        task_of()(Batch(views()[:1]), 0.0)


def test_state_round_trip():
    task, batch = task_of(), Batch(views())
    task(batch, 0.0), task.after_step(0.0)
    other = task_of(centre_momentum=0.5)
    other.load_state_dict(task.state_dict())
    assert other(batch, 0.3)['loss'].equal(task(batch, 0.3)['loss'])
    assert not any('noted' in k or 'batches' in k for k in task.state_dict())


def test_relative_positions_take_crops_of_one_size():
    torch.manual_seed(0)
    task = dino(
        RelativeEncoder(size=32, patch=8, width=32, depth=2, heads=2), out=24, hidden=32, bottleneck=8
    )
    assert task(Batch(views(3, 0)), 0.0)['loss'].isfinite()
    with pytest.raises(StudyError, match='without absolute positions'):
        task(Batch(views()), 0.0)

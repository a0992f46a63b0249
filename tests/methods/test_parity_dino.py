"""DINO against the official code: loss, gradient, centre and temperature over three calls, head and
schedules; closed forms, a reference implementation of the loss in loops, and invariances."""

import numpy as np
import pytest
import torch
from conftest import assert_close, sub
from self_distillation import check_gradients, check_teacher_update
from torch.nn import functional as F

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

SMALL = dict(out=24, hidden=32, bottleneck=8)


def small_dino(prefix=1, drop_path=0.0, **options):
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=prefix, drop_path=drop_path)
    return dino(encoder, **(SMALL | options))


def random_views(batch=3, small=2, seed=0):
    "Two large crops and `small` small ones."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, s, s, generator=g) for s in [32, 32] + [16] * small]


def test_loss_gradient_and_centre(golden):
    g = golden('dino')
    centre = Centre(12)
    centre.value.copy_(g['center_0'][0])
    for k, epoch in enumerate(g['epochs_used'].tolist()):
        student = g[f'student_{k}'].clone().requires_grad_()
        teacher = g[f'teacher_{k}']
        tau = teacher_temperature((0.04, 0.07), 2 / 5, epoch / 5)  # warm-up of 2 of 5 epochs
        loss = cross_view_ce(student.unflatten(0, (4, 3)), centre(teacher, tau).unflatten(0, (2, 3)))
        loss.backward()
        centre.accumulate(teacher)
        assert_close(centre.value, g[f'center_{k}'][0])  # it moves with the step only
        centre.after_step()
        assert_close(loss.detach(), g[f'loss_{k}'])
        assert_close(student.grad, g[f'grad_student_{k}'])
        assert_close(centre.value, g[f'center_{k + 1}'][0])


def test_teacher_temperature(golden):
    ours = [teacher_temperature((0.04, 0.07), 2 / 5, epoch / 5) for epoch in range(5)]
    np.testing.assert_allclose(ours, golden('dino')['teacher_temp_schedule'].numpy(), rtol=0, atol=1e-12)


def test_head(golden):
    g = golden('dino')
    head = DINOHead(16, out=12, hidden=20, bottleneck=8)
    state = {f'mlp.{name}': value for name, value in sub(g, 'head.mlp.').items()}
    state['last.weight'] = g['head.last_layer.weight_v']
    head.load_state_dict(state)
    assert g['head.last_layer.weight_g'].eq(1).all()  # the release fixes the gain of its weight norm at 1
    assert_close(head(g['head.in']).detach(), g['head.out'])


@pytest.mark.parametrize(
    'name, ours',
    [
        ('wd_e4_n3', cosine(0.04, 0.4, 12)),
        ('momentum_e4_n3', cosine(0.996, 1.0, 12)),
        ('momentum_e4_n3', [cosine_momentum(0.996, step / 12) for step in range(12)]),
        ('lr_e4_n3_warm1', cosine(5e-4, 1e-6, 12, warmup=3)),
    ],
)
def test_schedules(golden, name, ours):
    np.testing.assert_allclose(ours, golden('dino')[name].numpy(), rtol=0, atol=1e-12)


def test_loss_by_loops():
    "Loops over the teacher's views, the student's views and images."
    torch.manual_seed(1)
    student = torch.randn(4, 3, 7, dtype=torch.float64)
    target = torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1)
    total, pairs = 0.0, 0
    for q in range(2):
        for v in range(4):
            if v == q:
                continue
            pairs += 1
            for i in range(3):
                total -= (target[q, i] * (student[v, i] / 0.1).log_softmax(-1)).sum() / 3
    assert_close(cross_view_ce(student, target), total / pairs, rel=1e-6)


def test_loss_is_at_least_the_teachers_entropy():
    torch.manual_seed(1)
    target = torch.randn(2, 5, 9).softmax(-1)
    entropy = -(target * target.log()).sum(-1).mean()
    for _ in range(5):
        assert cross_view_ce(torch.randn(4, 5, 9), target) > entropy


def test_the_order_of_the_views_does_not_matter():
    "Of the two large crops, and of the small ones."
    task, (a, b, c, d) = small_dino(), random_views()
    loss = task(Batch([a, b, c, d]), 0.5)['loss'].detach()
    for views in ([a, b, d, c], [b, a, c, d]):
        assert_close(task(Batch(views), 0.5)['loss'].detach(), loss, rel=1e-6)


def test_the_centre_moves_after_the_step_only():
    task, batch = small_dino(), Batch(random_views())
    assert task(batch, 0.1)['loss'].equal(task(batch, 0.1)['loss'])
    assert not task.centre.value.any()
    task.after_step(0.1)
    logits, _ = task.teacher_targets(batch.views[:2], 0.1)
    assert_close(task.centre.value, 0.1 * logits.flatten(0, 1).mean(0), rel=1e-4)


def test_micro_batches_move_the_centre_as_the_whole_batch_does():
    whole, sliced = small_dino(), small_dino()
    views = random_views(4)
    whole(Batch(views), 0.0)
    whole.after_step(0.0)
    for half in (slice(0, 2), slice(2, 4)):
        sliced(Batch([x[half] for x in views]), 0.0)
    sliced.after_step(0.0)
    assert_close(whole.centre.value, sliced.centre.value)


def test_gradients_and_the_teacher():
    task = small_dino(momentum=0.9)
    check_gradients(task, Batch(random_views()))
    check_teacher_update(task)


def test_a_frozen_last_layer_keeps_its_directions():
    task = small_dino(frozen=0.1)
    initial = F.normalize(task.head.last.weight.detach(), dim=1)
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for progress, trained in ((0.0, False), (0.05, False), (0.1, True)):
        optimiser.zero_grad()
        task(Batch(random_views()), progress)['loss'].backward()
        optimiser.step()
        directions = F.normalize(task.head.last.weight.detach(), dim=1)
        assert ((directions - initial).abs().max() > 1e-3) == trained


def test_the_teacher_has_no_stochastic_depth():
    task, batch = small_dino(drop_path=0.5), Batch(random_views())
    task.train()
    logits = [task.teacher_targets(batch.views[:2], 0.0)[0] for _ in range(2)]
    assert logits[0].equal(logits[1])
    assert not task(batch, 0.0)['loss'].equal(task(batch, 0.0)['loss'])


def test_crops_of_another_size_than_the_encoders():
    "Their tokens are those of an encoder of that size with resized position embeddings."
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=3)
    x = torch.randn(2, 3, 16, 24)
    same_size = torch.randn(2, 3, 32, 32)
    prefix = encoder.prefix_tokens(2)
    assert crop_tokens(encoder, same_size).equal(torch.cat([prefix, encoder.patch_tokens(same_size)], 1))
    positions = encoder.pos_embed[:, 3:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (2, 3), mode='bicubic')
    patches = F.conv2d(x, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, 8) + positions
    expected = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1)
    assert_close(crop_tokens(encoder, x).detach(), expected.detach())
    with pytest.raises(StudyError, match='cannot be cut'):
        crop_tokens(encoder, x[..., :20])


def test_features_do_not_depend_on_the_order_of_sizes():
    "Views of one size go through the encoder together."
    task, (a, b, c, d, e) = small_dino(prefix=2), random_views(2, 3)
    views = [a, c, d, b, e]
    one_by_one = torch.cat([view_features(task.encoder, [x]) for x in views])
    assert_close(view_features(task.encoder, views).detach(), one_by_one.detach())


@pytest.mark.parametrize('prefix', [1, 4])
def test_bfloat16_keeps_cosines_and_losses_in_float32(prefix):
    task = small_dino(prefix)
    student = torch.randn(4, 3, 7)
    target = torch.randn(2, 3, 7).softmax(-1)
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(Batch(random_views()), 0.0)['loss']
        cosines = task.head(torch.randn(3, 32))
        inside = cross_view_ce(student, target)
    assert loss.dtype == cosines.dtype == torch.float32 and loss.isfinite()
    assert inside.equal(cross_view_ce(student, target))


def test_one_image_without_small_crops():
    assert small_dino()(Batch(random_views(1, 0)), 0.0)['loss'].isfinite()


def test_two_large_crops_are_required():
    with pytest.raises(StudyError, match='two large crops'):
        small_dino()(Batch(random_views()[:1]), 0.0)


def test_state_round_trip():
    task, batch = small_dino(), Batch(random_views())
    task(batch, 0.0)
    task.after_step(0.0)
    other = small_dino(centre_momentum=0.5)
    other.load_state_dict(task.state_dict())
    assert other(batch, 0.3)['loss'].equal(task(batch, 0.3)['loss'])
    assert {name for name in task.state_dict() if name.startswith('centre.')} == {'centre.value'}


def test_relative_positions_need_crops_of_one_size():
    torch.manual_seed(0)
    task = dino(RelativeEncoder(size=32, patch=8, width=32, depth=2, heads=2), **SMALL)
    assert task(Batch(random_views(3, 0)), 0.0)['loss'].isfinite()
    with pytest.raises(StudyError, match='without absolute positions'):
        task(Batch(random_views()), 0.0)

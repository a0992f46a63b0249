"""MoCo v3 against the official code: losses, gradient, heads with their running statistics, position
embeddings and schedules; a reference implementation of the loss in loops; and two processes, also for the
centre of DINO."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, sub
from self_distillation import check_teacher_update

from mimstudy.core.errors import StudyError
from mimstudy.core.task import Batch
from mimstudy.engine.schedules import cosine
from mimstudy.methods.mocov3 import info_nce, mocov3
from mimstudy.parts.centering import Centre
from mimstudy.parts.ema import cosine_momentum
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.mlp_heads import batch_mlp
from mimstudy.parts.position_embedding import sincos_positions
from mimstudy.parts.relative_encoder import RelativeEncoder


def small_mocov3(prefix=1, **options):
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=prefix)
    return mocov3(encoder, **(dict(hidden=32, out=16) | options))


def two_views(batch, seed=0):
    return list(torch.randn(2, batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize('tau', [0.2, 1.0])
def test_losses_and_gradient(golden, tau):
    g = golden('mocov3')
    q1 = g['q1'].clone().requires_grad_()
    loss_12 = info_nce(q1, g['k2'], tau)
    loss_21 = info_nce(g['q2'], g['k1'], tau)
    loss = loss_12 + loss_21
    loss.backward()
    assert_close(loss_12.detach(), g[f'loss_12.t{tau}'])
    assert_close(loss_21.detach(), g[f'loss_21.t{tau}'])
    assert_close(loss.detach(), g[f'loss.t{tau}'])
    assert_close(q1.grad, g[f'grad_q1.t{tau}'])


def check_running_statistics(mlp, stored):
    """The file holds the statistics after one forward, which began at random values; ours began at 0 and 1.
    The difference gives the initial values. They must be as drawn: 0.1 n and 1 + 0.1 |n|, with n normal."""
    ours = mlp.state_dict()
    for name, value in stored.items():
        if 'running_mean' in name:
            initial = (value - ours[name]) / 0.9
            assert initial.abs().max() < 0.4
        elif 'running_var' in name:
            initial = (value - ours[name]) / 0.9 + 1
            assert initial.min() > 1 and initial.max() < 1.4


def test_projector_and_predictor(golden):
    g = golden('mocov3')
    x = g['mlp.in']
    for name, layers, widths in (('proj', 3, (24, 40, 16)), ('pred', 2, (16, 40, 16))):
        mlp = batch_mlp(layers, *widths)
        stored = sub(g, f'{name}.')
        weights = {k: v for k, v in stored.items() if 'running' not in k}
        missing, unexpected = mlp.load_state_dict(weights, strict=False)
        assert not unexpected and all('running' in k or 'num_batches' in k for k in missing)
        x = mlp.train()(x)
        assert_close(x.detach(), g[f'mlp.{name}_out'])
        check_running_statistics(mlp, stored)


def test_position_embeddings(golden):
    assert_close(sincos_positions(32, (8, 8), first='row'), golden('mocov3')['sincos_32_g8'])


def test_momentum_schedule(golden):
    ours = [cosine_momentum(0.99, step / 24) for step in range(24)]
    np.testing.assert_allclose(ours, golden('mocov3')['momentum_epochs6_n4'].numpy(), rtol=0, atol=1e-12)


def test_learning_rate_schedule(golden):
    ours = cosine(6e-4, 0.0, 24, warmup=8)
    ours[:8] *= 7 / 8  # the release reaches the peak with the step after its warm-up, ours with the last one
    np.testing.assert_allclose(ours, golden('mocov3')['lr_epochs6_warm2_n4'].numpy(), rtol=0, atol=1e-12)


def test_initial_weights_are_the_releases():
    encoder = small_mocov3().encoder
    assert encoder.pos_embed.equal(sincos_positions(32, (4, 4), first='row'))
    assert encoder.cls_token.abs().max() < 1e-5
    limit = dict(qkv=(3 / 32) ** 0.5, proj=(6 / 64) ** 0.5, fc1=(6 / 160) ** 0.5, fc2=(6 / 160) ** 0.5)
    for name, p in encoder.blocks.named_parameters():
        if p.ndim == 2:
            bound = limit[name.split('.')[-2]]
            assert 0.9 * bound < p.abs().max() <= bound
        elif 'norm' not in name:
            assert not p.any()


def test_what_is_not_trained():
    frozen = {name for name, p in small_mocov3().encoder.named_parameters() if not p.requires_grad}
    assert frozen == {'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    task = small_mocov3(freeze_patch_embed=False, fixed_positions=False)
    assert all(p.requires_grad for p in task.encoder.parameters())


def test_loss_by_loops():
    "The symmetric loss from its definition, image by image."
    task = small_mocov3().double()
    views = [x.double() for x in two_views(5)]
    (q1, q2), (k1, k2) = task.queries(views), task.keys(views)

    def loss_of(q, k):
        total = 0.0
        for i in range(5):
            similarity = torch.stack([torch.cosine_similarity(q[i], k[j], 0) / 0.2 for j in range(5)])
            total -= similarity.log_softmax(0)[i] / 5 * 0.4  # times 2τ
        return total

    expected = (loss_of(q1, k2) + loss_of(q2, k1)).detach()
    assert_close(task(Batch(views), 0.0)['loss'].detach(), expected, rel=1e-6)


def test_the_order_of_the_views_does_not_matter():
    task, (a, b) = small_mocov3(), two_views(5)
    loss = task(Batch([a, b]), 0.0)['loss'].detach()
    assert_close(task(Batch([b, a]), 0.0)['loss'].detach(), loss, rel=1e-6)


def test_gradients_and_the_teacher():
    task = small_mocov3(momentum=0.9)
    task(Batch(two_views(6)), 0.0)['loss'].backward()
    for name, p in task.named_parameters():
        if name.startswith('teacher.'):
            assert p.grad is None and not p.requires_grad
        elif p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all()
    assert not any(name.startswith('teacher.predictor') for name in task.state_dict())
    check_teacher_update(task)


def test_the_teacher_has_its_own_batch_norm_statistics():
    task = small_mocov3()
    task(Batch(two_views(6)), 0.0)
    task.after_step(0.0)
    assert task.teacher.training
    student, teacher = task.projector[1], task.teacher.projector[1]
    assert teacher.running_mean.any()
    assert student.num_batches_tracked == teacher.num_batches_tracked == 2  # one view at a time


def test_wrong_batches_and_options():
    task = small_mocov3()
    with pytest.raises(StudyError, match='at least 2 in a batch'):
        task(Batch(two_views(1)), 0.0)
    with pytest.raises(StudyError, match='two crops'):
        task(Batch(two_views(4)[:1]), 0.0)
    with pytest.raises(StudyError, match='0 … 1'):
        small_mocov3(momentum=1.5)


@pytest.mark.parametrize('prefix', [1, 4])
def test_bfloat16_keeps_similarities_in_float32(prefix):
    task = small_mocov3(prefix)
    q, k = torch.randn(6, 16), torch.randn(6, 16)
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(Batch(two_views(4)), 0.0)['loss']
        inside = info_nce(q, k)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert inside.equal(info_nce(q, k))


def _process(rank, q, k, folder):
    "One of two processes: half of the batch."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    half = slice(rank * 4, rank * 4 + 4)
    queries = q[half].clone().requires_grad_()
    loss = info_nce(queries, k[half])
    loss.backward()
    centre = Centre(16)
    centre.accumulate(k[half])
    centre.after_step()
    torch.save((loss.detach(), queries.grad, centre.value), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_large_batch(tmp_path):
    q, k = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    torch.multiprocessing.spawn(_process, (q, k, str(tmp_path)), nprocs=2)
    saved = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    losses, grads, centres = zip(*saved)
    q.requires_grad_()
    loss = info_nce(q, k)
    loss.backward()
    assert_close(sum(losses) / 2, loss.detach())
    assert_close(torch.cat(grads) / 2, q.grad)
    for centre in centres:
        assert_close(centre, 0.1 * k.mean(0))


def test_relative_positions_stay_relative():
    torch.manual_seed(0)
    encoder = RelativeEncoder(size=32, patch=8, width=32, depth=2, heads=2)
    task = mocov3(encoder, hidden=32, out=16)
    task(Batch(two_views(4)), 0.0)['loss'].backward()
    assert task.encoder.pos_embed is None
    assert task.encoder.rel_pos_bias.relative_position_bias_table.grad.any()

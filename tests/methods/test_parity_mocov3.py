"""MoCo v3 against the official code: losses, gradient, heads with their running statistics, positions,
schedules; and two processes (for DINO's centre too)."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, sub
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


def task_of(prefix=1, **options):
    torch.manual_seed(0)
    return mocov3(
        Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=prefix),
        **(dict(hidden=32, out=16) | options),
    )


def two(batch, seed=0):
    return list(torch.randn(2, batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize('tau', [0.2, 1.0])
def test_losses_and_gradient(golden, tau):
    g = golden('mocov3')
    q1 = g['q1'].clone().requires_grad_()
    one, other = info_nce(q1, g['k2'], tau), info_nce(g['q2'], g['k1'], tau)
    (one + other).backward()
    assert_close(one.detach(), g[f'loss_12.t{tau}'])
    assert_close(other.detach(), g[f'loss_21.t{tau}'])
    assert_close((one + other).detach(), g[f'loss.t{tau}'])
    assert_close(q1.grad, g[f'grad_q1.t{tau}'])


def test_projector_and_predictor(golden):
    g, x = golden('mocov3'), golden('mocov3')['mlp.in']
    for name, layers, widths, out in (
        ('proj', 3, (24, 40, 16), 'mlp.proj_out'),
        ('pred', 2, (16, 40, 16), 'mlp.pred_out'),
    ):
        mlp = batch_mlp(layers, *widths)
        stored = sub(g, f'{name}.')
        missing, unexpected = mlp.load_state_dict(
            {k: v for k, v in stored.items() if 'running' not in k}, strict=False
        )
        assert not unexpected and all('running' in k or 'num_batches' in k for k in missing)
        x = mlp.train()(x)
        assert_close(x.detach(), g[out])
        # the statistics before that forward are not in the file; what they must have been is what the
        # fixture drew: N(0, .1) and 1 + .1 |N|
        for k in (k for k in stored if 'running' in k):
            drawn = (stored[k] - mlp.state_dict()[k]) / 0.9 + ('var' in k)
            assert drawn.abs().max() < 0.4 if 'mean' in k else (drawn.min() > 1 and drawn.max() < 1.4)


def test_positions(golden):
    assert_close(sincos_positions(32, (8, 8), first='row'), golden('mocov3')['sincos_32_g8'])


def test_schedules(golden):
    g = golden('mocov3')
    assert (
        max(
            abs(cosine_momentum(0.99, step / 24) - m)
            for step, m in enumerate(g['momentum_epochs6_n4'].tolist())
        )
        < 1e-12
    )
    ours = cosine(6e-4, 0.0, 24, warmup=8)
    ours[:8] *= 7 / 8  # the release's warm-up reaches the peak with the step after it, ours with its last one
    assert np.abs(ours - g['lr_epochs6_warm2_n4'].numpy()).max() < 1e-12


def test_official_initial_weights():
    e = task_of().encoder
    assert (
        torch.equal(e.pos_embed, sincos_positions(32, (4, 4), first='row')) and e.cls_token.abs().max() < 1e-5
    )
    frozen = {n for n, p in e.named_parameters() if not p.requires_grad}
    assert frozen == {'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    assert all(
        p.requires_grad for p in task_of(freeze_patch_embed=False, fixed_positions=False).encoder.parameters()
    )
    limit = dict(qkv=(3 / 32) ** 0.5, proj=(6 / 64) ** 0.5, fc1=(6 / 160) ** 0.5, fc2=(6 / 160) ** 0.5)
    for name, p in e.blocks.named_parameters():
        if p.ndim == 2:
            assert 0.9 * limit[name.split('.')[-2]] < p.abs().max() <= limit[name.split('.')[-2]]
        elif 'norm' not in name:
            assert not p.any()


def test_loss_is_what_it_says():
    "The symmetric loss from its definition, image by image; and views may change places."
    task, (a, b) = task_of().double(), [v.double() for v in two(5)]
    (q1, q2), (k1, k2) = task.queries([a, b]), task.keys([a, b])

    def slow(q, k):
        total = 0.0
        for i in range(5):
            scores = torch.stack([torch.cosine_similarity(q[i], k[j], 0) / 0.2 for j in range(5)]).exp()
            total -= (scores[i] / scores.sum()).log() / 5 * 0.4
        return total

    assert_close(task(Batch([a, b]), 0.0)['loss'].detach(), (slow(q1, k2) + slow(q2, k1)).detach(), rel=1e-6)
    assert_close(
        task(Batch([b, a]), 0.0)['loss'].detach(), task(Batch([a, b]), 0.0)['loss'].detach(), rel=1e-6
    )


def test_gradients_and_the_teacher():
    task = task_of(momentum=0.9)
    task(Batch(two(6)), 0.0)['loss'].backward()
    for n, p in task.named_parameters():
        if n.startswith('teacher.'):
            assert p.grad is None and not p.requires_grad
        elif p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all()
    assert not any(n.startswith('teacher.predictor') for n in task.state_dict())
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


def test_the_teacher_keeps_its_own_statistics():
    task = task_of()
    task(Batch(two(6)), 0.0)
    task.after_step(0.0)
    assert task.teacher.training and not task.teacher.projector[1].running_mean.eq(0).all()
    seen = task.teacher.projector[1].num_batches_tracked
    assert seen == 2 == task.projector[1].num_batches_tracked  # one view at a time


def test_what_cannot_be_asked():
    task = task_of()
    with pytest.raises(StudyError, match='at least 2 in a batch'):
        task(Batch(two(1)), 0.0)
    with pytest.raises(StudyError, match='two crops'):
        task(Batch(two(4)[:1]), 0.0)
    with pytest.raises(StudyError, match='0 … 1'):
        task_of(momentum=1.5)


@pytest.mark.parametrize('prefix', [1, 4])
def test_bfloat16_keeps_similarities_in_float32(prefix):
    task = task_of(prefix)
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(Batch(two(4)), 0.0)['loss']
        q, k = torch.randn(6, 16), torch.randn(6, 16)
        inside = info_nce(q, k)
    assert loss.dtype == torch.float32 and loss.isfinite() and inside.equal(info_nce(q, k))


def _process(rank, q, k, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    mine = q[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    loss = info_nce(mine, k[rank * 4 : rank * 4 + 4])
    loss.backward()
    centre = Centre(16)
    centre.accumulate(k[rank * 4 : rank * 4 + 4]), centre.after_step()
    torch.save((loss.detach(), mine.grad, centre.value), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_large_batch(tmp_path):
    q, k = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    torch.multiprocessing.spawn(_process, (q, k, str(tmp_path)), nprocs=2)
    losses, grads, centres = zip(
        *(torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2))
    )
    q.requires_grad_()
    whole = info_nce(q, k)
    whole.backward()
    assert_close(sum(losses) / 2, whole.detach())
    assert_close(torch.cat(grads) / 2, q.grad)
    for centre in centres:
        assert_close(centre, 0.1 * k.mean(0))


def test_relative_positions_stay_relative():
    torch.manual_seed(0)
    task = mocov3(RelativeEncoder(size=32, patch=8, width=32, depth=2, heads=2), hidden=32, out=16)
    task(Batch(two(4)), 0.0)['loss'].backward()
    assert (
        task.encoder.pos_embed is None and task.encoder.rel_pos_bias.relative_position_bias_table.grad.any()
    )

"""ConMIM's pre-training model against the official code: tokens, projector, loss, every gradient, batch-
norm statistics, the EMA teacher's step."""

import pytest
import torch
from conftest import assert_close, sub
from mimstudy.core.task import Batch
from mimstudy.methods.conmim import conmim
from mimstudy.parts.ema import ema_update
from mimstudy.parts.masks import make_mask
from mimstudy.parts.relative_encoder import RelativeEncoder


def translated(state, encoder='pathway.encoder.', head='head.', token='pathway.mask_token'):
    "Official ConMIM names -> ours."
    out = {}
    for k, v in state.items():
        if k == 'mask_token':
            if token:
                out[token] = v
        elif k.startswith('projectors.'):
            out[head + k.removeprefix('projectors.')] = v
        else:
            out[encoder + k] = v
    return out


def made(g):
    task = conmim(RelativeEncoder(size=112, patch=8, width=32, depth=2, heads=4), hidden=64, out=16)
    state = translated(sub(g, 'student.')) | translated(
        sub(g, 'teacher.'), 'target.teacher.encoder.', 'target.teacher.head.', None
    )
    missing, unexpected = task.load_state_dict(state, strict=False)
    assert not unexpected and all(
        k.endswith(('num_batches_tracked', 'relative_position_index', 'k_bias')) for k in missing
    ), (missing, unexpected)
    batch = Batch([g['samples'].float(), g['samples_aug'].float()], make_mask(g['mask'].flatten(1)))
    return task, batch


@pytest.fixture(scope='module')
def g(golden):
    return golden('conmim_model')


def test_relative_positions(g):
    task, _ = made(g)
    encoder = task.encoder
    assert encoder.rel_pos_bias.relative_position_index.equal(g['relative_position_index'].long())
    assert_close(encoder.rel_pos_bias().reshape(4, 197, 197)[:, :20, :20].detach(), g['rel_pos_bias'])


@torch.no_grad()
def test_tokens_and_projection_in_eval_mode(g):
    task, batch = made(g)
    task.eval()
    hidden = task.pathway(batch.views[0], batch.mask)
    assert_close(hidden, g['eval.student_tokens'])
    assert_close(task.head(hidden)[:, 1:], g['eval.student_feat'])
    assert_close(task.target.teacher.encoder.forward_features(batch.views[1]), g['eval.teacher_tokens'])


def test_training_step(g):
    task, batch = made(g)
    task.train()
    feats = task.head(task.pathway(batch.views[0], batch.mask))[:, 1:]
    assert_close(feats.detach(), g['train.feat'])
    task, batch = made(g)
    task.train()
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['train.loss'])
    ours, theirs = dict(task.named_parameters()), translated(sub(g, 'grad.'))
    for name, grad in theirs.items():
        if name == 'pathway.encoder.norm.bias':
            assert ours[name].grad.abs().max() < 1e-6  # a constant before batch norm: mathematically zero
        else:
            assert_close(ours[name].grad, grad, rel=2e-5)
    total = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    assert_close(total, g['train.grad_norm'], rel=1e-5)
    close_buffers(task, g)


def close_buffers(task, g):
    ours = dict(task.named_buffers())
    for prefix, head in (
        ('train.student_buffer.', 'head.'),
        ('train.teacher_buffer.', 'target.teacher.head.'),
    ):
        for k, v in sub(g, prefix).items():
            assert_close(ours[head + k.removeprefix('projectors.')], v)


def test_full_keys_in_train_mode(g):
    task, batch = made(g)
    task.train()
    assert_close(task.target(batch), g['train.feat_full'])


def test_teacher_step(g):
    task, _ = made(g)
    for teacher, student in zip(task.target.teacher.values(), task.target.teacher.students):
        ema_update(teacher, student, 0.996)
    ours = dict(task.named_parameters())
    moved = translated(sub(g, 'ema996.'), 'target.teacher.encoder.', 'target.teacher.head.', None)
    assert moved
    for k, v in moved.items():
        assert_close(ours[k].detach(), v)

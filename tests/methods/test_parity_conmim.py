"""ConMIM against the official code: tokens, projector, loss, every gradient, batch-norm statistics and the
EMA update of the teacher."""

import pytest
import torch
from conftest import assert_close, sub

from mimstudy.core.task import Batch
from mimstudy.methods.conmim import conmim
from mimstudy.parts.ema import ema_update
from mimstudy.parts.masks import make_mask
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.study.task_imports import load_official, task_tensors, teacher_tensors


def build(g):
    "A task with the stored weights, and the stored batch."
    task = conmim(RelativeEncoder(size=112, patch=8, width=32, depth=2, heads=4), hidden=64, out=16)
    load_official(task, sub(g, 'student.'), teacher=sub(g, 'teacher.'))
    batch = Batch([g['samples'].float(), g['samples_aug'].float()], make_mask(g['mask'].flatten(1)))
    return task, batch


def check_batch_norm_statistics(task, g):
    ours = dict(task.named_buffers())
    student = task_tensors(sub(g, 'train.student_buffer.'), task)
    teacher = teacher_tensors(task_tensors(sub(g, 'train.teacher_buffer.'), task))
    assert student and teacher
    for name, value in (student | teacher).items():
        assert_close(ours[name], value)


@pytest.fixture(scope='module')
def g(golden):
    return golden('conmim_model')


def test_relative_positions(g):
    task, _ = build(g)
    encoder = task.encoder
    assert encoder.rel_pos_bias.relative_position_index.equal(g['relative_position_index'].long())
    assert_close(encoder.rel_pos_bias().reshape(4, 197, 197)[:, :20, :20].detach(), g['rel_pos_bias'])


@torch.no_grad()
def test_tokens_and_projection_in_eval_mode(g):
    task, batch = build(g)
    task.eval()
    hidden = task.pathway(batch.views[0], batch.mask)
    assert_close(hidden, g['eval.student_tokens'])
    assert_close(task.head(hidden)[:, 1:], g['eval.student_feat'])
    assert_close(task.target.teacher.encoder.forward_features(batch.views[1]), g['eval.teacher_tokens'])


def test_training_step(g):
    task, batch = build(g)
    task.train()
    features = task.head(task.pathway(batch.views[0], batch.mask))[:, 1:]
    assert_close(features.detach(), g['train.feat'])
    task, batch = build(g)  # again, since the batch norms have moved
    task.train()
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['train.loss'])
    ours = dict(task.named_parameters())
    for name, grad in task_tensors(sub(g, 'grad.'), task).items():
        if name == 'pathway.encoder.norm.bias':
            assert ours[name].grad.abs().max() < 1e-6  # batch norm removes a constant: zero
        else:
            assert_close(ours[name].grad, grad, rel=2e-5)
    total = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    assert_close(total, g['train.grad_norm'], rel=1e-5)
    check_batch_norm_statistics(task, g)


def test_keys_in_training_mode(g):
    task, batch = build(g)
    task.train()
    assert_close(task.target(batch), g['train.feat_full'])


def test_ema_update_of_the_teacher(g):
    task, _ = build(g)
    for teacher, student in zip(task.target.teacher.values(), task.target.teacher.students):
        ema_update(teacher, student, 0.996)
    ours = dict(task.named_parameters())
    updated = teacher_tensors(task_tensors(sub(g, 'ema996.'), task))
    assert updated
    for name, value in updated.items():
        assert_close(ours[name].detach(), value)

"Tasks and the short training loop of the lessons: what is called, in which order, and what is returned."

import pytest
import torch
from torch import nn

from mimstudy.core.lessons import overfit
from mimstudy.core.task import Batch, Task


class Recorder(Task):
    "One trained and one frozen weight; records the calls of the loop."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.calls = []

    def forward(self, batch, progress):
        self.calls.append(('forward', progress))
        return {'loss': (self.weight * self.frozen * batch.views[0]).square().mean()}

    def before_step(self, progress):
        assert self.weight.grad is not None
        self.calls.append(('before_step', self.weight.item()))

    def after_step(self, progress):
        self.calls.append(('after_step', self.weight.item()))


BATCH = Batch([torch.ones(2, 3, 4, 4)])


def test_overfit_returns_the_loss_before_each_step():
    losses = overfit(Recorder(), BATCH, steps=20, lr=0.02)
    assert len(losses) == 20
    assert losses[0] == 1.0
    assert losses == sorted(losses, reverse=True)


def test_overfit_calls_the_task_like_the_training_loop():
    task = Recorder()
    overfit(task, BATCH, steps=2)
    assert [name for name, _ in task.calls] == ['forward', 'before_step', 'after_step'] * 2
    assert [value for name, value in task.calls if name == 'forward'] == [0.0, 0.5]
    before, after = task.calls[1][1], task.calls[2][1]
    assert before == 1.0 and after < 1.0
    assert task.frozen.item() == 1.0


def test_a_task_without_forward_names_what_is_missing():
    with pytest.raises(TypeError, match='forward'):
        Task()(BATCH, 0.0)


def test_optional_fields_of_a_batch_are_none():
    assert BATCH.mask is None and BATCH.label is None

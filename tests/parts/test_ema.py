"The running statistics of an EMA teacher in evaluation mode are those of its own batches."

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimstudy.core.task import Batch
from mimstudy.methods.conmim import conmim
from mimstudy.parts.ema import EMATeacher
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import random_mask


def keys_of(task, batch, mode):
    "The keys of a batch of length 1, with the teacher in this mode; its statistics stay as they are."
    teacher = task.target.teacher
    before = {name: value.clone() for name, value in teacher.named_buffers()}
    teacher.mode = mode
    teacher.train(mode == 'train')
    keys = F.normalize(task.target(batch), dim=-1)
    for name, value in teacher.named_buffers():
        value.copy_(before[name])
    return keys


def trained(mode, steps=20):
    "ConMIM after a short training on noise with an offset, and a batch."
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=1, heads=2, layer_scale=0.1)
    task = conmim(encoder, hidden=32, out=16, momentum=0.9, teacher_mode=mode)
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = torch.randn(16, 3, 32, 32, generator=generator) + torch.randn(16, 3, 1, 1, generator=generator)
        batch = Batch([x, x + 0.1], random_mask(16, (4, 4), 0.75, generator))
        optimiser.zero_grad()
        task(batch, step / steps)['loss'].backward()
        optimiser.step()
        task.after_step(step / steps)
    return task, batch


def test_its_keys_are_close_to_those_of_batch_statistics():
    "With the initial statistics they are not."
    task, batch = trained('eval')
    running, exact = keys_of(task, batch, 'eval'), keys_of(task, batch, 'train')
    assert (running * exact).sum(-1).mean() > 0.75
    for module in task.target.teacher.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    initial = keys_of(task, batch, 'eval')
    assert (initial * exact).sum(-1).mean() < 0.65


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_statistics_are_those_of_the_batches_that_it_read(mode):
    norm = nn.BatchNorm1d(3)
    teacher = EMATeacher({'norm': norm}, mode=mode)
    x = torch.randn(8, 3) * 2 + 5
    expected = nn.BatchNorm1d(3)
    for _ in range(3):
        teacher.norm(x)
        expected(x)
    assert teacher.norm.running_mean.equal(expected.running_mean)
    assert teacher.norm.running_var.equal(expected.running_var)
    assert norm.running_mean.eq(0).all()
    teacher.eval()
    teacher.norm(x)
    assert teacher.norm.running_mean.equal(expected.running_mean)

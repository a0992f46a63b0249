"SGD with momentum, and schedules that fall in steps or along a line, have closed forms."

import pytest
import torch
from torch import nn

from mimstudy.core.task import Batch, Task
from mimstudy.engine.config import OptimConfig
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.optimiser import build_optimiser
from mimstudy.engine.schedules import learning_rate
from mimstudy.engine.train import train
from mimstudy.engine.training_config import DownstreamConfig


class Slope(Task):
    "One weight with a gradient of 1."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch, progress):
        return {'loss': self.weight.sum()}


def test_sgd_with_momentum_in_steps():
    optim = OptimConfig(
        epochs=10,
        batch=8,
        optimiser='sgd',
        schedule='steps',
        step_epochs=4.0,
        lr=0.1,
        min_lr=0.0,
        warmup=0.0,
        weight_decay=0.0,
        clip=None,
    )
    images = InMemoryDataset(torch.zeros(42, 3, 8, 8, dtype=torch.uint8), torch.zeros(42).long(), ['one'])
    config = DownstreamConfig(name='slope', optim=optim)
    trained = train(Slope(), images, lambda x, labels, g: Batch([x], label=labels), config, device='cpu')
    rates = [0.1 * 0.1 ** (step // 20) for step in range(10 * (42 // 8))]
    moved = sum(rate * (1 - 0.9 ** (step + 1)) / 0.1 for step, rate in enumerate(rates))
    assert trained.task.weight.item() == pytest.approx(-moved, rel=1e-5)


def test_lines_and_steps():
    optim = OptimConfig(epochs=10, warmup=2.0, lr=1.0, min_lr=0.2)
    line, cosine = optim.but(schedule='linear'), optim
    warmup = [learning_rate(line, step, 10) for step in range(20)]
    assert warmup == [learning_rate(cosine, step, 10) for step in range(20)]
    rates = [learning_rate(line, step, 10) for step in (20, 60, 99)]
    assert rates == pytest.approx([1.0, 0.6, 0.21])
    steps = optim.but(schedule='steps', step_epochs=3.0, warmup=0.0)
    rates = [learning_rate(steps, step, 10) for step in (29, 30, 60, 99)]
    assert rates == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_adamw_is_the_default():
    assert type(build_optimiser(Slope(), OptimConfig())).__name__ == 'AdamW'
    assert type(build_optimiser(Slope(), OptimConfig(optimiser='sgd'))).__name__ == 'SGD'

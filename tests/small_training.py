"""A training small enough for tests, with everything that a resume can get wrong: dropout, stochastic depth,
batch norm, random masks, noise from the loop's generator, and an EMA copy. As a program it trains into a
folder, with `small_training.py FOLDER [seconds a step] [steps a row]`."""

import sys
import time
from copy import deepcopy

import torch
from timm.layers import DropPath
from torch import nn

import mimstudy.engine.train as train_module
from mimstudy.core.task import Batch, Task
from mimstudy.engine.config import DataConfig, OptimConfig
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.train import train
from mimstudy.engine.training_config import DownstreamConfig

CONFIG = DownstreamConfig(
    name='small',
    data=DataConfig(dataset='noise', size=16),
    optim=OptimConfig(epochs=10, batch=8, lr=1e-2, warmup=1, warmup_start=0.1, clip=1.0),
)


def with_optim(**change):
    "The configuration with other values of the optimiser."
    return CONFIG.but(optim=change)


class SmallTask(Task):
    "Reconstruct the hidden quarter of an image's patches."

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(48, 32)
        self.norm = nn.BatchNorm1d(32)
        self.branch = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2))
        self.head = nn.Linear(32, 48)
        self.drop = DropPath(0.3)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 48))
        self.average = deepcopy(self.stem).requires_grad_(False)
        self.progress_values = []

    def forward(self, batch, progress):
        patches = batch.views[0].unfold(2, 4, 4).unfold(3, 4, 4)
        x = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B,16,48)
        z = self.stem(torch.where(batch.mask[..., None], self.mask_token, x))
        z = z + self.drop(self.branch(self.norm(z.flatten(0, 1)).view_as(z)))
        loss = ((self.head(z) - x) ** 2).mean() + 0.01 * (z - self.average(x)).abs().mean()
        return {'loss': loss, 'std': z.std()}

    def after_step(self, progress):
        self.progress_values.append(progress)
        for average, parameter in zip(self.average.parameters(), self.stem.parameters()):
            average.lerp_(parameter.detach(), 0.1)


def without_randomness(task):
    "The same task without stochastic depth and dropout."
    task.drop = nn.Identity()
    task.branch[2] = nn.Identity()
    return task


def training_images(n=42):
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return InMemoryDataset(pixels, torch.arange(n) % 3, list('abc'))


def make_batch(x, labels, generator):
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    mask = torch.rand(len(x), 16, generator=generator).to(x.device) < 0.25
    return Batch([x.float() / 255 + 0.1 * noise], mask, labels)


def slow_batch_function(seconds):
    "`make_batch`, with a pause."

    def slow(*args):
        time.sleep(seconds)
        return make_batch(*args)

    return slow


def main(folder, seconds='0', steps_per_row='1'):
    torch.set_num_threads(1)
    train_module.log_interval = lambda steps: int(steps_per_row)
    train(
        SmallTask(), training_images(), slow_batch_function(float(seconds)), CONFIG, folder, 3, device='cpu'
    )


if __name__ == '__main__':
    main(*sys.argv[1:])

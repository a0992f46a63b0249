"""A training small enough for tests, with everything that a resume can get wrong: dropout, stochastic depth, batch norm, random masks
and noise from the loop's generator, an EMA copy. Run as a program it trains into a folder: small_training.py FOLDER [seconds a step]."""

import sys
import time
from copy import deepcopy

import torch
from timm.layers import DropPath
from torch import nn

from mimstudy.core.task import Batch, Task
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.config import Recipe
from mimstudy.engine.train import train

RECIPE = Recipe(
    'small', data='noise', size=16, patch=4, epochs=10, batch=8, lr=1e-2, warmup=1, warmup_start=0.1, clip=1.0
)


class Small(Task):
    "Guess the hidden quarter of a image's colours."

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Linear(48, 32), nn.BatchNorm1d(32)
        self.branch, self.head = (
            nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2)),
            nn.Linear(32, 48),
        )
        self.drop, self.mask_token = DropPath(0.3), nn.Parameter(torch.zeros(1, 1, 48))
        self.slow = deepcopy(self.stem).requires_grad_(False)
        self.calls = []

    def forward(self, batch, progress):
        x = (
            batch.views[0].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        )  # (B,16,48)
        z = self.stem(torch.where(batch.mask[..., None], self.mask_token, x))
        z = z + self.drop(self.branch(self.norm(z.flatten(0, 1)).view_as(z)))
        return {
            'loss': ((self.head(z) - x) ** 2).mean() + 0.01 * (z - self.slow(x)).abs().mean(),
            'spread': z.std(),
        }

    def after_step(self, progress):
        self.calls.append(progress)
        for slow, fast in zip(self.slow.parameters(), self.stem.parameters()):
            slow.lerp_(fast.detach(), 0.1)


def images(n=42):
    g = torch.Generator().manual_seed(7)
    return InMemoryDataset(
        torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=g),
        torch.arange(n) % 3,
        list('abc'),
    )


def make_batch(x, labels, generator):
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return Batch(
        [x.float() / 255 + 0.1 * noise],
        torch.rand(len(x), 16, generator=generator).to(x.device) < 0.25,
        labels,
    )


def slowly(seconds):
    def slow_feed(*args):
        time.sleep(seconds)
        return make_batch(*args)

    return slow_feed


if __name__ == '__main__':
    torch.set_num_threads(1)
    train(
        Small(),
        images(),
        slowly(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0),
        RECIPE,
        sys.argv[1],
        seed=3,
        device='cpu',
    )

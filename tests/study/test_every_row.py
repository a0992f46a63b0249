"Every declared row of every table, at every scale: it is built, and one optimiser step is done."

import math

import pytest
import torch

from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.train import train
from mimstudy.papers.experiments import table_experiment
from mimstudy.papers.scales import SCALES
from mimstudy.papers.tables import TABLES
from mimstudy.study.build import build_batch_function, build_task, evaluated_encoder

IMAGES = 4  # one batch
CLASSES = 8


def trained_rows():
    "Scale and experiment of every different pre-training of all tables."
    found = {}
    for scale in SCALES:
        for table in TABLES.values():
            for row in table.measured:
                one = table_experiment(table, row.name, scale)
                if row.features == 'trained':
                    found.setdefault(one.train_id, one)
    return list(found.values())


def random_images(size):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), generator=generator, dtype=torch.uint8)
    return InMemoryDataset(pixels, torch.arange(IMAGES), [f'class {k}' for k in range(CLASSES)])


def short(config):
    "The same training with one step; the codes of k-means are fitted to few images."
    config = config.but(optim=dict(batch=IMAGES, epochs=1, warmup=0.0))
    return config.but(tokenizer=dict(kind='kmeans', codes=16)) if config.tokenizer else config


@pytest.mark.slow
@pytest.mark.parametrize('one', trained_rows(), ids=lambda one: f'{one.scale}-{one.name}')
def test_every_row_is_built_and_steps(one):
    config = short(one.config)
    images = random_images(config.data.size)
    task = build_task(config, images)
    before = [p.detach().clone() for p in task.encoder.parameters()]
    result = train(task, images, build_batch_function(config, images), config, device='cpu', precision='no')
    assert result.steps == 1 and all(map(math.isfinite, result.history.loss))
    assert any(not p.equal(old) for p, old in zip(task.encoder.parameters(), before))
    assert evaluated_encoder(config, task).P == config.encoder.prefix

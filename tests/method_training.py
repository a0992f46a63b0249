"""Trains every method for four steps on the same images, masks and views, whatever the number of processes.
As a program it writes losses and warnings, with `method_training.py FOLDER`; under torchrun, each process
trains on its part of every batch."""

import json
import sys
import warnings
from pathlib import Path

import torch
from test_contracts import DATASET, IMAGES, config_of
from torch import distributed

from mimstudy.core.errors import StudyError
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.train import train
from mimstudy.methods.catalogue import METHODS
from mimstudy.study.build import build_batch_function, build_task

N = 16  # images; a batch is half of them
NUMBERED = InMemoryDataset(IMAGES.images[:N], torch.arange(N), ['any'] * N)  # an image's label is its number


def rows_of(value, numbers):
    "The rows of a tensor that belong to these images; of one with two rows an image, both."
    if not torch.is_tensor(value) or len(value) % N:
        return value
    return value[torch.cat([numbers + N * i for i in range(len(value) // N)])]


def drawn_once(config):
    "A batch function whose masks and views are drawn once for all images, as in every process."
    generator = torch.Generator().manual_seed(0)
    whole = build_batch_function(config)(IMAGES.images[:N], IMAGES.label[:N], generator)

    def make_batch(images, numbers, generator):
        mask = whole.mask and type(whole.mask)(*(rows_of(field, numbers) for field in whole.mask))
        views = [rows_of(view, numbers) for view in whole.views]
        return whole._replace(views=views, mask=mask, label=rows_of(whole.label, numbers))

    return make_batch


def losses(name, out):
    "Losses and gradient norms of a method's four steps, and the warnings of its training."
    config = config_of(name).but(encoder=dict(drop_path=0.0), optim=dict(batch=N // 2, epochs=2))
    task = build_task(config, DATASET, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        history = train(task, NUMBERED, drawn_once(config), config, out, device='cpu', precision='no').history
    said = [str(one.message) for one in caught if 'whole batch' in str(one.message)]
    return dict(loss=history.loss.tolist(), grad_norm=history.grad_norm.tolist(), said=said)


def main(folder):
    torch.set_num_threads(1)
    found = {}
    for name in METHODS:
        try:
            found[name] = losses(name, Path(folder) / name)
        except StudyError as e:
            found[name] = dict(error=str(e))
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        (Path(folder) / 'losses.json').write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])

"SimMIM against the official code: features, reconstruction, loss and gradients."

import pytest
import torch
from conftest import assert_close, sub

from mimstudy.core.task import Batch
from mimstudy.methods.simmim import simmim
from mimstudy.parts.masks import make_mask
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.targets import unpatchify
from mimstudy.study.task_imports import load_official, task_tensors


@pytest.fixture(scope='module')
def case(golden):
    g = golden('simmim')
    task = simmim(RelativeEncoder(size=64, patch=16, width=32, depth=2, heads=4, mlp_ratio=2))
    load_official(task, sub(g, 'model.'))
    return g, task, Batch([g['images'].float()], make_mask(g['mask'].bool().flatten(1)))


def test_features_and_reconstruction(case):
    g, task, batch = case
    with torch.no_grad():
        hidden = task.pathway(batch.views[0], batch.mask)[:, 1:]
        assert_close(hidden.transpose(1, 2).reshape(2, 32, 4, 4), g['features'])
        assert_close(unpatchify(task.head(hidden), 16), g['reconstruction'])


def test_loss_and_gradients(case):
    """The official loss divides by the number of masked pixels plus 1e-5. There are thousands, so the
    difference is far below the tolerance."""
    g, task, batch = case
    task.zero_grad()
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['loss'])
    ours, theirs = dict(task.named_parameters()), task_tensors(sub(g, 'grad.'), task)
    assert len(theirs) == 4
    for name, grad in theirs.items():
        assert_close(ours[name].grad, grad)

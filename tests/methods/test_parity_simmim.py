"SimMIM against the official code: features, reconstruction, loss and gradients."

import pytest
import torch
from conftest import assert_close, sub

from mimstudy.core.task import Batch
from mimstudy.methods.simmim import simmim
from mimstudy.parts.masks import make_mask
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.targets import unpatchify


def by_pixel(w):
    """Rows of the official decoder, ordered by (colour, row, column) for a pixel shuffle, in the order of our
    patches: (row, column, colour)."""
    return w.view(3, 16, 16, -1).permute(1, 2, 0, 3).reshape(w.shape)


def translated(state):
    "Official names -> ours."
    ours = {}
    for name, value in state.items():
        if name == 'decoder.0.weight':
            ours['head.weight'] = by_pixel(value.flatten(1))  # of a 1 x 1 convolution
        elif name == 'decoder.0.bias':
            ours['head.bias'] = by_pixel(value)
        elif name == 'encoder.mask_token':
            ours['pathway.mask_token'] = value
        else:
            ours[f'pathway.{name}'] = value
    return ours


@pytest.fixture(scope='module')
def case(golden):
    g = golden('simmim')
    task = simmim(RelativeEncoder(size=64, patch=16, width=32, depth=2, heads=4, mlp_ratio=2))
    missing, unexpected = task.load_state_dict(translated(sub(g, 'model.')), strict=False)
    assert not unexpected and all(k.endswith(('relative_position_index', 'k_bias')) for k in missing)
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
    ours, theirs = dict(task.named_parameters()), translated(sub(g, 'grad.'))
    assert len(theirs) == 4
    for name, grad in theirs.items():
        assert_close(ours[name].grad, grad)

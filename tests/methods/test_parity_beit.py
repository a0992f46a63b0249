"""BEiT with mask tokens in place and relative positions against the official code: tokens, logits, loss and
every gradient."""

import pytest
import torch
from conftest import assert_close, sub

from mimstudy.core.task import Batch
from mimstudy.methods.beit import beit
from mimstudy.parts.masks import make_mask
from mimstudy.parts.pathways import Substitute
from mimstudy.parts.relative_encoder import RelativeEncoder


class StoredCodes(torch.nn.Module):
    "A tokenizer that returns stored codes."

    vocabulary, stride = 24, 8

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def codes(self, x):
        return self.ids.view(-1, 8, 8)


def translated(state):
    "Official names -> ours."
    ours = {}
    for name, value in state.items():
        if name == 'mask_token':
            ours['pathway.mask_token'] = value
        elif name.startswith('lm_head.'):
            ours[name.replace('lm_head.', 'head.')] = value
        else:
            ours[f'pathway.encoder.{name}'] = value
    return ours


@pytest.fixture(scope='module')
def case(golden):
    g = golden('beit')
    task = beit(
        RelativeEncoder(size=64, patch=8, width=32, depth=2, heads=4, mlp_ratio=2),
        StoredCodes(g['ids'].long()),
        pathway=Substitute,
    )
    missing, unexpected = task.load_state_dict(translated(sub(g, 'model.')), strict=False)
    assert not unexpected and all(k.endswith(('relative_position_index', 'k_bias')) for k in missing)
    return g, task, Batch([g['images'].float()], make_mask(g['mask'].bool().flatten(1)))


def test_tokens_and_logits(case):
    g, task, batch = case
    with torch.no_grad():
        hidden = task.pathway(batch.views[0], batch.mask)
        logits = task.predict(batch)
    assert_close(hidden, g['tokens'])
    if batch.mask.weight is not None:
        logits = logits[batch.mask.weight > 0]  # without the padding
    logits = logits.reshape(-1, StoredCodes.vocabulary)
    assert_close(logits, g['logits'])
    correct = logits.argmax(-1) == g['ids'].long()[batch.mask.hidden]
    assert_close(correct.float().mean(), g['mlm_acc'])


def test_loss_and_gradients(case):
    g, task, batch = case
    task.zero_grad()
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['loss'])
    ours, theirs = dict(task.named_parameters()), translated(sub(g, 'grad.'))
    assert len(theirs) == 39
    for name, grad in theirs.items():
        assert_close(ours[name].grad, grad)

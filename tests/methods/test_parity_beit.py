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
from mimstudy.study.task_imports import load_official, task_tensors


class StoredCodes(torch.nn.Module):
    "A tokenizer that returns stored codes."

    vocabulary, stride = 24, 8

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def codes(self, x):
        return self.ids.view(-1, 8, 8)


@pytest.fixture(scope='module')
def case(golden):
    g = golden('beit')
    task = beit(
        RelativeEncoder(size=64, patch=8, width=32, depth=2, heads=4, mlp_ratio=2),
        StoredCodes(g['ids'].long()),
        pathway=Substitute,
    )
    load_official(task, sub(g, 'model.'))
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
    ours, theirs = dict(task.named_parameters()), task_tensors(sub(g, 'grad.'), task)
    assert len(theirs) == 39
    for name, grad in theirs.items():
        assert_close(ours[name].grad, grad)

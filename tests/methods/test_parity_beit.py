"""BEiT's own pre-training (mask tokens in place, relative positions) against the official code: tokens,
logits, loss, every gradient."""

import pytest
import torch
from conftest import assert_close, sub
from mimstudy.core.task import Batch
from mimstudy.methods.beit import beit
from mimstudy.parts.masks import make_mask
from mimstudy.parts.pathways import Substitute
from mimstudy.parts.relative_encoder import RelativeEncoder


class Given(torch.nn.Module):
    "A tokenizer that knows its answers."

    vocabulary, stride = 24, 8

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def codes(self, x):
        return self.ids.view(-1, 8, 8)


def translated(state):
    "Official names -> ours; keys have no bias."
    return {
        (
            'pathway.' + k
            if k == 'mask_token'
            else k.replace('lm_head.', 'head.')
            if k.startswith('lm_head.')
            else 'pathway.encoder.' + k
        ): v
        for k, v in state.items()
    }


@pytest.fixture(scope='module')
def case(golden):
    g = golden('beit')
    task = beit(
        RelativeEncoder(size=64, patch=8, width=32, depth=2, heads=4, mlp_ratio=2),
        Given(g['ids'].long()),
        pathway=Substitute,
    )
    missing, unexpected = task.load_state_dict(translated(sub(g, 'model.')), strict=False)
    assert not unexpected and all(k.endswith(('relative_position_index', 'k_bias')) for k in missing)
    return g, task, Batch([g['images'].float()], make_mask(g['mask'].bool().flatten(1)))


def test_tokens_and_logits(case):
    g, task, batch = case
    with torch.no_grad():
        hidden, logits = task.pathway(batch.views[0], batch.mask), task.predict(batch)
    assert_close(hidden, g['tokens'])
    real = (
        torch.ones_like(batch.mask.predict).bool() if batch.mask.weight is None else batch.mask.weight.bool()
    )
    assert_close(logits[real], g['logits'])
    right = logits[real].argmax(-1) == g['ids'].long()[batch.mask.hidden]
    assert_close(right.float().mean(), g['mlm_acc'])


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

"""SemanticMIM on BEiT and on MaskFeat against the official code: hidden states, losses, every gradient,
features and attention."""

import pytest
import torch
from conftest import assert_close, sub
from torch import nn
from torch.nn.functional import layer_norm

from mimstudy.core.task import Batch
from mimstudy.parts.attention import attention
from mimstudy.parts.encoder import Encoder, block_features
from mimstudy.parts.heads import linear_head
from mimstudy.parts.losses import masked_ce, masked_mse
from mimstudy.parts.masks import make_mask
from mimstudy.parts.mim import MIM
from mimstudy.parts.proxy import Proxy
from mimstudy.study.task_imports import load_official, task_tensors

MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)
WIDTH = 32


class StoredTarget(nn.Module):
    "A target that returns stored values."

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, batch):
        return self.value


def official_mask(img_index, mask_index):
    return make_mask(~img_index.flatten(1), mask_index.flatten(1))


def build(g, head_name, out, target, criterion, **shape):
    "A task with the stored weights."
    encoder = Encoder(width=WIDTH, heads=4, prefix=8, mlp_ratio=2, **shape)
    pathway = Proxy(encoder)
    task = MIM(pathway, linear_head(pathway, out), target, criterion)
    official = {name: value for name, value in g.items() if name.startswith(('backbone.', head_name))}
    load_official(task, official)
    return task


@pytest.fixture(scope='module')
def beit(golden):
    g = golden('semanticmim_beit_k8')
    target = StoredTarget(g['target_ids'].flatten(1).long())
    shape = dict(size=64, patch=8, depth=3, layer_scale=0.1)
    return g, build(g, 'head.cls_head.', 24, target, masked_ce, **shape)


def without_key_bias(grad):
    "The gradient of a bias of queries, keys and values (3D), or of keys and values (2D), without the keys'."
    if len(grad) == 3 * WIDTH:
        return torch.cat([grad[:WIDTH], grad[2 * WIDTH :]])
    return grad[WIDTH:]


def check_gradients(task, g):
    official = task_tensors(sub(g, 'grad.'), task)
    no_key_bias = 'grad.backbone.layers.0.attn.v_bias' in g  # in the release of BEiT
    for name, p in task.named_parameters():
        ours, theirs = p.grad, official[name]
        if no_key_bias and name.endswith('kv.bias'):
            ours, theirs = without_key_bias(ours), without_key_bias(theirs)
        assert_close(ours, theirs, rel=1e-5)


def test_beit_hidden_loss_gradients(beit):
    g, task = beit
    batch = Batch([g['images'].float()], official_mask(g['img_index'], g['mask_index']))
    assert_close(task.pathway(batch.views[0], batch.mask), g['hidden'])
    assert_close(task.predict(batch), g['logits'])
    task.zero_grad()
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['loss'])
    check_gradients(task, g)


def test_beit_separate_masks(beit):
    g, task = beit
    batch = Batch([g['images'].float()], official_mask(g['sep_img_index'], g['sep_mask_index']))
    assert_close(task.pathway(batch.views[0], batch.mask), g['sep_hidden'])
    assert_close(task(batch, 0.0)['loss'].detach(), g['sep_loss'])


@torch.no_grad()
def test_beit_full_features_and_attention(beit):
    g, task = beit
    encoder, x = task.encoder.eval(), g['images'].float()

    def probe_norm(features):
        return layer_norm(features, (WIDTH,), g['probe.ln2.weight'], g['probe.ln2.bias'], 1e-6)

    for i, (prefix, patches) in enumerate(block_features(encoder, x)):
        out = torch.cat([prefix, patches], 1)
        assert_close(encoder.norm(out) if i == 2 else out, g[f'full.block_{i}'])
        assert_close(probe_norm(patches.mean(1)), g[f'full.avg_{i}'])
        assert_close(probe_norm(prefix.mean(1)), g[f'full.cls_{i}'])
    assert_close(attention(encoder, x[:1]), g['full.attn_last'])


def test_maskfeat_hidden_loss_gradients(golden):
    g = golden('semanticmim_maskfeat_k8')
    mask = official_mask(g['img_index'], g['mask_index'])
    target = torch.zeros(2, 196, 108)  # the file holds the rows of the predicted patches
    target.scatter_(1, mask.predict[..., None].expand(-1, -1, 108), g['target'])
    shape = dict(size=224, patch=16, depth=2, layer_scale=None)
    task = build(g, 'neck.fc.', 108, StoredTarget(target), masked_mse, **shape)
    x = (g['images_u8'].float() - MEAN) / STD
    batch = Batch([x], mask)
    assert_close(task.pathway(x, mask), g['hidden'])
    assert_close(task.predict(batch), g['pred'])
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['loss'])
    check_gradients(task, g)
    with torch.no_grad():
        assert_close(task.encoder.eval().forward_features(x[:1]), g['full.block_1'])


def test_layer_norm_constants(beit):
    _, task = beit
    assert {m.eps for m in task.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

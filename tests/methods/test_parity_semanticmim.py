"""SemanticMIM on BEiT and on MaskFeat against the official code: hidden states, losses, every gradient,
features, attention."""

import pytest
import torch
from conftest import assert_close, sub
from official import semanticmim
from torch import nn

from mimstudy.parts.encoder import Encoder, attention, block_features
from mimstudy.parts.heads import linear_head
from mimstudy.parts.losses import masked_ce, masked_mse
from mimstudy.parts.masks import make_mask
from mimstudy.parts.mim import MIM
from mimstudy.parts.proxy import Proxy
from mimstudy.core.task import Batch

MEAN, STD = (
    torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1),
    torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1),
)


class Given(nn.Module):
    "A target that was computed elsewhere."

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, batch):
        return self.value


def official_mask(img_index, mask_index):
    return make_mask(~img_index.flatten(1), mask_index.flatten(1))


def task_from(g, size, patch, depth, scale, head_name, classes, target, criterion):
    encoder = Encoder(
        size=size, patch=patch, width=32, depth=depth, heads=4, prefix=8, layer_scale=scale, mlp_ratio=2
    )
    path = Proxy(encoder)
    task = MIM(path, linear_head(path, classes), target, criterion)
    state, blocks, token = semanticmim(sub(g, 'backbone.'))
    encoder.load_state_dict(state)
    task.pathway.blocks.load_state_dict(blocks)
    task.pathway.mask_token.data.copy_(token)
    task.head.load_state_dict(sub(g, head_name))
    return task


@pytest.fixture(scope='module')
def beit(golden):
    g = golden('semanticmim_beit_k8')
    return g, task_from(
        g, 64, 8, 3, 0.1, 'head.cls_head.', 24, Given(g['target_ids'].flatten(1).long()), masked_ce
    )


def check_gradients(task, g, head_name):
    state, blocks, token = semanticmim(sub(g, 'grad.backbone.'))
    for name, p in task.encoder.named_parameters():
        grad, want = p.grad, state[name]
        if (
            name.endswith('qkv.bias') and 'grad.backbone.layers.0.attn.v_bias' in g
        ):  # the release has no bias on the keys; its gradient is 0
            D = len(want) // 3
            grad, want = torch.cat([grad[:D], grad[2 * D :]]), torch.cat([want[:D], want[2 * D :]])
        assert_close(grad, want, rel=1e-5)
    for name, p in task.pathway.blocks.named_parameters():
        grad, want = p.grad, blocks[name]
        if name.endswith('kv.bias') and 'grad.backbone.extra_layers.0.attn.v_bias' in g:
            grad, want = grad[len(want) // 2 :], want[len(want) // 2 :]
        assert_close(grad, want, rel=1e-5)
    assert_close(task.pathway.mask_token.grad, token, rel=1e-5)
    for name, p in task.head.named_parameters():
        assert_close(p.grad, g[f'grad.{head_name}{name}'], rel=1e-5)


def test_beit_hidden_loss_gradients(beit):
    g, task = beit
    batch = Batch([g['images'].float()], official_mask(g['img_index'], g['mask_index']))
    assert_close(task.pathway(batch.views[0], batch.mask), g['hidden'])
    assert_close(task.predict(batch), g['logits'])
    task.zero_grad()
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['loss'])
    check_gradients(task, g, 'head.cls_head.')


def test_beit_separate_masks(beit):
    g, task = beit
    batch = Batch([g['images'].float()], official_mask(g['sep_img_index'], g['sep_mask_index']))
    assert_close(task.pathway(batch.views[0], batch.mask), g['sep_hidden'])
    assert_close(task(batch, 0.0)['loss'].detach(), g['sep_loss'])


@torch.no_grad()
def test_beit_full_features_and_attention(beit):
    g, task = beit
    encoder, x = task.encoder.eval(), g['images'].float()
    norm = lambda t: nn.functional.layer_norm(t, (32,), g['probe.ln2.weight'], g['probe.ln2.bias'], 1e-6)
    for i, (prefix, patches) in enumerate(block_features(encoder, x)):
        out = torch.cat([prefix, patches], 1)
        assert_close(encoder.norm(out) if i == 2 else out, g[f'full.block_{i}'])
        assert_close(norm(patches.mean(1)), g[f'full.avg_{i}'])
        assert_close(norm(prefix.mean(1)), g[f'full.cls_{i}'])
    assert_close(attention(encoder, x[:1]), g['full.attn_last'])


def test_maskfeat_hidden_loss_gradients(golden):
    g = golden('semanticmim_maskfeat_k8')
    mask = official_mask(g['img_index'], g['mask_index'])
    full = torch.zeros(2, 196, 108).scatter_(1, mask.predict[..., None].expand(-1, -1, 108), g['target'])
    task = task_from(g, 224, 16, 2, None, 'neck.fc.', 108, Given(full), masked_mse)
    x = (g['images_u8'].float() - MEAN) / STD
    batch = Batch([x], mask)
    assert_close(task.pathway(x, mask), g['hidden'])
    assert_close(task.predict(batch), g['pred'])
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert_close(loss.detach(), g['loss'])
    check_gradients(task, g, 'neck.fc.')
    with torch.no_grad():
        assert_close(task.encoder.eval().forward_features(x[:1]), g['full.block_1'])


def test_layer_norm_constants(beit):
    _, task = beit
    assert {m.eps for m in task.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

"ConMIM's loss against the official training loop, and position embeddings against the official resizing."

import math

import pytest
import torch
from conftest import assert_close
from mimstudy.parts.losses import patch_contrast, position_contrast
from mimstudy.parts.masks import gather, make_mask, random_mask
from mimstudy.parts.position_embedding import resize_positions, resize_relative_table, sincos_positions


@pytest.mark.parametrize('tau', [5, 7, 10, 15, 20])
def test_conmim_loss(golden, tau):
    g = golden('conmim_loss')
    feats, keys = g['feats'].float().requires_grad_(), g['keys'].float().requires_grad_()
    mask = make_mask(g['mask'])
    loss = patch_contrast(gather(feats, mask.predict), keys, mask, tau / 100)
    loss.backward()
    assert_close(loss.detach(), g[f'loss.t{tau:03}'])
    assert_close(feats.grad, g[f'grad_feats.t{tau:03}'])
    assert keys.grad is None


def test_conmim_loss_by_loops(golden):
    "Eq. (3) written out, patch by patch."
    g = golden('conmim_loss')
    feats, keys, mask = g['feats'].float(), g['keys'].float(), g['mask']
    f, k = (t / t.norm(dim=-1, keepdim=True) for t in (feats, keys))
    terms = [
        -(
            (f[b, j] @ k[b, j]) / 0.1
            - torch.logsumexp(torch.stack([f[b, j] @ k[b, i] for i in range(196)]) / 0.1, 0)
        )
        for b in range(3)
        for j in range(0, 196)
        if mask[b, j]
    ]
    assert_close(torch.stack(terms).mean(), g['loss.t010'])


@pytest.mark.parametrize(
    'name, source, target, prefix',
    [
        ('k8_28x28', 'pos_embed_k8_14', (28, 28), 8),
        ('k8_7x7', 'pos_embed_k8_14', (7, 7), 8),
        ('k8_10x12', 'pos_embed_k8_14', (10, 12), 8),
        ('k1_9x9', 'pos_embed_k1_6', (9, 9), 1),
        ('k1_6x6', 'pos_embed_k1_6', (6, 6), 1),
    ],
)
def test_absolute_positions(golden, name, source, target, prefix):
    g = golden('pos_embed')
    side = 14 if prefix == 8 else 6
    assert_close(resize_positions(g[source], (side, side), target, prefix), g[name])


@pytest.mark.parametrize('kind', ['smooth', 'random'])
@pytest.mark.parametrize('side', [24, 20])
def test_relative_tables(golden, kind, side):
    g = golden('pos_embed')
    assert_close(resize_relative_table(g[f'relpos_{kind}_src14'], 14, side), g[f'relpos_{kind}_dst{side}'])


def test_fixed_positions(golden):
    assert_close(sincos_positions(32, (8, 8))[0], golden('mae')['sincos_32_g8'])
    assert_close(sincos_positions(32, (8, 8), first='row'), golden('mocov3')['sincos_32_g8'])


def test_what_position_alone_tells():
    "Keys that depend on the position only are found by position; keys that depend on the image only are not."
    mask = random_mask(6, (4, 4), 0.5, torch.Generator().manual_seed(0))
    position = torch.eye(16).expand(6, -1, -1)
    asked = gather(position, mask.predict)
    by_position = position_contrast(asked, position, mask, 0.1)
    assert torch.isclose(by_position, patch_contrast(asked, position, mask, 0.1))
    image = torch.randn(6, 1, 16).expand(-1, 16, -1)
    chance = position_contrast(gather(image, mask.predict), image, mask, 0.1)
    assert abs(chance - math.log(16)) < 1e-5

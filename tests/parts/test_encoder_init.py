"""Initialisation against the official one: standard deviations and parameter counts.

Standard deviations agree within 3 %, or within four standard errors for parameters with few entries.
"""

import pytest
import torch
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.heads import Projector, linear_head
from mimstudy.parts.pathways import Substitute
from mimstudy.parts.proxy import Proxy
from mimstudy.parts.relative_encoder import RelativeEncoder


def check(parameters, stats, our_name):
    "Compare every official parameter that has a name here; returns the number of comparisons."
    compared = 0
    for name, expected in stats.items():
        ours = our_name(name)
        if ours is None:
            continue
        p = parameters[ours].detach()
        if expected['std'] < 1e-5:
            assert p.std() < 1e-4, name
            assert abs(p.mean() - expected['mean']) < 1e-3, name
        else:
            percent = max(3, 400 * (2 * p.numel()) ** -0.5)
            ratio = p.std().item() / expected['std']
            assert abs(ratio - 1) < percent / 100, (name, p.std().item(), expected['std'])
            if 'pretrain' in name or expected['absmax'] < 0.021:
                assert p.abs().max() <= 0.0201, name
        compared += 1
    return compared


def conmim_name(name):
    "Official name -> ours; None for parameters outside the encoder."
    return None if name.startswith('lm_head') or name == 'mask_token' else name


def test_conmim(golden):
    torch.manual_seed(0)
    encoder = RelativeEncoder(size=224, patch=16, width=192, depth=12, heads=3)
    stats = golden('init_stats.json')['conmim_pretrain_192x12']
    of_head = {k.removeprefix('projectors.'): v for k, v in stats.items() if k.startswith('projectors')}
    of_encoder = {k: v for k, v in stats.items() if not k.startswith('projectors')}
    assert check(dict(encoder.named_parameters()), of_encoder, conmim_name) > 25
    head = Projector(encoder)
    assert check(dict(head.named_parameters()), of_head, lambda name: name) == 7
    token = Substitute(encoder).mask_token
    assert abs(token.std() / stats['mask_token']['std'] - 1) < 0.1
    assert token.abs().max() <= 0.02


def semanticmim_name(name):
    "Official name -> ours; None for queries, keys and values, which are one matrix here."
    replacements = {
        'ffn.layers.0.0': 'mlp.fc1',
        'ffn.layers.1': 'mlp.fc2',
        'extra_layers.': 'blocks.',
        'ln1.': 'norm1.',
        'ln2.': 'norm2.',
        'gamma_1': 'ls1.gamma',
        'gamma_2': 'ls2.gamma',
        'patch_embed.projection': 'encoder.patch_embed.proj',
    }
    for official, ours in replacements.items():
        name = name.replace(official, ours)
    if name.startswith('layers.'):
        name = 'encoder.blocks.' + name.removeprefix('layers.')
    if name.startswith('norm1.'):
        return 'encoder.norm.' + name.removeprefix('norm1.')
    if name == 'pos_embed':
        return 'encoder.pos_embed'
    if name == 'cls_token' or '.attn.q' in name or '.attn.kv' in name or '.attn.v_bias' in name:
        return None
    return name


@pytest.mark.parametrize('method, scale', [('beit', 0.1), ('maskfeat', None)])
def test_semanticmim(golden, method, scale):
    torch.manual_seed(0)
    pathway = Proxy(Encoder(224, 16, 192, 12, 3, prefix=8, layer_scale=scale, init=method))
    stats = golden('init_stats.json')[f'semanticmim_{method}_deit_tiny_k8']
    assert check(dict(pathway.named_parameters()), stats, semanticmim_name) > 40
    for i in (0, 11):
        compression, reconstruction = pathway.encoder.blocks[i].attn, pathway.blocks[i].attn
        for layer in (compression.qkv, reconstruction.q, reconstruction.kv):
            assert abs(layer.weight.std() / 0.02 - 1) < 0.03
            assert layer.bias.abs().max() == 0
    tokens = torch.cat([pathway.encoder.cls_token, pathway.encoder.reg_token], 1)
    assert tokens.shape == (1, 8, 192)
    assert abs(tokens.std() / stats['cls_token']['std'] - 1) < 0.12
    head = linear_head(pathway, 108)
    assert abs(head.weight.std() / 0.02 - 1) < 0.03
    assert head.bias.abs().max() == 0


def count(module):
    "Number of parameters."
    return sum(p.numel() for p in module.parameters())


@pytest.mark.slow
def test_parameter_counts(golden):
    "ViT-B as the releases count it, plus the biases of the keys, which have no effect on the output."
    expected = golden('init_stats.json')['param_counts_vit_b']
    maskfeat = Proxy(Encoder(prefix=8, init='maskfeat'))
    assert count(maskfeat) == expected['maskfeat_k8_bottleneck_True']
    beit = Proxy(Encoder(prefix=8, layer_scale=0.1, init='beit'))
    assert count(beit) == expected['beit_k8_bottleneck_True'] + 24 * 768
    baseline = Substitute(Encoder(init='maskfeat'))
    assert count(baseline) == expected['maskfeat_k1_bottleneck_False']
    encoder = RelativeEncoder()
    conmim = count(Substitute(encoder)) + count(Projector(encoder))
    assert conmim == expected['conmim_base_total'] - expected['conmim_base_lm_head_unused']

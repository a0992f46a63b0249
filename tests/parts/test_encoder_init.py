"Initial values against the official ones: standard deviations within 3 % (four standard errors where the numbers are few), and parameter counts."

import pytest
import torch
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.heads import Projector, linear_head
from mimstudy.parts.pathways import Substitute
from mimstudy.parts.proxy import Proxy
from mimstudy.parts.relative_encoder import RelativeEncoder


def check(ours, stats, rename, skip=()):
    "Compare every official parameter that has a name here; returns how many were compared."
    done = 0
    for name, want in stats.items():
        mine = rename(name)
        if mine is None or name in skip:
            continue
        p = ours[mine].detach()
        if want['std'] < 1e-5:
            assert p.std() < 1e-4 and abs(p.mean() - want['mean']) < 1e-3, name
        else:
            few = max(3, 400 * (2 * p.numel()) ** -0.5)  # four standard errors, where the numbers are few
            assert abs(p.std().item() / want['std'] - 1) < few / 100, (name, p.std().item(), want['std'])
            if 'pretrain' in name or want['absmax'] < 0.021:
                assert p.abs().max() <= 0.0201
        done += 1
    return done


def conmim_name(k):
    if k.startswith('lm_head') or k == 'mask_token':
        return None
    return k


def test_conmim(golden):
    torch.manual_seed(0)
    encoder = RelativeEncoder(size=224, patch=16, width=192, depth=12, heads=3)
    stats = golden('init_stats.json')['conmim_pretrain_192x12']
    assert (
        check(
            dict(encoder.named_parameters()),
            {k: v for k, v in stats.items() if not k.startswith('projectors')},
            conmim_name,
        )
        > 25
    )
    head = Projector(encoder)
    assert (
        check(
            dict(head.named_parameters()),
            {k.removeprefix('projectors.'): v for k, v in stats.items() if k.startswith('projectors')},
            lambda k: k,
        )
        == 7
    )
    token = Substitute(encoder).mask_token
    assert abs(token.std() / stats['mask_token']['std'] - 1) < 0.1 and token.abs().max() <= 0.02


def semanticmim_name(k):
    "Official names -> ours; None for those that are joined here into one matrix of queries, keys and values."
    for a, b in (
        ('ffn.layers.0.0', 'mlp.fc1'),
        ('ffn.layers.1', 'mlp.fc2'),
        ('extra_layers.', 'blocks.'),
        ('ln1.', 'norm1.'),
        ('ln2.', 'norm2.'),
        ('gamma_1', 'ls1.gamma'),
        ('gamma_2', 'ls2.gamma'),
        ('patch_embed.projection', 'encoder.patch_embed.proj'),
    ):
        k = k.replace(a, b)
    if k.startswith('layers.'):
        k = 'encoder.blocks.' + k.removeprefix('layers.')
    if k.startswith('norm1.'):
        return 'encoder.norm.' + k.removeprefix('norm1.')
    if k == 'pos_embed':
        return 'encoder.pos_embed'
    if k == 'cls_token' or '.attn.q' in k or '.attn.kv' in k or '.attn.v_bias' in k:
        return None
    return k


@pytest.mark.parametrize('method, scale', [('beit', 0.1), ('maskfeat', None)])
def test_semanticmim(golden, method, scale):
    torch.manual_seed(0)
    pathway = Proxy(Encoder(224, 16, 192, 12, 3, prefix=8, layer_scale=scale, init=method))
    stats = golden('init_stats.json')[f'semanticmim_{method}_deit_tiny_k8']
    assert check(dict(pathway.named_parameters()), stats, semanticmim_name) > 40
    for i in (0, 11):
        for ours in (pathway.encoder.blocks[i].attn.qkv, pathway.blocks[i].attn.q, pathway.blocks[i].attn.kv):
            assert abs(ours.weight.std() / 0.02 - 1) < 0.03 and ours.bias.abs().max() == 0
    tokens = torch.cat([pathway.encoder.cls_token, pathway.encoder.reg_token], 1)
    assert tokens.shape == (1, 8, 192) and abs(tokens.std() / stats['cls_token']['std'] - 1) < 0.12
    head = linear_head(pathway, 108)
    assert abs(head.weight.std() / 0.02 - 1) < 0.03 and head.bias.abs().max() == 0


@pytest.mark.slow
def test_parameter_counts(golden):
    "ViT-B as the releases count it; here each attention also has a bias on its keys, which changes nothing that is computed."
    want, count = (
        golden('init_stats.json')['param_counts_vit_b'],
        lambda m: sum(p.numel() for p in m.parameters()),
    )
    assert count(Proxy(Encoder(prefix=8, init='maskfeat'))) == want['maskfeat_k8_bottleneck_True']
    assert (
        count(Proxy(Encoder(prefix=8, layer_scale=0.1, init='beit')))
        == want['beit_k8_bottleneck_True'] + 24 * 768
    )
    assert count(Substitute(Encoder(init='maskfeat'))) == want['maskfeat_k1_bottleneck_False']
    encoder = RelativeEncoder()
    assert (
        count(Substitute(encoder)) + count(Projector(encoder))
        == want['conmim_base_total'] - want['conmim_base_lm_head_unused']
    )

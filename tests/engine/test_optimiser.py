"Parameter groups against the releases' own: every name with its weight decay and its share of the learning rate."

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mimstudy.core.errors import StudyError
from mimstudy.engine.optimiser import build_optimiser, decay_groups, layer_of
from mimstudy.engine.config import Recipe

SPARED = ('cls_token', 'reg_token', 'pos_embed')
STEM = r'^(?:backbone\.)?(?:cls_token|pos_embed|patch_embed|mask_token)'


class Named(nn.Module):
    "A module that has parameters of given names and dimensions, and a timm-like matcher of layers."

    def __init__(self, names, blocks=r'^(?:backbone\.)?(?:blocks|layers)\.(\d+)'):
        super().__init__()
        self.values, self.matcher = (
            {name: nn.Parameter(torch.zeros((2,) * ndim(name))) for name in names},
            dict(stem=STEM, blocks=blocks),
        )

    def named_parameters(self):
        yield from self.values.items()

    def group_matcher(self, coarse=False):
        return self.matcher


def ndim(name):
    "How many dimensions a parameter of the releases has, as far as decay is concerned."
    parts = name.split('.')
    if (
        parts[-1].endswith('bias')
        or parts[-1].startswith('gamma')
        or {'norm', 'norm1', 'norm2', 'fc_norm', 'ln1', 'ln2'} & set(parts)
    ):
        return 1
    if name.startswith(('projectors.1.', 'projectors.4.')):
        return 1  # its batch norms
    return (
        4 if 'patch_embed' in parts else 3 if parts[-1].endswith('token') or parts[-1] == 'pos_embed' else 2
    )


def table(module, **options):
    "name -> (weight decay, share of the learning rate)"
    names = {p: name for name, p in module.named_parameters()}
    return {
        names[p]: (g['weight_decay'], g.get('lr_scale', 1.0))
        for g in decay_groups(module, 0.05, **options)
        for p in g['params']
    }


def theirs(golden, name):
    "The same from the golden file, whose two halves are written in two forms."
    found = golden('param_groups.json')[name]
    if 'params' in next(iter(found.values())):
        return {n: (g['weight_decay'], g['lr_scale']) for g in found.values() for n in g['params']}
    return {n: (v['weight_decay'], v['lr_scale']) for n, v in found.items()}


@pytest.mark.parametrize(
    'name, no_decay',
    [
        ('conmim_pretrain', SPARED),
        ('conmim_pretrain_abs_pos', SPARED),
        ('semanticmim_beit_pretrain', SPARED),
        ('semanticmim_maskfeat_pretrain', ('mask_token',)),
    ],
)
def test_pretraining_groups(golden, name, no_decay):
    expected = theirs(golden, name)
    assert table(Named(expected), no_decay=no_decay) == expected


@pytest.mark.parametrize(
    'name, decay',
    [
        ('finetune_vit_b_0.65', 0.65),
        ('finetune_vit_s_0.8', 0.8),
        ('semanticmim_beit_finetune', 0.65),
        ('semanticmim_maskfeat_finetune', 0.65),
    ],
)
def test_finetuning_groups(golden, name, decay):
    expected = theirs(golden, name)
    ours = table(Named(expected), no_decay=SPARED, layer_decay=decay)
    assert {n: weight_decay for n, (weight_decay, _) in ours.items()} == {
        n: weight_decay for n, (weight_decay, _) in expected.items()
    }
    for parameter, (_, scale) in expected.items():
        assert abs(ours[parameter][1] - scale) < 6e-11, parameter  # the file has ten decimals


def test_layers_of_a_real_encoder(golden):
    "timm's own twelve blocks, inside a task with a head, have the layers of the release."

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = VisionTransformer(
                img_size=32,
                patch_size=8,
                embed_dim=24,
                depth=12,
                num_heads=2,
                reg_tokens=7,
                num_classes=0,
                global_pool='avg',
            )
            self.head = nn.Linear(24, 5)

    expected, layers = golden('param_groups.json')['layer_id_of'], layer_of(Task())
    for name in (
        'cls_token',
        'pos_embed',
        'patch_embed.proj.weight',
        'blocks.0.attn.qkv.weight',
        'blocks.11.mlp.fc2.bias',
        'fc_norm.weight',
    ):
        assert layers[f'encoder.{name}'] == expected[name], name
    assert layers['head.weight'] == expected['head.weight'] and layers['encoder.reg_token'] == 0


def test_frozen_parameters_are_in_no_group():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert sum(len(g['params']) for g in decay_groups(module, 0.05)) == 2


def test_no_encoder_no_layers():
    with pytest.raises(StudyError, match='Linear holds no encoder'):
        decay_groups(nn.Linear(2, 2), 0.05, layer_decay=0.65)


def test_fused_adamw_is_adamw():
    "Ten steps of the optimiser equal ten steps of the textbook's equations in float64."
    torch.manual_seed(0)
    recipe = Recipe(betas=(0.9, 0.98), lr=1e-2)
    line = nn.Linear(4, 3)
    w, x = line.weight.detach().double().clone(), torch.randn(8, 4)
    m, v, optimiser = torch.zeros_like(w), torch.zeros_like(w), build_optimiser(line, recipe)
    for step in range(1, 11):
        optimiser.zero_grad()
        line(x).square().sum().backward()
        g = line.weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w = w * (1 - recipe.lr * recipe.weight_decay) - recipe.lr * (m / (1 - 0.9**step)) / (
            (v / (1 - 0.98**step)).sqrt() + recipe.eps
        )
        optimiser.step()
        assert (line.weight.double() - w).abs().max() < 1e-6

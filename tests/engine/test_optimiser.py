"Parameter groups of the releases: weight decay and learning rate factor of each parameter; and AdamW itself."

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mimstudy.core.errors import StudyError
from mimstudy.engine.config import OptimConfig
from mimstudy.engine.optimiser import build_optimiser, clip_each, decay_groups, layer_of
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.finetuning import prepare_finetuning

NO_DECAY = ('cls_token', 'reg_token', 'pos_embed')
STEM = r'^(?:backbone\.)?(?:cls_token|pos_embed|patch_embed|mask_token)'
BLOCKS = r'^(?:backbone\.)?(?:blocks|layers)\.(\d+)'


class NamedParameters(nn.Module):
    "A module that has parameters of given names and dimensions, and a timm-like matcher of layers."

    def __init__(self, names):
        super().__init__()
        self.values = {name: nn.Parameter(torch.zeros((2,) * dimensions(name))) for name in names}

    def named_parameters(self):
        yield from self.values.items()

    def group_matcher(self, coarse=False):
        return dict(stem=STEM, blocks=BLOCKS)


def dimensions(name):
    "The number of dimensions that a parameter of the releases has, as far as weight decay is concerned."
    parts = name.split('.')
    is_norm = bool({'norm', 'norm1', 'norm2', 'fc_norm', 'ln1', 'ln2'} & set(parts))
    is_batch_norm = name.startswith(('projectors.1.', 'projectors.4.'))
    if is_norm or is_batch_norm or parts[-1].endswith('bias') or parts[-1].startswith('gamma'):
        return 1
    if 'patch_embed' in parts:
        return 4
    if parts[-1].endswith('token') or parts[-1] == 'pos_embed':
        return 3
    return 2


def table(module, **options):
    "name -> (weight decay, learning rate factor)"
    names = {p: name for name, p in module.named_parameters()}
    found = {}
    for group in decay_groups(module, 0.05, **options):
        for p in group['params']:
            found[names[p]] = (group['weight_decay'], group.get('lr_scale', 1.0))
    return found


def of_release(golden, name):
    "The same from the golden file, whose two halves have different forms."
    groups = golden('param_groups.json')[name].items()
    found = {}
    for key, group in groups:
        for parameter in group.get('params', [key]):
            found[parameter] = (group['weight_decay'], group['lr_scale'])
    return found


@pytest.mark.parametrize(
    'name, no_decay',
    [
        ('conmim_pretrain', NO_DECAY),
        ('conmim_pretrain_abs_pos', NO_DECAY),
        ('semanticmim_beit_pretrain', NO_DECAY),
        ('semanticmim_maskfeat_pretrain', ('mask_token',)),
    ],
)
def test_pretraining_groups(golden, name, no_decay):
    expected = of_release(golden, name)
    assert table(NamedParameters(expected), no_decay=no_decay) == expected


@pytest.mark.parametrize(
    'name, layer_decay',
    [
        ('finetune_vit_b_0.65', 0.65),
        ('finetune_vit_s_0.8', 0.8),
        ('semanticmim_beit_finetune', 0.65),
        ('semanticmim_maskfeat_finetune', 0.65),
    ],
)
def test_finetuning_groups(golden, name, layer_decay):
    expected = of_release(golden, name)
    ours = table(NamedParameters(expected), no_decay=NO_DECAY, layer_decay=layer_decay)
    assert ours.keys() == expected.keys()
    for parameter, (weight_decay, factor) in expected.items():
        assert ours[parameter][0] == weight_decay, parameter
        assert abs(ours[parameter][1] - factor) < 6e-11, parameter  # the file has ten decimals


class Classifier(nn.Module):
    "An encoder of twelve blocks and a linear head."

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


def test_layers_of_a_timm_encoder(golden):
    "timm's twelve blocks, inside a task with a head, have the layers of the release."
    expected = golden('param_groups.json')['layer_id_of']
    layers = layer_of(Classifier())
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


@pytest.mark.parametrize(
    'name, tokens',
    [
        ('vit_small_patch14_reg4_dinov2', ['cls_token', 'reg_token', 'pos_embed']),
        ('vit_small_patch16_dinov3', ['cls_token', 'reg_token']),
        ('deit_tiny_distilled_patch16_224', ['cls_token', 'dist_token', 'pos_embed']),
        ('beit_base_patch16_224', ['cls_token']),
    ],
)
@pytest.mark.parametrize('stem', [None, r'^patch_embed', r'^cls_token|pos_embed|patch_embed'])
def test_all_tokens_of_the_input_have_one_learning_rate(name, tokens, stem):
    "Whatever timm's own matcher of layers names, in this version or an earlier one."
    small = dict(img_size=56, patch_size=14, embed_dim=12, depth=3, num_heads=1, num_classes=5)
    encoder = timm.create_model(name, **small)
    if stem:
        blocks = [(r'^blocks\.(\d+)', None), (r'^norm', (99999,))]
        encoder.group_matcher = lambda coarse: dict(stem=stem, blocks=blocks)
    assert {layer_of(encoder)[token] for token in tokens} == {0}
    scales = {factor for token in tokens for _, factor in [table(encoder, layer_decay=0.5)[token]]}
    assert scales == {0.5**4}


def test_proxies_of_a_fine_tuned_encoder_have_the_learning_rate_of_the_class_token():
    encoder = prepare_finetuning(Encoder(size=16, patch=8, width=8, depth=2, heads=1, prefix=8))
    found = table(encoder, layer_decay=0.65)
    assert found['cls_token'] == found['reg_token'] == found['pos_embed'] == (0.0, 0.65**3)


def test_exempt_parameters_are_exempt_wherever_they_lie():
    module = nn.ModuleDict({'encoder': Encoder(size=16, patch=8, width=8, depth=1, heads=1, prefix=2)})
    found = table(module, no_decay=('cls_token', 'pos_embed'))
    decays = {name.split('.')[-1]: decay for name, (decay, _) in found.items() if 'blocks' not in name}
    assert decays['cls_token'] == decays['pos_embed'] == 0 and decays['reg_token'] == 0.05


def test_frozen_parameters_are_in_no_group():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert sum(len(group['params']) for group in decay_groups(module, 0.05)) == 2


def test_layer_decay_needs_an_encoder():
    with pytest.raises(StudyError, match='Linear contains no timm encoder'):
        decay_groups(nn.Linear(2, 2), 0.05, layer_decay=0.65)


def test_adamw_against_its_equations():
    "Ten steps of the fused optimiser equal ten steps of the equations in float64."
    torch.manual_seed(0)
    optim = OptimConfig(betas=(0.9, 0.98), lr=1e-2)
    linear = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    optimiser = build_optimiser(linear, optim)
    weight = linear.weight.detach().double().clone()
    mean = torch.zeros_like(weight)
    square = torch.zeros_like(weight)
    for step in range(1, 11):
        optimiser.zero_grad()
        linear(x).square().sum().backward()
        gradient = linear.weight.grad.double()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.98 * square + 0.02 * gradient**2
        direction = (mean / (1 - 0.9**step)) / ((square / (1 - 0.98**step)).sqrt() + optim.eps)
        weight = weight * (1 - optim.lr * optim.weight_decay) - optim.lr * direction
        optimiser.step()
        assert (linear.weight.double() - weight).abs().max() < 1e-6


def test_sgd_against_its_equations():
    optim = OptimConfig(optimiser='sgd', lr=0.1, weight_decay=0.0)
    linear = nn.Linear(4, 3)
    weight = linear.weight.detach().clone()
    optimiser = build_optimiser(linear, optim)
    velocity = torch.zeros_like(weight)
    for _ in range(3):
        optimiser.zero_grad()
        linear(torch.ones(1, 4)).square().sum().backward()
        velocity = 0.9 * velocity + linear.weight.grad
        weight = weight - 0.1 * velocity
        optimiser.step()
        torch.testing.assert_close(linear.weight.detach(), weight)


def test_clip_each_tensor():
    parameters = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    for scale, p in zip((0.01, 1.0, 10.0), parameters[:2]):
        p.grad = scale * torch.ones(5)
    clip_each(parameters, 0.5)  # the last one has no gradient
    norms = [p.grad.norm().item() for p in parameters[:2]]
    assert norms == pytest.approx([0.01 * 5**0.5, 0.5], rel=1e-5) and parameters[2].grad is None

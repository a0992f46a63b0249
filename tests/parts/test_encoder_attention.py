"""The attention weights of every kind of timm's attention: equal to the softmax of timm's unfused path,
while the other blocks stay fused and nothing is left changed."""

import pytest
import timm
import torch

from mimstudy.core.errors import StudyError
from mimstudy.parts.attention import attention, map_attention
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.timm_encoder import timm_encoder

SHAPE = dict(size=64, patch=8, width=48, depth=4, heads=3)
OURS = {
    'class token': lambda: Encoder(**SHAPE),
    'eight prefix tokens': lambda: Encoder(**SHAPE, prefix=8, layer_scale=0.1),
    'relative positions': lambda: RelativeEncoder(**SHAPE),
}
SMALL = dict(img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=0)
# name -> options, prefix tokens, attentions of a block
FAMILIES = {
    'vit_tiny_patch16_224': ({}, 1, 1),
    'vit_small_patch16_dinov3': ({}, 5, 1),  # rotary positions, registers
    'vit_small_patch16_dinov3_qkvb': ({}, 5, 1),
    'eva02_tiny_patch14_224': (dict(img_size=56), 1, 1),  # rotary positions, SwiGLU, queries apart
    'eva02_base_patch16_clip_224': ({}, 1, 1),
    'vit_base_patch16_rope_reg1_gap_256': ({}, 1, 1),
    'vit_small_patch16_rope_mixed_224': ({}, 1, 1),  # learned angles for every block and head
    'vit_pe_core_tiny_patch16_384': ({}, 1, 1),
    'beit_base_patch16_224': ({}, 1, 1),  # a bias table in every block
    'beitv2_base_patch16_224': ({}, 1, 1),
    'beit_base_patch16_224 shared': (dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 1, 1),
    'vit_relpos_small_patch16_224': ({}, 0, 1),  # a bias from an MLP or a table
    'vit_relpos_base_patch16_cls_224': ({}, 1, 1),
    'vit_srelpos_small_patch16_224': ({}, 0, 1),
    'vit_small_patch14_reg4_dinov2': (dict(img_size=56), 5, 1),
    'vit_giant_patch14_dinov2': (dict(img_size=56), 1, 1),  # SwiGLU
    'vit_base_patch16_siglip_224': ({}, 0, 1),  # no prefix token
    'vit_base_patch16_clip_224': ({}, 1, 1),
    'vit_tiny_patch16_224 normalised': (dict(qk_norm=True, scale_attn_norm=True), 1, 1),
    'vit_base_patch16_xp_224': ({}, 1, 1),  # attention and MLP in parallel
    'vit_base_patch16_18x2_224': ({}, 1, 2),  # two attentions in parallel
    'vit_base_patch16_rpn_224': ({}, 0, 1),  # norm after the attention
    'deit3_small_patch16_224': ({}, 1, 1),
    'deit_tiny_distilled_patch16_224': ({}, 2, 1),
    'vit_tiny_patch16_224 gated': ({}, 1, 1),  # a sigmoid gate on the output of the attention
    'vit_base_patch16_sapiens2': (dict(num_heads=4, num_kv_heads=2), 9, 1),  # fewer heads of keys
    'qwen3_vit_88m_enc': ({}, 0, 1),
    'deepseek_vit_412m_enc': (dict(img_size=56), 0, 1),
    'vit_tiny_r_s16_p8_224': (dict(img_size=64), 1, 1),  # convolutions before the transformer
}


def create(name):
    "A model of a family with random weights far from the start, so that no part of it is without effect."
    model = name.split()[0]
    if not timm.is_model(model):
        pytest.skip(f'timm {timm.__version__} has no {model}')
    torch.manual_seed(0)
    encoder = timm.create_model(model, **SMALL | FAMILIES[name][0]).eval()
    if name.endswith('gated'):
        for block in encoder.blocks:
            block.attn.gate = torch.nn.Linear(48, 48)
    for p in encoder.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return timm_encoder(encoder)


def input_of(encoder):
    return torch.randn(2, 3, *encoder.patch_embed.img_size)


def softmax_of_unfused_path(encoder, x, monkeypatch):
    "What every softmax of the forward pass returns with fused attention off everywhere."
    found = []
    original = torch.Tensor.softmax

    def record(self, *args, **kwargs):
        found.append(original(self, *args, **kwargs))
        return found[-1]

    switched = [m for m in encoder.modules() if hasattr(m, 'fused_attn')]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, 'softmax', record)
        for module in switched:
            patch.setattr(module, 'fused_attn', False)
        features = encoder.forward_features(x)
    return found, features


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_weights_are_the_softmax_of_timms_unfused_path(name, monkeypatch):
    _, P, parallel = FAMILIES[name]
    encoder = create(name)
    x = input_of(encoder)
    expected, features = softmax_of_unfused_path(encoder, x, monkeypatch)
    fused = encoder.forward_features(x)
    torch.testing.assert_close(fused, features, rtol=1e-3, atol=1e-3)  # the fused kernel computes the same
    N = encoder.patch_embed.num_patches
    assert len(expected) == 3 * parallel
    for block in range(3):
        weights = attention(encoder, x, block)
        softmax = torch.cat(expected[block * parallel : (block + 1) * parallel], 1)
        assert weights.shape == (2, softmax.shape[1], P + N, P + N)
        torch.testing.assert_close(weights, softmax, rtol=1e-3, atol=1e-5)
    assert encoder.forward_features(x).equal(fused)  # nothing is left changed


@torch.no_grad()
def test_rotary_angles_are_in_the_weights():
    "Without them the weights of DINOv3's small encoder would be other ones."
    encoder = create('vit_small_patch16_dinov3')
    x = input_of(encoder)
    calls = {}
    attn = encoder.blocks[1].attn
    handle = attn.register_forward_hook(lambda module, args, out: calls.update(x=args[0]))
    encoder.forward_features(x)
    handle.remove()
    q, k, _ = attn.qkv(calls['x']).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    without = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
    assert (without - attention(encoder, x, 1)).abs().max() > 0.05


def outputs_of(attn, forward):
    "Input and output of an attention module during `forward()`."
    call = {}
    handle = attn.register_forward_hook(lambda module, args, out: call.update(x=args[0], out=out))
    forward()
    handle.remove()
    return call


@pytest.mark.parametrize('name', OURS)
@torch.no_grad()
def test_weights_times_values_are_the_fused_output(name):
    torch.manual_seed(0)
    encoder = OURS[name]().eval()
    x = torch.randn(2, 3, 64, 64)
    for p in encoder.parameters():
        p.add_(0.1 * torch.randn_like(p))
    for i, block in enumerate(encoder.blocks):
        call = outputs_of(block.attn, lambda: encoder.forward_features(x))
        weights = attention(encoder, x, i)
        bias = getattr(block.attn, 'v_bias', None)
        values = block.attn.qkv(call['x']).unflatten(-1, (3, 3, -1))[:, :, 2]
        if bias is not None:  # timm's BEiT stores the biases apart
            values = values + bias.unflatten(0, (3, -1))
        output = block.attn.proj((weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, call['out'], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, encoder.P + 64))


@torch.no_grad()
def test_class_attention_has_one_query():
    torch.manual_seed(0)
    cait = timm.create_model('cait_xxs24_224', **SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    for block, module in ((-1, cait.blocks_token_only[1]), (3, cait.blocks_token_only[0])):
        call = outputs_of(module.attn, lambda: cait.forward_features(x))
        weights = attention(cait, x, block)
        assert weights.shape == (2, 3, 1, 17)
        values = module.attn.v(call['x']).unflatten(-1, (3, -1)).transpose(1, 2)
        output = module.attn.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, call['out'], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_gated_positional_attention():
    "ConViT has no fused path; its weights are those of its own `get_attention`, patches alone at first."
    torch.manual_seed(0)
    convit = timm.create_model('convit_tiny', **SMALL | dict(embed_dim=16, local_up_to_layer=2)).eval()
    x = torch.randn(2, 3, 64, 64)
    for block, T in ((0, 16), (2, 17)):
        attn = convit.blocks[block].attn
        call = outputs_of(attn, lambda: convit.forward_features(x))
        weights = attention(convit, x, block)
        assert weights.shape == (2, attn.num_heads, T, T)
        values = attn.v(call['x']) if block == 0 else attn.qkv(call['x']).chunk(3, -1)[2]
        values = values.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        output = attn.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, call['out'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'name', ['vit_tiny_patch16_224', 'vit_small_patch16_dinov3', 'beit_base_patch16_224']
)
@torch.no_grad()
def test_only_the_observed_block_is_computed_step_by_step(name, monkeypatch):
    "All others go through the fused kernel; with several blocks one pass gives the same weights."
    encoder = create(name)
    x = input_of(encoder)
    single = [attention(encoder, x, block) for block in range(3)]
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', count)
    attention(encoder, x, 1)
    assert len(calls) == 2
    together = map_attention(encoder, x, lambda weights: weights)
    assert len(calls) == 2
    for one, other in zip(single, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(block.attn.fused_attn for block in encoder.blocks)


def test_an_error_in_a_measure_restores_the_encoder():
    encoder = Encoder(**SHAPE).eval()
    with pytest.raises(ZeroDivisionError):
        map_attention(encoder, torch.randn(1, 3, 64, 64), lambda weights: 1 / 0)
    assert all(block.attn.fused_attn for block in encoder.blocks)
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in encoder.blocks)


@torch.no_grad()
def test_other_sizes_of_an_encoder_with_dynamic_size():
    encoder = timm.create_model('vit_small_patch16_dinov3', dynamic_img_size=True, **SMALL).eval()
    assert attention(encoder, torch.randn(1, 3, 32, 96)).shape == (1, 3, 5 + 12, 5 + 12)
    resized = timm_encoder(timm.create_model('vit_tiny_patch16_224', **SMALL), size=96)
    assert attention(resized, torch.randn(1, 3, 96, 96)).shape == (1, 3, 37, 37)


@pytest.mark.parametrize(
    'name, options, block, message',
    [
        ('cait_xxs24_224', {}, 0, r'block 0 \(TalkingHeadAttn\) mixes its heads after the softmax'),
        ('vit_dwee_patch16_reg1_gap_256', dict(embed_dim=96), 1, r'block 1 \(DiffAttention\) subtracts'),
        ('vit_dpwee_patch16_reg1_gap_256', dict(embed_dim=96), 2, r'\(DiffParallelScalingBlock\) subtracts'),
        ('vit_tiny_patch16_224', {}, 3, 'there is no block 3; this encoder has 3 blocks, 0 to 2'),
        ('vit_tiny_patch16_224', {}, -4, 'there is no block -4'),
        ('vit_tiny_patch16_224', {}, 1.0, 'there is no block 1.0'),
        ('cait_xxs24_224', {}, 5, 'there is no block 5; this encoder has 5 blocks'),
    ],
)
def test_what_cannot_be_shown_is_one_line(name, options, block, message):
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} has no {name}')
    encoder = timm.create_model(name, **SMALL | options).eval()
    with pytest.raises(StudyError, match=message):
        attention(encoder, torch.randn(2, 3, 64, 64), block)


def test_images_that_do_not_fit_are_one_line():
    encoder = Encoder(**SHAPE).eval()
    for side, message in {4: 'patches of 8 px', 60: 'patches of 8 px', 72: 'images of 64 x 64 px'}.items():
        with pytest.raises(StudyError, match=message):
            attention(encoder, torch.randn(1, 3, side, side))

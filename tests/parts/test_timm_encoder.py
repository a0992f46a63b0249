"timm's vision transformers, opened by name: features of every block at any size; what is none is one line."

import pytest
import timm
import torch
from torch import nn

from mimstudy.core.errors import StudyError
from mimstudy.parts.encoder import block_features, patch_grid, patch_side
from mimstudy.parts.timm_encoder import timm_encoder

SMALL = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=0)
# name -> (options, prefix tokens, side of a patch)
FAMILIES = {
    'vit_tiny_patch16_224': (SMALL, 1, 16),
    'vit_small_patch14_reg4_dinov2': (SMALL | dict(img_size=56), 5, 14),
    'vit_base_patch16_siglip_224': (SMALL, 0, 16),
    'vit_base_patch16_clip_224': (SMALL, 1, 16),
    'vit_base_patch16_18x2_224': (SMALL, 1, 16),
    'vit_base_patch16_xp_224': (SMALL, 1, 16),
    'vit_base_patch16_rpn_224': (SMALL, 0, 16),
    'vit_dwee_patch16_reg1_gap_256': (SMALL | dict(embed_dim=96), 1, 16),
    'vit_small_patch16_dinov3': (SMALL, 5, 16),
    'vit_base_patch16_rope_reg1_gap_256': (SMALL, 1, 16),
    'vit_relpos_small_patch16_224': (SMALL, 0, 16),
    'vit_relpos_base_patch16_clsgap_224': (SMALL, 1, 16),
    'eva02_tiny_patch14_224': (SMALL | dict(img_size=56), 1, 14),
    'deit3_small_patch16_224': (SMALL, 1, 16),
    'deit_tiny_distilled_patch16_224': (SMALL, 2, 16),
    'beit_base_patch16_224': (SMALL, 1, 16),
    'beitv2_base_patch16_224': (SMALL, 1, 16),
    'cait_xxs24_224': (SMALL, 0, 16),  # the class token is added after the blocks
    'convit_tiny': (SMALL | dict(embed_dim=16), 0, 16),  # timm returns the patches only
}


def images(side, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_every_family_has_features_of_every_block(name):
    options, P, side = FAMILIES[name]
    encoder = timm_encoder(timm.create_model(name, **options))
    x = images(options['img_size'])
    assert patch_side(encoder) == side and patch_grid(encoder, x) == (4, 4)
    features = block_features(encoder, x)
    assert len(features) == len(encoder.blocks) == 2
    outputs = []
    handles = [b.register_forward_hook(lambda *call: outputs.append(call[2])) for b in encoder.blocks]
    encoder.forward_features(x)
    for handle in handles:
        handle.remove()
    for (prefix, patches), output in zip(features, outputs, strict=True):
        assert prefix.shape[1] == P and patches.shape[1] == 16
        assert patches.equal(output[:, -16:])
        if P:
            assert torch.cat([prefix, patches], 1).equal(output)


def test_a_name_opens_the_model_at_a_size_without_a_draw():
    state = torch.get_rng_state()
    encoder = timm_encoder('timm:test_vit', size=32)
    assert torch.get_rng_state().equal(state) and not encoder.training
    assert encoder.patch_embed.grid_size == (2, 2) and isinstance(encoder.head, nn.Identity)


@pytest.mark.parametrize(
    'name', ['test_vit', 'test_vit2', 'beit_base_patch16_224', 'vit_small_patch16_dinov3']
)
@torch.no_grad()
def test_a_model_changes_its_size_as_timm_does(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL).eval()
    encoder = timm_encoder(model, size=96)
    assert patch_grid(encoder, images(96)) == (6, 6) and model.patch_embed.grid_size == (4, 4)
    model.set_input_size(img_size=(96, 96))
    assert encoder.forward_features(images(96)).equal(model.forward_features(images(96)))


def test_without_network_or_cache_pretrained_weights_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(StudyError, match='timm cannot open test_vit: ') as caught:
        timm_encoder('test_vit', pretrained=True)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('resnet18', {}, r'resnet18 is no plain vision transformer \(timm builds a ResNet\)'),
        ('resnet18', dict(size=64), 'resnet18 is no plain vision transformer'),
        ('swin_tiny_patch4_window7_224', {}, 'is no plain vision transformer'),
        ('hiera_tiny_224', {}, 'is no plain vision transformer'),
        ('samvit_base_patch16', {}, 'is no plain vision transformer'),
        ('xcit_nano_12_p16_224', {}, 'is no plain vision transformer'),
        ('vit_tiny_patch16', {}, 'unknown model of timm "vit_tiny_patch16"; did you mean'),
        ('vit_tiny_patch16_224.no_such_tag', {}, 'timm cannot open vit_tiny_patch16_224.no_such_tag'),
        ('vit_tiny_patch16_224', dict(size=8), 'images of 8 px cannot be cut into patches of 16 px'),
        ('vit_tiny_patch16_224', dict(size=0), 'images of 0 px cannot be cut'),
        ('vit_tiny_patch16_224', dict(size=100), 'choose a size that 16 divides'),
        ('hf-hub:someone/some-model', {}, 'unknown model of timm'),
    ],
)
def test_what_cannot_be_opened_is_one_line(name, options, message):
    with pytest.raises(StudyError, match=message) as caught:
        timm_encoder(name, **options)
    assert '\n' not in str(caught.value)


def test_images_that_do_not_fit_are_one_line():
    encoder = timm.create_model('vit_tiny_patch16_224', **SMALL)
    for side, message in (
        (8, 'images of 8 x 8 px'),
        (72, 'that 16 divides'),
        (96, 'takes images of 64 x 64 px'),
    ):
        with pytest.raises(StudyError, match=message):
            block_features(encoder, images(side))
    fixed = timm.create_model('cait_xxs24_224', **SMALL)
    with pytest.raises(StudyError, match='the image size of a Cait is fixed'):
        timm_encoder(fixed, size=96)
    with pytest.raises(StudyError, match='Linear is no plain vision transformer'):
        timm_encoder(nn.Linear(2, 2))


@torch.no_grad()
def test_dynamic_encoders_take_images_of_any_size():
    encoder = timm.create_model('vit_small_patch16_dinov3', dynamic_img_size=True, **SMALL).eval()
    x = torch.randn(1, 3, 32, 96)
    assert patch_grid(encoder, x) == (2, 6) and block_features(encoder, x)[0][1].shape[1] == 12

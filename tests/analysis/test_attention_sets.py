"""Attention of every block and head over many images: closed forms, references, invariances, bad input."""

import math
import time

import pytest
import timm
import torch
from conftest import assert_close

from mimstudy.analysis.attention import (
    attention_distance,
    attention_entropy,
    nmi,
    overlap,
    prefix_maps,
    proxy_entropy,
    query_maps,
    without_prior,
)
from mimstudy.analysis.attention_depth_figures import depth_figure, prefix_figure
from mimstudy.analysis.attention_figures import attention_figure
from mimstudy.analysis.attention_sets import (
    ProxyRegions,
    attention_by_block,
    encoder_input,
    exclusivity,
    proxy_regions,
    uniform_distance,
)
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.parts.attention import attention
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.timm_encoder import timm_encoder

IMAGES = scenes(10, 32, seed=2).images
SHAPE = dict(size=32, patch=8, width=32, depth=2, heads=4)
SMALL = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)


def make(prefix=2):
    torch.manual_seed(0)
    encoder = Encoder(**SHAPE, prefix=prefix).eval()
    for p in encoder.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return encoder


def made_up(P, N, heads=3):
    g = torch.Generator().manual_seed(0)
    return (2 * torch.randn(2, heads, P + N, P + N, generator=g)).softmax(-1)


def more_prefix(weights, P, extra, share=0.3):
    "The same attention with further prefix tokens, which take a share of every row."
    B, H, T, _ = weights.shape
    wide = torch.zeros(B, H, T + extra, T + extra)
    wide[..., :P, :P] = weights[..., :P, :P]
    keep = [*range(P), *range(P + extra, T + extra)]
    rows = torch.zeros(B, H, T, T + extra)
    rows[..., keep] = (1 - share) * weights
    rows[..., P : P + extra] = share / extra
    wide[..., keep, :] = rows
    wide[..., P : P + extra, :] = 1 / (T + extra)
    return wide


def test_measures_do_not_depend_on_further_prefix_tokens():
    weights = made_up(1, 16)
    wide = more_prefix(weights, 1, 7)
    assert_close(wide.sum(-1), torch.ones(2, 3, 24))
    for measure in (
        lambda w, P: attention_distance(w, (4, 4), 8, P),
        lambda w, P: attention_entropy(w, P),
        lambda w, P: nmi(w, P),
        lambda w, P: query_maps(w, [3, 9], P, (4, 4), renormalise=True),
    ):
        assert_close(measure(wide, 8), measure(weights, 1))
    different = attention_distance(wide, (4, 4), 8, 8, renormalise=False)
    assert_close(different, 0.7 * attention_distance(weights, (4, 4), 8, 1, renormalise=False))


def test_uniform_attention_of_a_vit_s16_scores_116_492_px():
    with torch.device('meta'):
        encoder = timm.create_model('vit_small_patch16_224', depth=1)
    assert uniform_distance(encoder) == pytest.approx(116.492, abs=1e-3)
    zero = timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24, num_heads=2, num_classes=0)
    torch.nn.init.zeros_(zero.blocks[0].attn.qkv.weight)
    found = attention_by_block(zero.eval(), [torch.zeros(1, 3, 224, 224, dtype=torch.uint8)])
    assert_close(found.mean, torch.full((1, 2), 116.4922), 1e-5)
    assert_close(attention_by_block(zero, [IMAGES[:1]], 'entropy').mean, torch.full((1, 2), math.log(196)))


def test_entropy_agrees_with_loops():
    weights = made_up(2, 9)
    for h in range(3):
        total = 0.0
        for q in range(2, 11):
            row = weights[1, h, q, 2:] / weights[1, h, q, 2:].sum()
            total -= sum(p * math.log(p) for p in row.tolist())
        assert_close(attention_entropy(weights, 2)[1, h], total / 9)


@pytest.mark.parametrize('measure', ['distance', 'entropy', 'mutual information'])
def test_means_over_batches_are_those_over_all_images(measure):
    encoder = make()
    found = attention_by_block(encoder, IMAGES.split(3), measure)
    functions = dict(
        distance=lambda w: attention_distance(w, (4, 4), 8, 2),
        entropy=lambda w: attention_entropy(w, 2),
    )
    function = functions.get(measure, lambda w: nmi(w, 2))
    for block in range(2):
        values = function(attention(encoder, encoder_input(encoder, IMAGES), block))
        assert_close(found.mean[block], values.mean(0), 1e-4)
        assert_close(found.sd[block], values.std(0), 1e-3)
    assert found.images == 10 and found.mean.shape == (2, 4)
    assert attention_by_block(encoder, [IMAGES[:1]], measure).sd.isnan().all()


@pytest.mark.parametrize(
    'name, P',
    [('vit_small_patch16_dinov3', 5), ('vit_base_patch16_siglip_224', 0), ('beit_base_patch16_224', 1)],
)
def test_encoders_of_timm_are_measured(name, P):
    encoder = timm.create_model(name, **SMALL).eval()
    weights = attention(encoder, encoder_input(encoder, IMAGES), 1)
    expected = attention_distance(weights, (2, 2), 16, P).mean(0)
    assert_close(attention_by_block(encoder, IMAGES.split(4)).mean[1], expected, 1e-4)


def test_patches_of_a_hybrid_are_measured_in_pixels_of_the_image():
    "timm calls the side of its patches 1, on the feature map of the convolutions."
    encoder = timm.create_model('vit_tiny_r_s16_p8_224', **SMALL | dict(img_size=64)).eval()
    assert uniform_distance(encoder) == pytest.approx(32 * (2 * 1 + 2**0.5) / 4, rel=1e-5)


def test_regions_are_means_of_maps_and_the_control_mixes_tokens():
    encoder = make(4)
    regions = proxy_regions(encoder, IMAGES.split(3))
    weights = attention(encoder, encoder_input(encoder, IMAGES))
    assert_close(regions.maps, prefix_maps(weights, 4, (4, 4)).mean(0), 1e-5)
    assert_close(regions.shuffled.mean(0), regions.maps.mean(0), 1e-5)
    assert regions.images == 10 and regions.shuffled.equal(proxy_regions(encoder, IMAGES.split(3)).shuffled)
    many = proxy_regions(encoder, IMAGES.repeat(40, 1, 1, 1).split(100))  # 400 exchanges
    assert_close(many.maps, regions.maps, 1e-5)
    numbers = exclusivity(many)
    assert numbers['overlap'] < numbers['overlap, shuffled'] <= 1
    assert numbers['entropy'] < numbers['entropy, shuffled'] <= 1


def test_exclusivity_has_closed_forms():
    quarters = torch.eye(4).view(4, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    one = torch.ones(4, 4, 4)
    numbers = exclusivity(ProxyRegions(quarters, one, 1))
    assert numbers['overlap'] == numbers['entropy'] == 0
    assert numbers['overlap, shuffled'] == pytest.approx(1) == numbers['entropy, shuffled']
    pairs = torch.stack([quarters[0], quarters[0], quarters[1], quarters[1]])  # each region has two tokens
    assert proxy_entropy(pairs).item() == pytest.approx(0.5)
    assert overlap(pairs).item() == pytest.approx(2 / 6)


def test_maps_of_heads_average_to_the_map():
    weights = made_up(2, 16)
    assert_close(
        query_maps(weights, [1, 7], 2, (4, 4), per_head=True).mean(1), query_maps(weights, [1, 7], 2, (4, 4))
    )
    assert_close(prefix_maps(weights, 2, (4, 4), per_head=True).mean(1), prefix_maps(weights, 2, (4, 4)))


def test_content_is_what_the_position_does_not_explain():
    g = torch.Generator().manual_seed(0)
    position, content = torch.rand(3, 4, 4, generator=g), torch.randn(6, 3, 4, 4, generator=g)
    content = content - content.mean(0)
    assert_close(without_prior(position + content), content, 1e-5)
    assert_close(without_prior(position + content, position), content, 1e-5)


def test_bad_input_is_one_line():
    encoder = make(1)
    without = timm.create_model('vit_base_patch16_siglip_224', **SMALL).eval()
    cait = timm.create_model('cait_xxs24_224', **SMALL).eval()
    cases = {
        'the query patch 16 lies outside the image of 4 x 4 patches': lambda: attention_figure(
            {'a': encoder}, IMAGES[:1], [16]
        ),
        'the query patch -1 lies outside': lambda: depth_figure(encoder, IMAGES[0], [-1]),
        'there is no block 2': lambda: attention_figure({'a': encoder}, IMAGES[:1], block=2),
        'no prefix tokens': lambda: prefix_figure({'a': without}, IMAGES[:1]),
        'this block has no prefix tokens': lambda: proxy_regions(without, [IMAGES]),
        'at least two tokens': lambda: exclusivity(proxy_regions(encoder, [IMAGES])),
        'unknown measure of attention "length"': lambda: attention_by_block(encoder, [IMAGES], 'length'),
        'no images': lambda: attention_by_block(encoder, []),
        'in class attention no patch is a query': lambda: attention_by_block(cait, [IMAGES], blocks=[-1]),
        r'talking heads': lambda: attention_by_block(cait, [IMAGES]),
        'is no plain vision transformer': lambda: timm_encoder('resnet18'),
    }
    for message, call in cases.items():
        with pytest.raises(StudyError, match=message) as caught:
            call()
        assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_distance_of_all_blocks_costs_less_than_three_forward_passes():
    encoder = timm.create_model('vit_small_patch16_224', num_classes=0).eval()
    images = scenes(16, 224).images
    x = encoder_input(encoder, images)

    def seconds(call):
        start = time.process_time()
        call()
        return time.process_time() - start

    with torch.no_grad():
        plain = min(seconds(lambda: encoder.forward_features(x)) for _ in range(3))
    measured = min(seconds(lambda: attention_by_block(encoder, [images])) for _ in range(3))
    assert measured < 3 * plain, f'{measured / plain:.2f} times a forward pass'

"""Consistency and completeness: a slow reference, invented attention that the paper describes, symmetries,
bad input."""

from itertools import permutations

import pytest
import torch
from conftest import assert_close

from mimstudy.analysis.attention import patch_distances
from mimstudy.analysis.segments import (
    cosine_similarity,
    encoder_segment_measures,
    found_segments,
    patch_segments,
    preference,
    segment_measures,
    segment_queries,
)
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import BACKGROUNDS, REGIONS, scenes
from mimstudy.parts.encoder import Encoder

OBJECTS = range(len(BACKGROUNDS), len(REGIONS))
GRID = (8, 8)


@pytest.fixture(scope='module')
def world():
    return scenes(8, 64, seed=5)


@pytest.fixture(scope='module')
def segments(world):
    return patch_segments(world.images, world.maps, GRID)


def own_of(segments):
    return segments[:, :, None] == segments[:, None]


def mean_precisions(scores, own):
    "For each patch: its precision in the sorted list, averaged over all orders of equal scores."
    orders = [o for o in permutations(range(len(scores))) if list(scores[list(o)]) == sorted(scores)[::-1]]
    total = [0.0] * len(scores)
    for order in orders:
        for place, patch in enumerate(order):
            total[patch] += own[list(order[: place + 1])].float().mean().item() / len(orders)
    return total


@pytest.mark.parametrize('equal_distance', [True, False])
def test_preference_agrees_with_enumeration(equal_distance):
    generator = torch.Generator().manual_seed(0)
    grid, N = (2, 3), 6
    scores = torch.randint(3, (1, N, N), generator=generator).float()  # with many ties
    segments = torch.randint(2, (1, N), generator=generator)
    distances = patch_distances(grid)
    fast = preference(scores, segments, grid, equal_distance)[0]
    for q in range(N):
        others = [j for j in range(N) if j != q]
        groups = {}
        for j in others:
            groups.setdefault(round(distances[q, j].item() ** 2) if equal_distance else 0, []).append(j)
        gain = best = 0.0
        for members in groups.values():
            own = segments[0, members] == segments[0, q]
            if own.all():
                continue
            precision = mean_precisions(scores[0, q, members], own)
            chance = mean_precisions(torch.zeros(len(members)), own)
            gain += sum(p - c for p, c, mine in zip(precision, chance, own) if mine)
            best += sum(1 - c for c, mine in zip(chance, own) if mine)
        if best == 0:
            assert fast[q].isnan()
        else:
            assert_close(fast[q], gain / best, 1e-5)


def test_invented_attention_scores_as_the_paper_says(segments):
    """Uniform: neither property. Local, as masked image modelling: complete, not consistent. Foreground, as
    contrastive learning: consistent on objects, not complete. Perfect: both."""
    on_object = segments >= len(BACKGROUNDS)
    local = (-patch_distances(GRID)).exp().expand(8, -1, -1)
    maps = {
        'perfect': own_of(segments).float(),
        'uniform': torch.full((8, 64, 64), 1 / 64),
        'local': local,
        'foreground': on_object.float()[:, None].expand(-1, 64, -1),
    }
    scored = {name: segment_measures(m, segments, GRID, OBJECTS) for name, m in maps.items()}
    value = {(name, key): mean for name, row in scored.items() for key, (mean, _) in row.items()}
    for where in ('foreground', 'background'):
        assert value['perfect', f'consistency, {where}'] == pytest.approx(1, abs=1e-6)
        assert value['perfect', f'completeness, {where}'] == 1
        assert value['uniform', f'consistency, {where}'] == pytest.approx(0, abs=1e-6)
        assert value['uniform', f'completeness, {where}'] == 0
        assert value['local', f'consistency, {where}'] == pytest.approx(0, abs=1e-6)
        assert value['local', f'completeness, {where}'] > 0.85
    assert value['foreground', 'consistency, foreground'] > 0.5
    assert value['foreground', 'completeness, foreground'] > 0.5
    assert value['foreground', 'consistency, background'] < -0.2
    assert value['foreground', 'completeness, background'] == 0


def test_noise_is_no_preference(segments):
    noise = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(1))
    for equal_distance in (True, False):
        assert preference(noise, segments, GRID, equal_distance).nanmean().abs() < 0.02


def test_only_the_order_within_a_distance_counts(segments):
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(8, 64, 64, generator=generator)
    squared = (patch_distances(GRID) ** 2).round().long()
    profile = torch.rand(int(squared.max()) + 1, generator=generator)
    moved = scores.exp() + 5 * profile[squared]
    assert_close(
        preference(moved, segments, GRID).nan_to_num(), preference(scores, segments, GRID).nan_to_num()
    )


def test_mirrored_scores_have_mirrored_preferences(segments):
    scores = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(3))
    mirror = torch.arange(64).view(8, 8).flip(1).flatten()
    mirrored = preference(scores[:, mirror][:, :, mirror], segments[:, mirror], GRID)
    assert_close(mirrored.nan_to_num(), preference(scores, segments, GRID)[:, mirror].nan_to_num())


def test_found_segments_agree_with_a_loop(segments):
    preferences = torch.rand(8, 64, generator=torch.Generator().manual_seed(4)) - 0.3
    preferences[0, segments[0] == segments[0, 0]] = torch.nan
    found = found_segments(preferences, segments)
    for b in range(8):
        for region in range(found.shape[1]):
            queries = preferences[b, segments[b] == region]
            if len(queries) == 0 or queries.isnan().all():
                assert found[b, region].isnan()
            else:
                assert found[b, region] == float(queries.nanmean() >= 0.2)


def test_bad_input_is_one_line(world, segments):
    with pytest.raises(StudyError, match='label map must be as large as its image'):
        patch_segments(world.images, world.maps[:, :32, :32], GRID)
    with pytest.raises(StudyError, match='label map must be as large as its image'):
        patch_segments(world.images, world.maps[:4], GRID)
    with pytest.raises(StudyError, match='take larger images'):
        patch_segments(world.images[..., :4, :4], world.maps[:, :4, :4], GRID)
    with pytest.raises(StudyError, match='do not fit a grid of 4 x 4'):
        preference(torch.zeros(8, 64, 64), segments, (4, 4))
    with pytest.raises(StudyError, match='needs two images'):
        segment_measures(torch.rand(1, 64, 64), segments[:1], GRID, OBJECTS)


def test_encoders_are_measured(world):
    torch.manual_seed(0)
    encoder = Encoder(size=64, patch=8, width=24, depth=2, heads=2, prefix=3).eval()
    measures = encoder_segment_measures({'a': encoder}, world.images, world.maps, OBJECTS, block=0)
    assert set(measures) == {'attention', 'features'}
    assert measures['features'].shape == (1, 4)
    with pytest.raises(StudyError, match='there is no block 2'):
        encoder_segment_measures({'a': encoder}, world.images, world.maps, OBJECTS, block=2)


def test_cosines_agree_with_pairs():
    features = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(5))
    slow = torch.cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    assert_close(cosine_similarity(features), slow)


def test_queries_are_the_middles_of_the_largest_segments():
    halves = torch.zeros(5, 5, dtype=torch.long)
    halves[:, 4] = 1
    assert segment_queries(halves.flatten(), (5, 5), 2)[1] == 14
    assert segment_queries(torch.zeros(25, dtype=torch.long), (5, 5), 4) == [12]


def test_queries_lie_on_their_segments(segments):
    for of_image in segments:
        queries = segment_queries(of_image, GRID, 3)
        by_size = of_image.bincount().argsort(descending=True, stable=True)[: len(queries)]
        assert of_image[queries].tolist() == by_size.tolist()

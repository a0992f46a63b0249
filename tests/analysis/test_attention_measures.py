"""Maps and measures of attention: parity with public code, reference implementations, closed forms,
symmetries."""

import math

import pytest
import torch
from conftest import assert_close

from mimstudy.analysis.attention import (
    attention_distance,
    consistency,
    label_shares,
    nmi,
    overlap,
    own_shares,
    patch_distances,
    patch_weights,
    prefix_maps,
    query_maps,
)
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import REGIONS, scenes
from mimstudy.parts.attention import attention
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.views import normalise

CASES = {'k1': (1, (8, 8)), 'k8': (8, (6, 6))}  # golden name -> prefix tokens, grid


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def made_up(B, H, P, grid, g):
    return (2 * torch.randn(B, H, P + grid[0] * grid[1], P + grid[0] * grid[1], generator=g)).softmax(-1)


# parity with the CL-vs-MIM analysis, layer by layer


@pytest.mark.parametrize('name', CASES)
def test_distance_and_nmi_equal_the_public_code(golden, name):
    tensors, (P, grid) = golden('attention_distance'), CASES[name]
    weights = tensors[f'{name}.attn']  # (layers,B,H,T,T)
    assert_close(attention_distance(weights, grid, 16, P), tensors[f'{name}.distance'])
    assert_close(
        attention_distance(weights, grid, 16, P, renormalise=False),
        tensors[f'{name}.distance_not_renormalised'],
    )
    assert_close(nmi(weights, P), tensors[f'{name}.nmi'])


@pytest.mark.parametrize('side', [14, 7])
def test_uniform_attention_has_the_mean_distance(golden, side):
    uniform = torch.full((1, side * side, side * side), 1 / side**2, dtype=torch.float64)
    assert_close(
        attention_distance(uniform, (side, side), 16, 0)[0],
        golden('attention_distance')[f'uniform_{side}x{side}_patch16'],
    )


def test_wrong_variants_would_be_seen(golden):
    """The prefix counted as a patch, the two options mixed up, or a row-major slip: each moves the numbers
    by far more than the tolerance."""
    tensors = golden('attention_distance')
    weights, right = tensors['k8.attn'], tensors['k8.distance']
    for wrong in (
        attention_distance(weights, (6, 6), 16, 8, renormalise=False),
        attention_distance(weights, (4, 9), 16, 8),
    ):
        assert (wrong - right).abs().max() > 1e-2 * right.max()


# reference implementations


def test_maps_agree_with_loops(g):
    P, grid = 3, (4, 5)
    weights = made_up(2, 4, P, grid, g)
    queries = torch.tensor([[7, 0, 19], [3, 3, 11]])
    for renormalise in (False, True):
        maps, prefix = (
            query_maps(weights, queries, P, grid, renormalise),
            prefix_maps(weights, P, grid, renormalise),
        )
        for b in range(2):
            rows = [(maps[b, i], P + q.item()) for i, q in enumerate(queries[b])] + [
                (prefix[b, p], p) for p in range(P)
            ]
            for drawn, t in rows:
                slow = sum(weights[b, h, t] for h in range(4)) / 4
                slow = slow[P:] / (slow[P:].sum() if renormalise else 1)
                assert drawn.shape == grid
                assert_close(drawn.flatten(), slow)


def test_distance_agrees_with_loops(g):
    P, (gh, gw), patch = 2, (3, 5), 7
    weights = made_up(1, 2, P, (gh, gw), g)
    for h in range(2):
        total = 0.0
        for i in range(gh * gw):
            row = weights[0, h, P + i, P:] / weights[0, h, P + i, P:].sum()
            total += sum(
                row[j].item() * patch * math.dist(divmod(i, gw), divmod(j, gw)) for j in range(gh * gw)
            )
        assert_close(attention_distance(weights, (gh, gw), patch, P)[0, h], total / (gh * gw))


def test_nmi_agrees_with_the_joint_distribution(g):
    "Mutual information from the table of joint probabilities, pair by pair."
    rows = made_up(1, 1, 0, (3, 3), g)[0, 0].double()
    joint = rows / 9
    key = joint.sum(0)
    shared = sum(joint[q, k] * math.log(joint[q, k] / (key[k] / 9)) for q in range(9) for k in range(9))
    assert_close(nmi(rows[None], 0)[0], shared / math.sqrt(math.log(9) * -sum(p * math.log(p) for p in key)))


def test_zero_weights_are_no_trouble():
    weights = torch.eye(16)[None] * 1.0
    assert nmi(weights, 0).isfinite().all() and nmi(torch.eye(16).roll(3, 1)[None], 0).allclose(torch.ones(1))


def test_overlap_agrees_with_pairs(g):
    maps = torch.rand(5, 3, 4, generator=g)
    shares = [m / m.sum() for m in maps]
    slow = [torch.minimum(shares[i], shares[j]).sum() for i in range(5) for j in range(i)]
    assert_close(overlap(maps), sum(slow) / len(slow))
    assert_close(
        overlap(maps * torch.rand(5, 1, 1, generator=g)), overlap(maps)
    )  # how hard a token looks does not matter
    with pytest.raises(StudyError, match='not of 1'):
        overlap(maps[:1])


def test_shares_agree_with_counting(g):
    labels, grid = torch.randint(4, (2, 12, 8), generator=g), (3, 2)
    shares = label_shares(labels, grid, 4)
    own, region = own_shares(shares, [4])
    for b in range(2):
        for n in range(6):
            i, j = divmod(n, 2)
            assert_close(
                shares[b, n],
                labels[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten().bincount(minlength=4) / 16,
            )
        assert region[b, 0] == shares[b, 4].argmax()
        assert_close(own[b, 0], shares[b, :, region[b, 0]])


@pytest.mark.parametrize('equal_distance', [False, True])
def test_consistency_agrees_with_loops(g, equal_distance):
    grid, N = (4, 5), 20
    maps, own, queries = (
        torch.rand(2, 3, *grid, generator=g),
        torch.rand(2, 3, N, generator=g),
        torch.tensor([[7, 0, 19], [3, 3, 11]]),
    )
    fast, d = consistency(maps, own, queries, equal_distance), patch_distances(grid)
    for b in range(2):
        for i, q in enumerate(queries[b].tolist()):
            others, look = [j for j in range(N) if j != q], maps[b, i].flatten()

            def share(js):
                return sum(own[b, i, j].item() for j in js) / len(js)

            due = sum(
                look[j]
                * share(
                    [k for k in others if math.isclose(d[q, k], d[q, j], abs_tol=1e-4)]
                    if equal_distance
                    else others
                )
                for j in others
            )
            assert_close(fast[b, i], sum(look[j] * own[b, i, j] for j in others) / due)


# closed forms and symmetries


def test_a_map_that_knows_distance_alone_scores_one_at_equal_distance(g):
    world, grid = scenes(12, 64, seed=4), (8, 8)
    own, _ = own_shares(label_shares(world.maps, grid, len(REGIONS)), torch.arange(64))
    profile = torch.rand(200, generator=g)  # any function of the distance
    radial = profile[(patch_distances(grid) ** 2).round().long()].expand(12, -1, -1).unflatten(2, grid)
    scores = consistency(radial, own, torch.arange(64), equal_distance=True)
    assert_close(scores[~scores.isnan()], torch.ones(int((~scores.isnan()).sum())), 1e-5)
    assert consistency(radial, own, torch.arange(64)).nanmean() != 1


def test_looking_only_at_ones_own_region_scores_the_inverse_of_its_share():
    own = torch.zeros(1, 1, 16)
    own[0, 0, :4] = 1
    maps = own.unflatten(2, (4, 4))
    assert_close(consistency(maps, own, [0])[0, 0], 15 / 3)  # 3 of the 15 others
    assert_close(consistency(maps.flip(2, 3), own.flip(2), [15])[0, 0], 15 / 3)
    assert consistency(torch.ones(1, 1, 4, 4), torch.eye(16)[None, :1], [0]).isnan()  # nobody else shows it


def test_mirrored_images_have_mirrored_scores(g):
    world, grid = scenes(6, 32, seed=5), (4, 4)
    maps, mirror = torch.rand(6, 16, 4, 4, generator=g), torch.arange(16).view(4, 4).flip(1).flatten()
    for equal in (False, True):

        def score(maps, labels):
            return consistency(
                maps,
                own_shares(label_shares(labels, grid, len(REGIONS)), torch.arange(16))[0],
                torch.arange(16),
                equal,
            )

        a, b = score(maps, world.maps), score(maps[:, mirror].flip(3), world.maps.flip(2))
        # where two labels fill a patch equally, the first one counts on both sides
        assert_close(a.nan_to_num(), b[:, mirror].nan_to_num(), 1e-5)


@pytest.mark.parametrize('P', [1, 8])
def test_measures_fit_what_the_encoder_gives(P):
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=4, prefix=P).eval()
    weights = attention(encoder, normalise(scenes(3, 32).images.float() / 255), block=0)
    assert (
        attention_distance(weights, encoder.grid, encoder.patch, P).shape == nmi(weights, P).shape == (3, 4)
    )
    maps = prefix_maps(weights, P, encoder.grid, renormalise=True)
    assert maps.shape == (3, P, 4, 4)
    assert_close(maps.sum((2, 3)), torch.ones(3, P))
    assert patch_weights(weights, P).shape == (3, 4, P + 16, 16)

"Redundancy of targets and the learning shortcut: slow references, models whose shares are known, bad input."

import math

import pytest
import torch
from conftest import assert_close

from mimstudy.analysis.redundancy import similarity_by_distance, target_similarities
from mimstudy.analysis.shortcut import (
    Dependence,
    dependence,
    exchange,
    nearest_visible,
    prediction_changes,
    task_prediction,
)
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.methods.semanticmim import semanticmim
from mimstudy.methods.simmim import simmim
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.hog import HOG
from mimstudy.parts.masks import gather, make_mask
from mimstudy.parts.targets import Pixels, patchify
from mimstudy.parts.views import normalise

GRID = (4, 4)
HIDDEN = torch.arange(16) % 2 == 0
PATCHES = HIDDEN.nonzero()[:, 0].tolist()


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


# redundancy


def distance(i, j, across):
    return math.dist(divmod(i, across), divmod(j, across))


@pytest.mark.parametrize('kind', ['vectors', 'codes'])
def test_similarity_agrees_with_loops(g, kind):
    grid, N = (2, 3), 6
    target = torch.randn(3, N, 4, generator=g) if kind == 'vectors' else torch.randint(3, (3, N), generator=g)
    distances, fast = similarity_by_distance(target, grid)
    if kind == 'vectors':
        centred = target - target.flatten(0, 1).mean(0)
        same, chance = (centred**2).sum(2).mean(), 0.0
    else:
        chance = sum(((target == c).float().mean()) ** 2 for c in range(3))
        same = 1.0
    for r, d in enumerate(distances.tolist()):
        for b in range(3):
            found = []
            for i in range(N):
                for j in range(N):
                    if math.isclose(distance(i, j, 3), d, rel_tol=1e-6):
                        alike = (
                            centred[b, i] @ centred[b, j]
                            if kind == 'vectors'
                            else float(target[b, i] == target[b, j])
                        )
                        found.append((alike - chance) / (same - chance))
            assert_close(fast[b, r], sum(found) / len(found), 1e-4)


def test_similarity_of_a_stationary_process_is_its_correlation(g):
    "Rows of a first-order autoregressive process: 0.8 to the power of the distance."
    x = torch.randn(4000, 1, generator=g)
    steps = [x]
    for _ in range(5):
        steps.append(0.8 * steps[-1] + 0.6 * torch.randn(4000, 1, generator=g))
    distances, values = similarity_by_distance(torch.stack(steps, 1), (1, 6))
    assert (values.mean(0) - 0.8**distances).abs().max() < 0.03


def test_similarity_does_not_depend_on_scale_shift_and_rotation(g):
    target = torch.randn(5, 16, 6, generator=g).cumsum(1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    moved = 3 * target @ rotation + torch.randn(6, generator=g)
    assert_close(similarity_by_distance(moved, GRID)[1], similarity_by_distance(target, GRID)[1], 1e-4)
    codes = torch.randint(5, (5, 16), generator=g)
    renamed = torch.randperm(5, generator=g)[codes]
    assert torch.equal(similarity_by_distance(renamed, GRID)[1], similarity_by_distance(codes, GRID)[1])


def test_targets_of_methods_are_measured():
    x = normalise(scenes(8, 32).images.float() / 255)
    frame = target_similarities({'pixels': Pixels(8), 'HOG': HOG(8)}, x, GRID)
    assert frame.index[0] == 1 and frame.loc[1.0, ('pixels', 'mean')] > frame.loc[3.0, ('pixels', 'mean')]
    assert frame.notna().all(axis=None)


def test_bad_targets_are_one_line():
    codes = torch.arange(32).view(2, 16)
    for target, grid, message in (
        (codes, (4, 5), 'a grid of 4 x 5 has 20 patches, and the target 16'),
        (codes[:1], GRID, 'at least 2 images, not 1'),
        (torch.zeros_like(codes), GRID, 'the same for all patches'),
        (torch.ones(2, 16, 3), GRID, 'the same for all patches'),
    ):
        with pytest.raises(StudyError, match=message):
            similarity_by_distance(target, grid)


# the shortcut


def nearest_of(patch):
    return nearest_visible(HIDDEN, GRID, patch, 1).int().argmax()


def copies(x, mask):
    "The nearest visible patch."
    return gather(patchify(x, 8), torch.stack([nearest_of(p) for p in range(16)])[mask.predict])


def averages(x, mask):
    "The mean of all visible patches."
    return gather(patchify(x, 8), mask.visible).mean(1, keepdim=True).expand(-1, mask.predict.shape[1], -1)


def shares_of(model, x, count=4):
    return dependence(*prediction_changes(model, x, HIDDEN, GRID, PATCHES, count))


def test_models_whose_shares_are_known(g):
    x = torch.randn(100, 3, 32, 32, generator=g)
    table = torch.randn(16, 192, generator=g)
    assert shares_of(copies, x) == pytest.approx((0, 1, 0), abs=0.03)
    by_position = shares_of(lambda x, mask: table[mask.predict].expand(len(x), -1, -1), x)
    assert by_position == pytest.approx((1, 0, 0), abs=1e-9)
    for count in (1, 2, 6):  # of 8 visible patches
        assert shares_of(averages, x, count) == pytest.approx((0, count / 8, 1 - count / 8), abs=0.03)
    scaled = shares_of(lambda x, mask: 3 * copies(x, mask) + 3 * table[mask.predict], x)
    between = table[PATCHES].var(0).mean().item()
    assert scaled == pytest.approx((between / (1 + between), 1 / (1 + between), 0), abs=0.03)
    assert sum(scaled) == pytest.approx(1)


def test_nearest_visible_patches_agree_with_sorting():
    hidden = torch.rand(20, generator=torch.Generator().manual_seed(1)) < 0.5
    for patch in range(20):
        visible = [j for j in range(20) if not hidden[j]]
        nearest = sorted(visible, key=lambda j: (round(distance(patch, j, 5) ** 2), j))[:3]
        assert nearest_visible(hidden, (4, 5), patch, 3).nonzero()[:, 0].tolist() == sorted(nearest)


def test_exchange_moves_whole_patches():
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 16).contiguous()
    chosen = torch.tensor([True, False, False, False, False, True, False, False])
    exchanged = patchify(exchange(x, chosen, (2, 4)), 4).mean(2)
    assert torch.equal(exchanged[1], torch.where(chosen, 0.0, 1.0))
    assert torch.equal(exchanged[0], torch.where(chosen, 2.0, 0.0))


@pytest.mark.parametrize('method', [simmim, semanticmim(simmim)])
def test_tasks_are_measured(method):
    torch.manual_seed(0)
    task = method(Encoder(size=32, patch=8, width=16, depth=2, heads=2, prefix=3)).eval()
    x = normalise(scenes(6, 32).images.float() / 255)
    predictions, changes = prediction_changes(task_prediction(task), x, HIDDEN, GRID, [2, 8])
    with torch.no_grad():
        slow = task.predict(Batch([x], make_mask(HIDDEN.expand(6, -1))))
    assert_close(predictions, slow[:, [1, 4]])
    both = exchange(x, ~HIDDEN, GRID)
    with torch.no_grad():
        changed = task.predict(Batch([both], make_mask(HIDDEN.expand(6, -1))))[:, [1, 4]]
    assert_close(changes[2], (changed - predictions).square().mean(2), 1e-3)
    assert isinstance(dependence(predictions, changes), Dependence)


def test_bad_requests_are_one_line(g):
    x = torch.randn(4, 3, 32, 32, generator=g)
    for call, message in (
        (lambda: prediction_changes(copies, x, HIDDEN, GRID, [0, 1]), r'the patches \[1\] are not hidden'),
        (lambda: prediction_changes(copies, x, HIDDEN, GRID, [0, 99]), r'the patches \[99\] are not hidden'),
        (lambda: prediction_changes(copies, x[:1], HIDDEN, GRID, PATCHES), 'at least 2 images'),
        (lambda: prediction_changes(copies, x, HIDDEN, GRID, [0]), '2 hidden patches'),
        (lambda: nearest_visible(HIDDEN, GRID, 0, 8), 'more than 8 visible patches, not 8'),
        (lambda: dependence(torch.ones(3, 2, 1), torch.zeros(3, 3, 2)), 'all predictions are equal'),
    ):
        with pytest.raises(StudyError, match=message):
            call()

"Masks: exact counts and statistics of the official generators (golden/masks)."

import pytest
import torch
from mimstudy.core.errors import StudyError
from mimstudy.parts.masks import block_mask, make_mask, random_mask, independent_masks

G = lambda seed=0: torch.Generator().manual_seed(seed)


def components(hidden):
    "Mean number of 4-connected components of the hidden patches, by flooding labels."
    label = torch.where(hidden, torch.arange(hidden[0].numel()).reshape(hidden.shape[1:]) + 1, 0)
    for _ in range(hidden[0].numel()):
        pad = torch.nn.functional.pad(label, (1, 1, 1, 1))
        best = torch.stack(
            [label, pad[:, :-2, 1:-1], pad[:, 2:, 1:-1], pad[:, 1:-1, :-2], pad[:, 1:-1, 2:]]
        ).amax(0)
        new = torch.where(hidden, best, 0)
        if new.equal(label):
            break
        label = new
    start = torch.arange(hidden[0].numel()).reshape(hidden.shape[1:]) + 1
    return ((label == start) & hidden).sum((1, 2)).float().mean().item()


@pytest.mark.parametrize('unit, ratio', [(1, 40), (1, 60), (1, 75), (1, 90), (2, 60), (2, 75), (2, 90)])
def test_random_counts(golden, ratio, unit):
    name = f'conmim_random_mps{16 * unit}_{ratio}'
    mask = random_mask(500, (14, 14), ratio / 100, G(), unit)
    facts = golden('masks.json')[name]
    counts = mask.hidden.sum(1)
    assert counts.min() == counts.max() == facts['masked_mean']
    assert abs(components(mask.hidden.reshape(-1, 14, 14)) - facts['components_mean']) < 0.25
    assert mask.predict.shape == (500, int(facts['masked_mean'])) and mask.visible.shape == (
        500,
        196 - int(facts['masked_mean']),
    )


@pytest.mark.parametrize('ratio', [60, 75, 90])
def test_floor_counts(golden, ratio):
    counts = random_mask(50, (14, 14), ratio / 100, G(), rounding='floor').hidden.sum(1)
    assert (counts == golden('masks.json')[f'conmim_RandomMaskingGenerator_{ratio}']['masked_mean']).all()


@pytest.mark.parametrize('count', [75, 78, 118, 147, 176])
def test_block_statistics(golden, count):
    facts, tensors = golden('masks.json')[f'beit_block_{count}'], golden('masks')
    hidden = block_mask(4000, (14, 14), count, G()).hidden.reshape(-1, 14, 14)
    counts = hidden.sum((1, 2)).float()
    assert counts.max() <= count
    assert abs(counts.mean() - facts['masked_mean']) < 0.3
    assert abs(components(hidden) - facts['components_mean']) < 0.1
    gap = (hidden.float().mean(0) - tensors[f'beit_block_{count}.cell_freq']).abs().max()
    assert gap < (0.05 if count == 176 else 0.04)


def test_two_sets_are_independent():
    mask = independent_masks(3000, (14, 14), 0.6, 0.6, G())
    predicted = torch.zeros(3000, 196, dtype=torch.bool).scatter_(1, mask.predict, True)
    overlap = (predicted & ~mask.hidden).sum(1).float()
    assert abs(overlap.mean() - 46.95) < 0.3 and abs(overlap.std() - 3.34) < 0.2


def test_positions_agree_with_the_matrix():
    hidden = block_mask(50, (14, 14), 75, G()).hidden
    mask = make_mask(hidden)
    for row, ids, weight in zip(hidden, mask.predict, mask.weight):
        assert ids[weight.bool()].tolist() == row.nonzero().flatten().tolist()
    mask = random_mask(50, (14, 14), 0.6, G())
    for row, ids, seen in zip(mask.hidden, mask.predict, mask.visible):
        assert (
            ids.tolist() == row.nonzero().flatten().tolist()
            and seen.tolist() == (~row).nonzero().flatten().tolist()
        )


@pytest.mark.parametrize('ratio', [0, 1, -0.2, 1.5, 0.999])
def test_bad_ratio_is_one_line(ratio):
    with pytest.raises(StudyError, match='mask ratio') as e:
        random_mask(2, (4, 4), ratio, G())
    assert '\n' not in str(e.value)

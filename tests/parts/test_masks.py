"Masks: exact counts and statistics of the official generators (golden/masks)."

import pytest
import torch
from mimstudy.core.errors import StudyError
from mimstudy.parts.masks import block_mask, independent_masks, make_mask, random_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_components(hidden):
    "Mean number of 4-connected components of the hidden patches (n,H,W), by propagation of labels."
    start = torch.arange(hidden[0].numel()).reshape(hidden.shape[1:]) + 1
    label = torch.where(hidden, start, 0)
    for _ in range(hidden[0].numel()):
        pad = torch.nn.functional.pad(label, (1, 1, 1, 1))
        neighbours = [label, pad[:, :-2, 1:-1], pad[:, 2:, 1:-1], pad[:, 1:-1, :-2], pad[:, 1:-1, 2:]]
        new = torch.where(hidden, torch.stack(neighbours).amax(0), 0)
        if new.equal(label):
            break
        label = new
    return ((label == start) & hidden).sum((1, 2)).float().mean().item()


@pytest.mark.parametrize('unit, ratio', [(1, 40), (1, 60), (1, 75), (1, 90), (2, 60), (2, 75), (2, 90)])
def test_random_counts(golden, ratio, unit):
    facts = golden('masks.json')[f'conmim_random_mps{16 * unit}_{ratio}']
    mask = random_mask(500, (14, 14), ratio / 100, generator(), unit)
    count = int(facts['masked_mean'])
    assert (mask.hidden.sum(1) == facts['masked_mean']).all()
    assert abs(mean_components(mask.hidden.reshape(-1, 14, 14)) - facts['components_mean']) < 0.25
    assert mask.predict.shape == (500, count)
    assert mask.visible.shape == (500, 196 - count)


@pytest.mark.parametrize('ratio', [60, 75, 90])
def test_floor_counts(golden, ratio):
    counts = random_mask(50, (14, 14), ratio / 100, generator(), rounding='floor').hidden.sum(1)
    assert (counts == golden('masks.json')[f'conmim_RandomMaskingGenerator_{ratio}']['masked_mean']).all()


@pytest.mark.parametrize('count', [75, 78, 118, 147, 176])
def test_block_statistics(golden, count):
    facts = golden('masks.json')[f'beit_block_{count}']
    frequency = golden('masks')[f'beit_block_{count}.cell_freq']
    hidden = block_mask(4000, (14, 14), count, generator()).hidden.reshape(-1, 14, 14)
    counts = hidden.sum((1, 2)).float()
    assert counts.max() <= count
    assert abs(counts.mean() - facts['masked_mean']) < 0.3
    assert abs(mean_components(hidden) - facts['components_mean']) < 0.1
    assert (hidden.float().mean(0) - frequency).abs().max() < (0.05 if count == 176 else 0.04)


def test_independent_masks_overlap_as_expected():
    mask = independent_masks(3000, (14, 14), 0.6, 0.6, generator())
    predicted = torch.zeros(3000, 196, dtype=torch.bool).scatter_(1, mask.predict, True)
    overlap = (predicted & ~mask.hidden).sum(1).float()
    assert abs(overlap.mean() - 46.95) < 0.3
    assert abs(overlap.std() - 3.34) < 0.2


def test_indices_agree_with_the_boolean_matrix():
    hidden = block_mask(50, (14, 14), 75, generator()).hidden
    mask = make_mask(hidden)
    for row, indices, weight in zip(hidden, mask.predict, mask.weight):
        assert indices[weight.bool()].tolist() == row.nonzero().flatten().tolist()
    mask = random_mask(50, (14, 14), 0.6, generator())
    for row, predict, visible in zip(mask.hidden, mask.predict, mask.visible):
        assert predict.tolist() == row.nonzero().flatten().tolist()
        assert visible.tolist() == (~row).nonzero().flatten().tolist()


@pytest.mark.parametrize('ratio', [0, 1, -0.2, 1.5, 0.999])
def test_bad_ratio_is_an_error_of_one_line(ratio):
    with pytest.raises(StudyError, match='mask ratio') as error:
        random_mask(2, (4, 4), ratio, generator())
    assert '\n' not in str(error.value)

"Random crop boxes: distributed as torchvision's, inside the image, areas in their range."

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from mimstudy.core.crops import sample_crop_boxes

RATIO = (3 / 4, 4 / 3)
MEASURES = dict(
    area=lambda boxes: boxes[:, 2] * boxes[:, 3],
    ratio=lambda boxes: boxes[:, 3] / boxes[:, 2],
    top=lambda boxes: boxes[:, 0],
    left=lambda boxes: boxes[:, 1],
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def largest_difference(a, b):
    "The Kolmogorov-Smirnov distance of two samples: the largest difference of their distribution functions."
    a, b = a.sort().values, b.sort().values
    grid = torch.cat([a, b]).unique()
    below = [torch.searchsorted(sample, grid, right=True) / len(sample) for sample in (a, b)]
    return (below[0] - below[1]).abs().max()


@pytest.mark.parametrize('side', [(64, 64), (48, 96), (20, 100)])
def test_boxes_are_distributed_as_torchvisions(side):
    torch.manual_seed(0)
    image, scale = torch.zeros(1, *side), (0.08, 1.0)
    expected = [RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(8000)]
    expected = torch.tensor(expected).double()
    boxes = sample_crop_boxes(8000, *side, scale, RATIO, seeded()).double()
    for name, measure in MEASURES.items():
        distance = largest_difference(measure(boxes), measure(expected))
        assert distance < 0.031, f'{name}: beyond the 0.1 % level'


@pytest.mark.parametrize('scale', [(0.08, 1.0), (0.5, 1.0), (0.05, 0.4)])
def test_area_stays_in_its_range(scale):
    boxes = sample_crop_boxes(5000, 224, 224, scale, RATIO, seeded())
    share = boxes[:, 2] * boxes[:, 3] / 224**2
    assert share.min() > scale[0] - 0.01
    assert share.max() < scale[1] + 0.01
    assert share.min() < scale[0] + 0.02
    assert share.max() > scale[1] - 0.06


@pytest.mark.parametrize('side', [(48, 48), (375, 500), (300, 30)])
def test_boxes_lie_inside_the_image(side):
    boxes = sample_crop_boxes(2000, *side, (0.08, 1.0), RATIO, seeded())
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(side)).all()


def test_an_image_too_narrow_for_any_box_gets_the_largest_centred_one():
    wide = sample_crop_boxes(5, 10, 1000, (0.9, 1.0), RATIO, seeded())
    high = sample_crop_boxes(5, 1000, 10, (0.9, 1.0), RATIO, seeded())
    assert torch.equal(wide, torch.tensor([[0, 493, 10, 13]]).expand(5, 4))
    assert torch.equal(high, torch.tensor([[493, 0, 13, 10]]).expand(5, 4))

"Scenes: exact truth against slow twins, independence of n, start and size, and how hard they are."

import pytest
import torch
from torch import nn
from mimstudy.core.scenes import (
    _OBJECTS,
    BACKGROUNDS,
    CHUNK,
    CLASSES,
    OBJECTS,
    REGIONS,
    SLOTS,
    _boxes,
    _shapes,
    scenes,
)


@pytest.fixture(scope='module')
def world():
    return scenes(96, 32)


def test_shapes_and_types(world):
    n = 96
    assert world.images.shape == (n, 3, 32, 32) and world.images.dtype == torch.uint8
    assert world.label.shape == (n,) and world.label.dtype == torch.long
    assert world.maps.shape == (n, 32, 32) and world.maps.dtype == torch.uint8
    assert world.boxes.shape == (n, SLOTS, 4) and world.boxes.dtype == torch.float32
    assert world.instances.shape == (n, SLOTS, 32, 32) and world.instances.dtype == torch.bool
    assert world.kinds.shape == (n, SLOTS) and world.kinds.dtype == torch.long
    assert CLASSES == OBJECTS and REGIONS == BACKGROUNDS + OBJECTS and len(CLASSES) == 12


@pytest.mark.parametrize('start,n', [(0, 1), (5, 1), (60, 8), (CHUNK, 3), (90, 6)])
def test_image_depends_on_its_number_only(world, start, n):
    for a, b in zip(scenes(n, 32, start=start), world):
        assert torch.equal(a, b[start : start + n])


def test_threads_change_nothing(world):
    torch.set_num_threads(2)
    try:
        assert torch.equal(scenes(64, 32).images, world.images[:64])
    finally:
        torch.set_num_threads(1)


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    scenes(2, 32)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_are_other_worlds(world):
    other = scenes(96, 32, seed=1)
    assert (other.images.float() - world.images.float()).abs().mean((1, 2, 3)).min() > 5
    assert len(torch.cat([world.images, other.images]).flatten(1).unique(dim=0)) == 192


def test_layout_is_the_same_at_every_size(world):
    for size in (16, 48, 64):
        larger = scenes(96, size)
        assert torch.equal(larger.label, world.label)
        seen = (world.kinds >= 0) & (larger.kinds >= 0)
        assert seen.sum() > 150 and (
            larger.boxes[seen] / size - world.boxes[seen] / 32
        ).abs().mean() < 0.6 / min(size, 32)


def test_maps_instances_and_kinds_agree(world):
    "Slow twin: every pixel asked one by one."
    for i in range(24):
        for y in range(32):
            for x in range(32):
                owners = world.instances[i, :, y, x].nonzero()[:, 0].tolist()
                assert len(owners) <= 1
                region = int(world.maps[i, y, x])
                assert (
                    region < len(BACKGROUNDS)
                    if not owners
                    else region == world.kinds[i, owners[0]] + len(BACKGROUNDS)
                )


def test_label_is_the_largest_visible_object(world):
    area = world.instances.flatten(2).sum(2)
    for i in range(96):
        assert world.label[i] == world.kinds[i, area[i].tolist().index(area[i].max())]
        assert all((area[i, o] > 0) == (world.kinds[i, o] >= 0) for o in range(SLOTS))
    assert (world.label >= 0).all()


def test_boxes_against_a_slow_twin(world):
    for i in range(96):
        for o in range(SLOTS):
            y, x = world.instances[i, o].nonzero(as_tuple=True)
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [-1] * 4
            assert world.boxes[i, o].tolist() == [float(v) for v in box]


def test_boxes_at_the_edges():
    mask = torch.zeros(1, 3, 5, 5, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 1, 4, 4] = True
    assert _boxes(mask)[0].tolist() == [[0, 0, 1, 1], [4, 4, 5, 5], [-1, -1, -1, -1]]


@pytest.mark.parametrize('kind', range(len(OBJECTS)))
def test_equal_area_at_equal_radius(kind):
    "Closed form: an object of radius r covers r x r of the image, turned or not."
    for radius, turn in ((0.3, 0.0), (0.3, 1.0), (0.45, -0.4)):
        one = [torch.tensor([[v]]) for v in (kind, radius, turn, 1.0)]
        distance, texture = _shapes(*one, torch.tensor([[[0.5, 0.5]]]), 256)
        assert (distance[0, 0] < 0).float().mean() == pytest.approx(radius**2, rel=0.03)
        inside = texture[distance < 0]
        assert inside.min() > -0.1 and inside.max() < 1.3


def test_a_ball_is_a_disc():
    one = [torch.tensor([[v]]) for v in (OBJECTS.index('ball'), 0.4, 0.7, 0.0)]
    distance, _ = _shapes(*one, torch.tensor([[[0.4, 0.6]]]), 128)
    line = torch.arange(128) + 0.5
    exact = ((line - 0.4 * 128) ** 2 + (line[:, None] - 0.6 * 128) ** 2).sqrt() - 0.4 * 128 / torch.pi**0.5
    assert (distance[0, 0] - exact).abs().max() < 0.1


def test_every_object_has_an_inside_and_an_outside():
    u, v = torch.meshgrid(torch.linspace(-2, 2, 81), torch.linspace(-2, 2, 81), indexing='xy')
    for shape in _OBJECTS.values():
        distance, texture = shape(u, v, torch.zeros(1))
        assert distance.isfinite().all() and texture.isfinite().all()
        assert (distance < 0).any() and (distance[:, 0] > 0).all() and (distance[0] > 0).all()


def test_balanced_and_not_told_by_colour():
    train, test = scenes(1536, 32), scenes(384, 32, seed=1)
    counts = torch.bincount(train.label, minlength=12)
    assert counts.min() > 0.8 * 128 and counts.max() < 1.2 * 128

    def score(a, b):
        return (train.label[torch.cdist(b, a).argmin(1)] == test.label).float().mean()

    def colour(s):
        mask = s.instances[torch.arange(len(s.label)), s.instances.sum((2, 3)).argmax(1)][:, None]
        return (s.images * mask).float().sum((2, 3)) / mask.sum((2, 3))

    assert score(colour(train), colour(test)) < 0.15
    assert 0.12 < score(train.images.flatten(1) / 255, test.images.flatten(1) / 255) < 0.4


@pytest.mark.slow
def test_a_small_network_learns_the_classes():
    train, test = scenes(4096, 32), scenes(1024, 32, seed=1)
    torch.manual_seed(0)

    def layer(i, o, stride):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    net = nn.Sequential(
        layer(3, 24, 1),
        layer(24, 48, 2),
        layer(48, 96, 2),
        layer(96, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 12),
    )
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=6 * 64)
    for _ in range(6):
        for ids in torch.randperm(4096).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(train.images[ids] / 255 - 0.5), train.label[ids]).backward()
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        right = (net(test.images / 255 - 0.5).argmax(1) == test.label).float().mean()
    assert right > 0.7

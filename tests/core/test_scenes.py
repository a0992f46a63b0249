"Scenes: labels, maps and boxes against slow reference code, reproducibility, and how hard the classes are."

import pytest
import torch
from torch import nn

from mimstudy.core.scene_objects import SHAPES, draw_objects
from mimstudy.core.scenes import (
    BACKGROUNDS,
    CHUNK,
    CLASSES,
    OBJECTS,
    REGIONS,
    SLOTS,
    boxes_around,
    scenes,
)


@pytest.fixture(scope='module')
def batch():
    return scenes(96, 32)


# -- shapes and reproducibility -----------------------------------------------------------------------------


def test_shapes_and_types(batch):
    n = 96
    assert batch.images.shape == (n, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.label.shape == (n,) and batch.label.dtype == torch.long
    assert batch.maps.shape == (n, 32, 32) and batch.maps.dtype == torch.uint8
    assert batch.boxes.shape == (n, SLOTS, 4) and batch.boxes.dtype == torch.float32
    assert batch.instances.shape == (n, SLOTS, 32, 32) and batch.instances.dtype == torch.bool
    assert batch.kinds.shape == (n, SLOTS) and batch.kinds.dtype == torch.long
    assert CLASSES == OBJECTS and len(CLASSES) == 12
    assert REGIONS == BACKGROUNDS + OBJECTS


@pytest.mark.parametrize('start,n', [(0, 1), (5, 1), (60, 8), (CHUNK, 3), (90, 6)])
def test_an_image_depends_only_on_its_number(batch, start, n):
    for part, expected in zip(scenes(n, 32, start=start), batch):
        assert torch.equal(part, expected[start : start + n])


def test_number_of_threads_changes_nothing(batch):
    torch.set_num_threads(2)
    try:
        assert torch.equal(scenes(64, 32).images, batch.images[:64])
    finally:
        torch.set_num_threads(1)


def test_global_random_state_is_not_used():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    scenes(2, 32)
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_gives_other_images(batch):
    other = scenes(96, 32, seed=1)
    difference = (other.images.float() - batch.images.float()).abs().mean((1, 2, 3))
    assert difference.min() > 5
    assert len(torch.cat([batch.images, other.images]).flatten(1).unique(dim=0)) == 192


@pytest.mark.parametrize('size', [16, 48, 64])
def test_layout_is_the_same_at_every_size(batch, size):
    resized = scenes(96, size)
    assert torch.equal(resized.label, batch.label)
    in_both = (batch.kinds >= 0) & (resized.kinds >= 0)
    assert in_both.sum() > 150
    distance = (resized.boxes[in_both] / size - batch.boxes[in_both] / 32).abs().mean()
    assert distance < 0.6 / min(size, 32)


# -- labels -------------------------------------------------------------------------------------------------


def test_maps_instances_and_kinds_agree_at_every_pixel(batch):
    for i in range(24):
        for y in range(32):
            for x in range(32):
                owners = batch.instances[i, :, y, x].nonzero()[:, 0].tolist()
                assert len(owners) <= 1
                region = int(batch.maps[i, y, x])
                if owners:
                    assert region == batch.kinds[i, owners[0]] + len(BACKGROUNDS)
                else:
                    assert region < len(BACKGROUNDS)


def test_label_is_the_class_of_the_largest_visible_object(batch):
    area = batch.instances.flatten(2).sum(2)
    for i in range(96):
        largest = area[i].tolist().index(area[i].max())
        assert batch.label[i] == batch.kinds[i, largest]
        for o in range(SLOTS):
            assert (area[i, o] > 0) == (batch.kinds[i, o] >= 0)
    assert (batch.label >= 0).all()


def test_boxes_equal_a_slow_reference(batch):
    for i in range(96):
        for o in range(SLOTS):
            y, x = batch.instances[i, o].nonzero(as_tuple=True)
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [-1] * 4
            assert batch.boxes[i, o].tolist() == [float(edge) for edge in box]


def test_boxes_at_the_border_of_the_image():
    mask = torch.zeros(1, 3, 5, 5, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    mask[0, 1, 4, 4] = True
    assert boxes_around(mask)[0].tolist() == [[0, 0, 1, 1], [4, 4, 5, 5], [-1, -1, -1, -1]]


# -- shapes of objects --------------------------------------------------------------------------------------


def draw_one(name, radius, angle, phase, centre, size):
    "Signed distance and texture (size,size) of a single object."
    values = (OBJECTS.index(name), radius, angle, phase)
    parameters = [torch.tensor([[value]]) for value in values]
    distance, texture = draw_objects(*parameters, torch.tensor([[centre]]), size)
    return distance[0, 0], texture[0, 0]


@pytest.mark.parametrize('name', OBJECTS)
@pytest.mark.parametrize('radius,angle', [(0.3, 0.0), (0.3, 1.0), (0.45, -0.4)])
def test_area_is_the_square_of_the_radius(name, radius, angle):
    distance, texture = draw_one(name, radius, angle, 1.0, [0.5, 0.5], 256)
    assert (distance < 0).float().mean() == pytest.approx(radius**2, rel=0.03)
    inside = texture[distance < 0]
    assert inside.min() > -0.1 and inside.max() < 1.3


def test_ball_is_a_disc():
    distance, _ = draw_one('ball', 0.4, 0.7, 0.0, [0.4, 0.6], 128)
    line = torch.arange(128) + 0.5
    from_centre = ((line - 0.4 * 128) ** 2 + (line[:, None] - 0.6 * 128) ** 2).sqrt()
    expected = from_centre - 0.4 * 128 / torch.pi**0.5
    assert (distance - expected).abs().max() < 0.1


def test_every_shape_has_an_inside_and_an_outside():
    u, v = torch.meshgrid(torch.linspace(-2, 2, 81), torch.linspace(-2, 2, 81), indexing='xy')
    for shape in SHAPES.values():
        distance, texture = shape(u, v, torch.zeros(1))
        assert distance.isfinite().all() and texture.isfinite().all()
        assert (distance < 0).any()
        assert (distance[:, 0] > 0).all() and (distance[0] > 0).all()


# -- difficulty of the classes ------------------------------------------------------------------------------


def test_classes_are_balanced_and_cannot_be_told_by_colour():
    train, test = scenes(1536, 32), scenes(384, 32, seed=1)
    counts = torch.bincount(train.label, minlength=12)
    assert counts.min() > 0.8 * 128 and counts.max() < 1.2 * 128

    def nearest_neighbour_accuracy(train_features, test_features):
        nearest = torch.cdist(test_features, train_features).argmin(1)
        return (train.label[nearest] == test.label).float().mean()

    def mean_colour(of):
        largest = of.instances.sum((2, 3)).argmax(1)
        mask = of.instances[torch.arange(len(of.label)), largest][:, None]
        return (of.images * mask).float().sum((2, 3)) / mask.sum((2, 3))

    def pixels(of):
        return of.images.flatten(1) / 255

    assert nearest_neighbour_accuracy(mean_colour(train), mean_colour(test)) < 0.15
    assert 0.12 < nearest_neighbour_accuracy(pixels(train), pixels(test)) < 0.4


def small_network():
    "A convolutional network of four layers."
    layers = []
    for into, out, stride in ((3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 128, 2)):
        conv = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 12))


@pytest.mark.slow
def test_a_small_network_learns_the_classes():
    train, test = scenes(4096, 32), scenes(1024, 32, seed=1)
    torch.manual_seed(0)
    net = small_network()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=6 * 64)
    for _ in range(6):
        for ids in torch.randperm(4096).split(64):
            optimiser.zero_grad()
            logits = net(train.images[ids] / 255 - 0.5)
            nn.functional.cross_entropy(logits, train.label[ids]).backward()
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        predictions = net(test.images / 255 - 0.5).argmax(1)
    assert (predictions == test.label).float().mean() > 0.7

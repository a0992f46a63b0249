"Views and colour augmentation: compared with torchvision image by image; alignment, seeds, time."

import time

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from conftest import assert_close
from torchvision.transforms import InterpolationMode

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.parts import colour
from mimstudy.parts.colour import (
    COLOUR_AUGMENTATIONS,
    ColourAugmentation,
    jitter,
    jitter_amounts,
    apply_to_some,
    augment_colours,
)
from mimstudy.parts.views import (
    MultiCrop,
    Views,
    sample_crop_boxes,
    random_resized_crop,
    crop_and_resize,
    denormalise,
    normalise,
    resize_only,
)

NOTHING = ColourAugmentation((0.0, 0.0, 0.0, 0.0), 0.0, 0.0, 0.0, 0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def images():
    return scenes(16, size=64, seed=7).images


@pytest.fixture(scope='module')
def x(images):
    return images.float() / 255


# -- crops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'side, size', [((64, 64), 64), ((64, 64), 32), ((64, 64), 96), ((48, 80), 40), ((256, 256), 224)]
)
def test_crop_and_resize_is_torchvisions_antialiased_crop(side, size):
    images = torch.randint(0, 256, (12, 3, *side), generator=seeded(), dtype=torch.uint8)
    boxes, flip = (
        sample_crop_boxes(12, *side, (0.08, 1.0), (3 / 4, 4 / 3), seeded(1)),
        torch.arange(12) % 2 == 1,
    )
    for result, image, box, mirrored in zip(
        crop_and_resize(images, boxes, flip, size), images, boxes.tolist(), flip
    ):
        expected = tv.resized_crop(
            image.float() / 255, *box, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
        ).clamp(0, 1)
        assert_close(result, tv.horizontal_flip(expected) if mirrored else expected)


def test_resize_only_is_a_resize(images):
    expected = tv.resize(
        images.float() / 255, [40, 40], interpolation=InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    assert_close(resize_only(images, 40), expected)
    assert torch.equal(resize_only(images, 64), images.float() / 255)


def test_flip(images):
    straight, mirrored = (random_resized_crop(images, 32, flip=p, generator=seeded(3)) for p in (0.0, 1.0))
    assert_close(mirrored, straight.flip(3))
    some = random_resized_crop(images, 32, flip=0.5, generator=seeded(3))
    flipped = (some - mirrored).abs().amax((1, 2, 3)) < 1e-5
    assert_close(some[~flipped], straight[~flipped])
    assert 3 <= flipped.sum() <= 13


# -- colours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'operation, torchvision_operation, low, high',
    [
        (colour.brightness, tv.adjust_brightness, 0.6, 1.4),
        (colour.contrast, tv.adjust_contrast, 0.6, 1.4),
        (colour.saturation, tv.adjust_saturation, 0.6, 1.4),
        (colour.hue, tv.adjust_hue, -0.5, 0.5),
        (colour.blur, lambda a, s: tv.gaussian_blur(a, [17, 17], [s, s]), 0.1, 2.0),
    ],
    ids=['brightness', 'contrast', 'saturation', 'hue', 'blur'],
)
def test_colour_operations_are_torchvisions(x, operation, torchvision_operation, low, high):
    amount = torch.linspace(low, high, len(x))
    expected = torch.stack([torchvision_operation(a, f) for a, f in zip(x, amount.tolist())])
    assert_close(operation(x, amount), expected)


def test_grey_and_solarize_are_torchvisions(x):
    assert_close(colour.grey(x), tv.rgb_to_grayscale(x))
    assert torch.equal(colour.solarize(x), tv.solarize(x, 0.5))


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (2, 0, 3, 1), (1, 2, 0)])
def test_jitter_is_torchvisions_in_the_same_order(x, order):
    amounts = jitter_amounts(len(x), (0.4, 0.4, 0.2, 0.1), seeded())
    operations = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue

    def torchvision_jitter(image, own):
        for i in order:
            image = operations[i](image, own[i].item())
        return image

    assert_close(
        jitter(x, amounts, order),
        torch.stack([torchvision_jitter(a, own) for a, own in zip(x, amounts.T)]),
        1e-5,
    )


def test_amounts_fill_their_range():
    amounts = jitter_amounts(20_000, (0.4, 0.3, 0.2, 0.1), seeded())
    assert_close(amounts.amax(1), torch.tensor([1.4, 1.3, 1.2, 0.1]), 1e-3)
    assert_close(amounts.amin(1), torch.tensor([0.6, 0.7, 0.8, -0.1]), 1e-3)
    assert_close(amounts.std(1), torch.tensor([0.4, 0.3, 0.2, 0.1]) / 3**0.5, 0.02)


@pytest.mark.parametrize('name', ['grey', 'blur', 'solarize', 'jitter'])
def test_operations_have_their_probabilities(name):
    x = scenes(1, size=16).images.float().expand(2000, -1, -1, -1) / 255
    done = augment_colours(x, NOTHING._replace(strength=(0.4, 0.4, 0.2, 0.1), **{name: 0.2}), seeded())
    share = (done != x).flatten(1).any(1).float().mean()
    assert abs(share - 0.2) < 0.03


def test_probabilities_zero_and_one(x):
    assert apply_to_some(x, 0.0, colour.solarize, seeded()) is x
    assert torch.equal(apply_to_some(x, 1.0, colour.solarize, seeded()), colour.solarize(x))
    assert torch.equal(augment_colours(x, NOTHING, seeded()), x)


def test_amounts_stay_with_their_images(x):
    names = torch.arange(16.0)
    changed = apply_to_some(
        torch.zeros(16, 1, 1, 1),
        0.5,
        lambda y, a, b: y + a[:, None, None, None] + b[1][:, None, None, None],
        seeded(),
        names,
        torch.stack([-names, names]),
    ).flatten()
    assert ((changed == 2 * names) | (changed == 0)).all() and 2 < (changed > 0).sum() < 15


def test_paper_and_release_differ_as_written():
    paper, release = COLOUR_AUGMENTATIONS['paper'], COLOUR_AUGMENTATIONS['release']
    assert (release.jitter, release.grey, paper.jitter, paper.grey) == (0.8, 0.2, 1.0, 0.0)
    assert (
        (release.strength, release.blur, release.solarize)
        == (paper.strength, paper.blur, paper.solarize)
        == ((0.4, 0.4, 0.2, 0.1), 0.1, 0.2)
    )


# -- views ---------------------------------------------------------------------------------------------------


def test_normalise_is_torchvisions(x):
    assert_close(normalise(x), tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert_close(denormalise(normalise(x)), x)


def test_views_are_aligned(images, monkeypatch):
    views = Views(32, ('weak', 'strong', 'strong', 'jitter'))
    weak, strong, other, jittered = views(images, seeded())
    assert (
        not torch.equal(weak, strong) and not torch.equal(strong, other) and not torch.equal(weak, jittered)
    )
    for name in ('paper', 'jitter'):
        monkeypatch.setitem(COLOUR_AUGMENTATIONS, name, NOTHING)
    for view in views(images, seeded()):
        assert torch.equal(view, weak)


def test_strong_views_show_the_crop_of_the_weak_one(images, monkeypatch):
    "A strong view correlates most with the weak view of the same crop."
    views = Views(32, ('weak', 'strong'))
    monkeypatch.setitem(COLOUR_AUGMENTATIONS, 'paper', ColourAugmentation(solarize=0.0))
    flat = [
        torch.nn.functional.normalize((v := colour.grey(view).flatten(1)) - v.mean(1, keepdim=True), dim=1)
        for view in views(images, seeded())
    ]
    assert ((flat[1] @ flat[0].T).argmax(1) == torch.arange(16)).float().mean() >= 0.9


@pytest.mark.parametrize(
    'make',
    [
        lambda: Views(32, ('weak', 'strong')),
        lambda: Views(32, ('jitter',)),
        lambda: Views(32, ('rand',)),
        lambda: Views(32, ('rand+jitter',)),
        lambda: MultiCrop(32, 8, locals=2, local_size=16),
    ],
)
def test_the_seed_decides_everything(images, make):
    torch.manual_seed(1)
    first = make()(images, seeded(5))
    torch.manual_seed(2)
    again, other = make()(images, seeded(5)), make()(images, seeded(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_each_call_continues_the_generator(images):
    views, g = Views(32, ('weak',)), seeded()
    assert not torch.equal(views(images, g)[0], views(images, g)[0])


def test_every_image_has_its_own_random_numbers(images):
    same = images[3:4].expand(24, -1, -1, -1)
    for view in Views(32, ('weak', 'strong'))(same, seeded()) + MultiCrop(32, 8, locals=1, local_size=16)(
        same, seeded()
    ):
        assert torch.pdist(view.flatten(1)).min() > 0.1
    in_place = augment_colours(same.float() / 255, COLOUR_AUGMENTATIONS['jitter'], seeded())
    assert torch.pdist(in_place.flatten(1)).min() > 0.01


def test_images_of_a_batch_do_not_affect_each_other(images):
    "Changing one image of a batch changes no other view."
    changed = images.clone()
    changed[5] = 255 - changed[5]
    before, after = (Views(32, ('weak', 'strong'))(p, seeded()) for p in (images, changed))
    others = torch.arange(16) != 5
    for a, b in zip(before, after):
        assert_close(b[others], a[others])
        assert not torch.equal(a[5], b[5])


@pytest.mark.parametrize('kind', ['weak', 'strong', 'release', 'jitter', 'resize'])
def test_values_stay_in_their_range(images, kind):
    for seed in range(4):
        (view,) = Views(48, (kind,))(images, seeded(seed))
        back = denormalise(view)
        assert (
            view.dtype == torch.float32
            and view.shape == (16, 3, 48, 48)
            and back.min() > -1e-6
            and back.max() < 1 + 1e-6
        )


def test_autocast_does_not_reduce_precision(images):
    views = Views(32, ('weak',))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (coarse,) = views(images, seeded())
    assert torch.equal(coarse, views(images, seeded())[0])


def test_multi_crop(images):
    crops = MultiCrop(64, 8, locals=3, local_size=24)(images, seeded())
    assert [tuple(c.shape[-2:]) for c in crops] == [(64, 64)] * 2 + [(24, 24)] * 3
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[2], crops[3])
    detail = [
        (c[..., 1:] - c[..., :-1]).abs().mean()
        for c in (crops[0], MultiCrop(64, 8, kinds=('global2',))(images, seeded())[0])
    ]
    assert detail[0] < 0.8 * detail[1], 'the first large view is always blurred'


def test_wrong_arguments_are_reported():
    for wrong, message in (
        (lambda: Views(32, ('week',)), 'did you mean weak'),
        (lambda: Views(32, ('resize', 'weak')), 'not cropped'),
        (lambda: Views(32, ('weak', 'relase')), 'did you mean release'),
        (lambda: MultiCrop(224, 16, locals=2, local_size=100), 'take 96 or 112'),
        (lambda: MultiCrop(60, 8), 'take 56 or 64'),
        (lambda: MultiCrop(64, 8, kinds=('globe1',)), 'did you mean global1'),
    ):
        with pytest.raises(StudyError, match=message) as e:
            wrong()
        assert '\n' not in str(e.value)


# -- machines ------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(
    'make',
    [lambda: Views(64, ('weak', 'strong', 'jitter')), lambda: MultiCrop(64, 8, locals=2, local_size=32)],
)
def test_a_gpu_makes_the_same_views_without_synchronisation(images, make):
    expected, there = make()(images, seeded()), images.cuda()
    make()(there, seeded())
    torch.cuda.set_sync_debug_mode('error')
    try:
        got = make()(there, seeded())
    finally:
        torch.cuda.set_sync_debug_mode('default')
    for a, b in zip(got, expected):
        assert_close(a.cpu(), b, 1e-4)


@pytest.mark.slow
def test_views_take_little_time_beside_a_training_step():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=12, num_heads=3, num_classes=10)
    optimiser, label = torch.optim.AdamW(model.parameters()), torch.arange(256) % 10
    images, views, g = scenes(256, size=64).images, Views(64, ('weak', 'strong')), seeded()

    def step(x):
        torch.nn.functional.cross_entropy(model(x), label).backward()
        optimiser.step()
        optimiser.zero_grad()

    def seconds(function, *arguments):
        function(*arguments)
        start = time.perf_counter()
        out = function(*arguments)
        return time.perf_counter() - start, out

    making, (weak, _) = seconds(views, images, g)
    training, _ = seconds(step, weak)
    print(f'views {1000 * making:.0f} ms, step {1000 * training:.0f} ms, ratio {making / training:.1%}')
    assert making < 0.15 * training

"Image sets: archives, folders, broken files, caches, crops, and the names that find them."

import io
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine import datasets as room
from mimstudy.engine.image_folder import RandomCrop, FolderDataset, decode_image, fit, list_images, random_crop
from mimstudy.engine.datasets import (
    DATASETS,
    InMemoryDataset,
    cache_file,
    first_of_each,
    load_dataset,
    read_archive,
    read_folder,
)

KINDS = ['ant', 'bee', 'cat']


def image(i, side=48, wide=1.0):
    "Image number i: noise whose seed is i."
    noise = torch.randint(
        0, 256, (side, int(wide * side), 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy())


def encoded(i, **size):
    image(i, **size).save(file := io.BytesIO(), 'jpeg')
    return file.getvalue()


def members(torn=()):
    "30 training and 9 test images of three classes, with the bytes of those in `torn` cut short."
    for i in range(39):
        data = encoded(i)
        yield (
            f'{"train" if i < 30 else "test"}/{KINDS[i % 3]}/{i:03}.jpg',
            data[: len(data) // 2] if i in torn else data,
        )


def pack(path, torn=(), extra=()):
    with tarfile.open(path, 'w:xz') as archive:
        for name, data in (*members(torn), *extra):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def unpack(root, torn=()):
    for name, data in members(torn):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(autouse=True)
def private(request, tmp_path, monkeypatch):
    "Cache and data folder of each test are its own."
    (tmp_path / 'data').mkdir()
    monkeypatch.setenv('MIMSTUDY_CACHE', str(tmp_path / 'cache'))
    if 'real_data' not in request.fixturenames:
        monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return call(*args, **kwargs), [str(w.message) for w in caught]


# --- in memory


def test_batches_are_what_the_order_says():
    world = scenes(40, 16)
    held = InMemoryDataset(world.images, world.label, ['x'] * 12)
    orders = list(torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7))
    for (x, y), ids in zip(held.batches(orders, workers=3), orders):
        assert (
            torch.equal(x, world.images[ids]) and torch.equal(y, world.label[ids]) and x.dtype == torch.uint8
        )
    assert len(held) == 40 and held.side == 16 and held.crop is None and held.broken == 0


def test_first_of_each_against_a_loop():
    labels = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(0))
    for n in (1, 3, 9, 100, None):
        seen, slow = [0] * 5, []
        for i, k in enumerate(labels.tolist()):
            seen[k] += 1
            if seen[k] <= (n or 60):
                slow.append(i)
        assert first_of_each(labels, n).tolist() == slow


def test_subset_is_balanced_and_seeded():
    world = scenes(120, 16)
    held = InMemoryDataset(world.images, world.label, ['x'] * 12)
    a, b, c = held.subset(4), held.subset(4), held.subset(4, seed=1)
    assert torch.bincount(a.labels).tolist() == [4] * 12
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, c.images)


# --- archives


def test_archive_equals_folder(tmp_path):
    file, root = pack(tmp_path / 'set.tar.xz'), unpack(tmp_path / 'set')
    for split in ('train', 'val', 'test'):
        for size in (48, 32):
            a, b = read_archive(file, split, size, None, True), read_folder(root, split, size, None, True)
            assert (
                torch.equal(a.images, b.images)
                and torch.equal(a.labels, b.labels)
                and a.classes == b.classes == KINDS
            )
            assert len(a) == (30 if split == 'train' else 9) and a.images.dtype == torch.uint8


def test_archive_keeps_every_byte_at_its_own_size(tmp_path):
    held = read_archive(pack(tmp_path / 'set.tar.xz'), 'train', 48, None, True)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded(4))))).permute(2, 0, 1)
    assert torch.equal(held.images[held.labels == 1][1], expected)


def test_per_class_is_a_beginning(tmp_path):
    file = pack(tmp_path / 'set.tar.xz')
    few, all_ = read_archive(file, 'train', 16, 2, True), read_archive(file, 'train', 16, None, True)
    assert few.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(few.images, all_.images[first_of_each(all_.labels, 2)])


def test_torn_image_in_an_archive(tmp_path):
    file = pack(tmp_path / 'set.tar.xz', torn=(4, 31))
    held, said = quiet(read_archive, file, 'train', 32, None, False)
    assert len(held) == 29 and held.broken == 1
    assert said == ['1 of 30 images cannot be decoded and are left out; the first is train/bee/004.jpg']
    with pytest.raises(StudyError, match='test/bee/031.jpg cannot be decoded'):
        read_archive(file, 'val', 32, None, True)


def test_archive_with_unsafe_and_odd_members(tmp_path):
    extra = [
        ('../../../outside/ant/a.jpg', encoded(50)),
        ('/train/ant/zz.jpg', encoded(51)),
        ('train/ant/notes.txt', b'text'),
        ('train/ant/._x.jpg', b'mac'),
        ('README.jpg', b'no'),
    ]
    file = pack(tmp_path / 'set.tar.xz', extra=extra)
    with tarfile.open(file) as archive:
        assert len(archive.getnames()) == 44
    held = read_archive(file, 'train', 32, None, True)
    assert len(held) == 31 and held.classes == KINDS
    assert not (tmp_path.parent / 'outside').exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        'data',
        'set.tar.xz',
    ]


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(encoded(1))
    with tarfile.open(tmp_path / 'set.tar.xz', 'w:xz') as archive:
        for name, data in members():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo('train/ant/link.jpg')
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / 'secret.jpg')
        archive.addfile(link)
    assert len(read_archive(tmp_path / 'set.tar.xz', 'train', 32, None, True)) == 30


@pytest.mark.parametrize('damage', ['half', 'text', 'empty'])
def test_damaged_archive_is_one_line(tmp_path, damage):
    file = pack(tmp_path / 'set.tar.xz')
    whole = file.read_bytes()
    file.write_bytes(
        {'half': whole[: len(whole) // 2], 'text': b'this is no archive' * 99, 'empty': b''}[damage]
    )
    with pytest.raises(StudyError) as e:
        read_archive(file, 'train', 32, None, True)
    assert 'set.tar.xz' in str(e.value) and '\n' not in str(e.value)


def test_missing_split_and_empty_class(tmp_path):
    file = pack(tmp_path / 'set.tar.xz', extra=[('train/dog/x.jpg', encoded(60))])
    with pytest.raises(StudyError, match='set.tar.xz/test: the class "dog" has no image'):
        read_archive(file, 'val', 32, None, True)
    with pytest.raises(StudyError, match='has no split "night"; it has: test, train'):
        read_archive(file, 'night', 32, None, True)
    root = unpack(tmp_path / 'set')
    (root / 'test' / 'dog').mkdir()
    with pytest.raises(StudyError, match='set/train: the class "dog" has no image'):
        read_folder(root, 'train', 32, None, True)


def test_nothing_can_be_decoded(tmp_path):
    file = pack(tmp_path / 'set.tar.xz', torn=range(39))
    with pytest.raises(StudyError, match='all 30 images beside it'):
        quiet(read_archive, file, 'train', 32, None, False)


# --- sizes and formats


def test_fit_is_a_centre_crop():
    wide = image(0, side=32, wide=2.0)
    middle = torch.from_numpy(np.array(wide))[:, 16:48].permute(2, 0, 1)
    assert torch.equal(fit(wide, 32), middle)
    assert fit(image(0, 33, 1.7), 20).shape == fit(image(0, 20, 1.01), 32).shape[:1] + (20, 20)
    for side, across, size in ((72, 1.31, 64), (375, 1.333, 224), (10, 3.7, 32), (501, 0.31, 64)):
        assert fit(image(1, side, across), size).shape == (3, size, size)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2))
    assert fit(ramp, 224)[0, 0, [0, -1]].tolist() == [16, 239] and fit(ramp, 128)[0, 0, 0] < 2, (
        'ImageNet images lose their border, small ones do not'
    )


def test_every_format_becomes_rgb(tmp_path):
    for mode, ending in (
        ('L', 'png'),
        ('RGBA', 'png'),
        ('P', 'gif'),
        ('CMYK', 'jpg'),
        ('1', 'bmp'),
        ('LA', 'png'),
        ('RGB', 'webp'),
    ):
        image(3).convert(mode).save(tmp_path / f'x.{ending}')
        assert decode_image(tmp_path / f'x.{ending}').mode == 'RGB', mode
    assert decode_image(tmp_path / 'absent.png') is None and decode_image(b'') is None


# --- the cache


def test_cache_gives_the_same_bytes_and_notices_change(tmp_path, monkeypatch):
    file = pack(tmp_path / 'data' / 'set.tar.xz')
    first = load_dataset('set', 'train', 32)
    monkeypatch.setattr(room, 'read_archive', lambda *_: pytest.fail('decoded again'))
    again = load_dataset('set', 'train', 32)
    assert (
        torch.equal(first.images, again.images)
        and torch.equal(first.labels, again.labels)
        and again.classes == KINDS
    )
    assert [p.suffix for p in (tmp_path / 'cache').iterdir()] == ['.safetensors']
    keys = {
        cache_file(file, *asked)
        for asked in (('train', 32, None), ('val', 32, None), ('train', 16, None), ('train', 32, 5))
    }
    file.touch()
    assert len(keys) == 4 and cache_file(file, 'train', 32, None) not in keys


@pytest.mark.parametrize('place', ['', 'file/below'])
def test_no_cache_costs_time_only(tmp_path, monkeypatch, place):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('MIMSTUDY_CACHE', str(tmp_path / place) if place else '')
    pack(tmp_path / 'data' / 'set.tar.xz')
    assert len(load_dataset('set', 'train', 32)) == 30


def test_strict_is_strict_through_the_cache(tmp_path):
    pack(tmp_path / 'data' / 'set.tar.xz', torn=(4,))
    held, said = quiet(load_dataset, 'set', 'train', 32)
    assert held.broken == 1 and len(said) == 1
    assert load_dataset('set', 'train', 32).broken == 1
    with pytest.raises(StudyError, match='train/bee/004.jpg cannot be decoded'):
        load_dataset('set', 'train', 32, strict=True)


# --- folders


@pytest.fixture
def large(tmp_path, monkeypatch):
    "A folder that is too large for memory, because memory has been made small."
    monkeypatch.setattr(room, 'IN_MEMORY', 0)
    return unpack(tmp_path / 'data' / 'many', torn=(4,))


ORDERS = list(torch.randperm(30, generator=torch.Generator().manual_seed(1)).split(8))


def test_large_folder_reproduces_with_any_workers(large):
    def run(workers, **crop):
        return quiet(
            lambda: list(load_dataset('many', 'train', 24, crop=RandomCrop(**crop)).batches(ORDERS, workers))
        )[0]

    here, there, late = (
        run(0),
        run(2),
        quiet(lambda: list(load_dataset('many', 'train', 24, crop=RandomCrop()).batches(ORDERS[2:], 1)))[0],
    )
    assert all(torch.equal(a, b) and torch.equal(k, m) for (a, k), (b, m) in zip(here, there))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(here[2:], late))  # resumed at step 2
    assert not torch.equal(here[0][0], run(0, seed=1)[0][0])
    assert (
        [len(x) for x, _ in here] == [8, 8, 8, 6]
        and here[0][0].shape == (8, 3, 24, 24)
        and here[0][0].dtype == torch.uint8
    )


def test_large_folder_skips_and_counts(large):
    kept = load_dataset('many', 'train', 24, crop=RandomCrop())
    assert isinstance(kept, FolderDataset) and kept.crop == RandomCrop() and kept.broken == 0 and kept.side == 24
    _, said = quiet(lambda: [list(kept.batches(ORDERS, workers)) for workers in (0, 2)])
    assert kept.broken == 1 and len(said) == 1 and '004.jpg cannot be decoded' in said[0]


def test_large_folder_replaces_label_with_image(large):
    files, labels, classes = list_images(large, 'train')
    torn = next(i for i, f in enumerate(files) if '004' in f)
    ((got, label),) = quiet(
        lambda: list(FolderDataset(files, labels, classes, 48).batches([torch.tensor([torn])]))
    )[0]
    assert label == labels[torn + 1] and torch.equal(got[0], fit(decode_image(files[torn + 1]), 48))


@pytest.mark.parametrize('side', [24, 160])
def test_a_set_is_shown_alike_in_memory_and_from_files(large, monkeypatch, side):
    "Otherwise a probe is fitted on one framing and scored on another, when one split fits into memory and the other does not."
    ids = torch.arange(9)
    from_files = next(iter(load_dataset('many', 'val', side, strict=True).batches([ids])))[0]
    monkeypatch.setattr(room, 'IN_MEMORY', 2**30)
    assert isinstance(
        kept := load_dataset('many', 'val', side, strict=True), InMemoryDataset
    ) and kept.images[ids].equal(from_files)


def test_large_folder_is_strict_in_evaluation(large):
    assert next(iter(load_dataset('many', 'val', 24, strict=True).batches([torch.arange(9)])))[0].shape == (
        9,
        3,
        24,
        24,
    )
    for workers in (0, 2):
        with pytest.raises(StudyError) as e:
            list(load_dataset('many', 'train', 24, strict=True).batches(ORDERS, workers))
        assert str(e.value).endswith('004.jpg cannot be decoded') and '\n' not in str(e.value)


def test_all_broken_ends(tmp_path):
    files, labels, classes = list_images(unpack(tmp_path / 'set', torn=range(39)), 'train')
    with pytest.raises(StudyError):
        quiet(lambda: list(FolderDataset(files, labels, classes, 24).batches([torch.arange(3)])))


def test_flat_folder_is_one_class(tmp_path):
    (tmp_path / 'data' / 'heap').mkdir()
    for i in range(4):
        image(i).save(tmp_path / 'data' / 'heap' / f'{i}.png')
    heap = load_dataset('heap', 'train', 32)
    assert heap.classes == ['images'] and heap.labels.tolist() == [0] * 4
    with pytest.raises(StudyError, match='heap has no split "val"; it has: no folders'):
        load_dataset('heap', 'val', 32)
    (tmp_path / 'data' / 'tree' / 'images').mkdir(parents=True)
    image(1).save(tmp_path / 'data' / 'tree' / 'images' / 'one.png')
    assert len(load_dataset('tree', 'images', 32)) == 1
    (tmp_path / 'data' / 'bare').mkdir()
    with pytest.raises(StudyError, match='has no image'):
        load_dataset('bare', 'train', 32)


def test_classes_are_counted_over_all_splits(tmp_path):
    root = unpack(tmp_path / 'set')
    for f in (root / 'test' / 'bee').iterdir():
        f.unlink()
    with pytest.raises(StudyError, match='the class "bee" has no image'):
        list_images(root, 'val')
    (root / 'test' / 'bee').rmdir()
    with pytest.raises(StudyError, match='the class "bee" has no image'):
        list_images(root, 'val')


def test_a_crop_of_the_whole_is_the_image_and_its_mirror_image():
    whole = image(2, 40)
    straight = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    g = torch.Generator().manual_seed(0)
    assert torch.equal(random_crop(whole, 40, RandomCrop((1.0, 1.0), (1.0, 1.0), flip=0.0), g), straight)
    assert torch.equal(random_crop(whole, 40, RandomCrop((1.0, 1.0), (1.0, 1.0), flip=1.0), g), straight.flip(2))


def test_a_crop_uses_the_same_number_of_random_numbers_for_every_image():
    "Otherwise the crops of a batch would depend on which of its files can be decoded."
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    random_crop(image(1, 48), 24, RandomCrop(), one)
    random_crop(image(2, 10, wide=30), 24, RandomCrop((0.9, 1.0)), other)  # too narrow for any box
    assert torch.equal(one.get_state(), other.get_state())


# --- names


def test_scenes_are_a_set():
    small, large = (
        load_dataset('scenes', 'train', 16, per_class=2),
        load_dataset('scenes', 'train', 16, per_class=9),
    )
    assert torch.bincount(small.labels).tolist() == [2] * 12 and torch.equal(
        large.images[first_of_each(large.labels, 2)], small.images
    )
    val = load_dataset('scenes', 'val', 16)
    assert len(val) == 1024 and not torch.equal(val.images[0], small.images[0])
    with pytest.raises(StudyError, match='scenes has no split "night"'):
        load_dataset('scenes', 'night', 16)


def test_unknown_and_missing_names(monkeypatch, tmp_path):
    with pytest.raises(StudyError, match='did you mean cifar10-jpeg'):
        load_dataset('cifar10-jpg', 'train', 32)
    with pytest.raises(StudyError, match='MIMSTUDY_DATA_IMAGENET'):
        load_dataset('imagenet', 'train', 32)
    monkeypatch.setenv('MIMSTUDY_DATA_MY_SET', str(pack(tmp_path / 'elsewhere.tar.xz')))
    assert len(load_dataset('my-set', 'train', 32)) == 30


@pytest.mark.parametrize('name', [n for n, d in DATASETS.items() if d.kind == 'torchvision'])
def test_no_network_is_one_line(monkeypatch, name):
    def fails(*args, **kwargs):
        raise OSError('<urlopen error no route to host>\nmore')

    for kind in ('CIFAR10', 'CIFAR100', 'STL10', 'Imagenette'):
        monkeypatch.setattr(room.datasets, kind, fails)
    with pytest.raises(StudyError) as e:
        load_dataset(name, 'train', 32)
    assert f'settings.ini [data] {name}' in str(e.value) and '\n' not in str(e.value)


def test_downloaded_sets_keep_their_bytes(monkeypatch):
    "torchvision's classes replaced by ones of the same shape: 20 images, two classes."

    class Fake:
        classes = ['a', 'b']

        def __init__(self, root, part, download):
            self.data = torch.arange(20 * 32 * 32 * 3).to(torch.uint8).view(20, 32, 32, 3).numpy()
            self.targets = [i % 2 for i in range(20)]

    monkeypatch.setattr(room.datasets, 'CIFAR10', Fake)
    held = load_dataset('cifar10', 'train', 32, per_class=3)
    assert held.labels.tolist() == [0, 1] * 3 and held.classes == ['a', 'b']
    assert torch.equal(held.images, torch.from_numpy(Fake(0, 0, 0).data).permute(0, 3, 1, 2)[:6])

    class FakeSTL(Fake):
        def __init__(self, root, part, download):
            super().__init__(root, part, download)
            self.data = self.data.transpose(0, 3, 1, 2)
            self.labels = torch.full((20,), -1.0).numpy() if part == 'unlabeled' else self.targets

    monkeypatch.setattr(room.datasets, 'STL10', FakeSTL)
    heap = load_dataset('stl10', 'unlabeled', 32)
    assert heap.classes == ['images'] and len(heap) == 20 and torch.equal(heap.images[:6], held.images)
    assert load_dataset('stl10', 'val', 16).images.shape == (20, 3, 16, 16)


def test_real_archive(real_data):
    val = load_dataset('caltech101-72', 'val', 64, per_class=1, strict=True)
    assert (
        val.images.shape == (101, 3, 64, 64)
        and val.labels.tolist() == list(range(101))
        and 'watch' in val.classes
    )
    assert len(val.classes) == DATASETS['caltech101-72'].classes and 100 < val.images.float().mean() < 160

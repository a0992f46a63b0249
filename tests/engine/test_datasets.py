"Datasets: archives, folders, broken files, the cache, crops, and names."

import tarfile
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine import datasets, downloads
from mimstudy.engine.archives import cache_file, list_archive
from mimstudy.engine.datasets import (
    DATASETS,
    InMemoryDataset,
    first_of_each,
    load_dataset,
    read_archive,
    read_folder,
)
from mimstudy.engine.image_folder import (
    FolderDataset,
    RandomCrop,
    decode_image,
    random_crop,
    resize_and_center_crop,
)
from mimstudy.engine.image_layout import NO_CLASSES, list_images

CLASSES = ['ant', 'bee', 'cat']


def noise_image(i, height=48, aspect=1.0):
    "Image number i: noise whose seed is i."
    generator = torch.Generator().manual_seed(i)
    size = (height, int(aspect * height), 3)
    return Image.fromarray(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy())


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jpeg(i):
    file = BytesIO()
    noise_image(i).save(file, 'jpeg')
    return file.getvalue()


def members(truncated=()):
    "Names and contents of 30 training and 9 test images; those in `truncated` are cut short."
    for i in range(39):
        content = jpeg(i)
        if i in truncated:
            content = content[: len(content) // 2]
        split = 'train' if i < 30 else 'test'
        yield f'{split}/{CLASSES[i % 3]}/{i:03}.jpg', content


def make_archive(path, truncated=(), extra=()):
    with tarfile.open(path, 'w:xz') as archive:
        for name, content in (*members(truncated), *extra):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return path


def make_folder(root, truncated=()):
    for name, content in members(truncated):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def own_folders(request, tmp_path, monkeypatch):
    "Each test has its own cache and data folder."
    (tmp_path / 'data').mkdir()
    monkeypatch.setenv('MIMSTUDY_CACHE', str(tmp_path / 'cache'))
    if 'real_data' not in request.fixturenames:
        monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))


def with_warnings(call, *args, **options):
    "What a call returns, and the messages of its warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return call(*args, **options), [str(w.message) for w in caught]


def refusal(call, *args, **options):
    "The message of the `StudyError` that a call raises; it is one line."
    with pytest.raises(StudyError) as error:
        call(*args, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


# -- in memory -----------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_sampler():
    world = scenes(40, 16)
    dataset = InMemoryDataset(world.images, world.label, ['x'] * 12)
    sampler = list(torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7))
    for (x, y), indices in zip(dataset.batches(sampler, workers=3), sampler, strict=True):
        assert x.equal(world.images[indices]) and y.equal(world.label[indices]) and x.dtype == torch.uint8
    assert (len(dataset), dataset.side, dataset.crop, dataset.broken) == (40, 16, None, 0)


def test_first_of_each_against_a_loop():
    labels = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(0))
    for n in (1, 3, 9, 100, None):
        counts = [0] * 5
        expected = []
        for i, label in enumerate(labels.tolist()):
            counts[label] += 1
            if counts[label] <= (n or 60):
                expected.append(i)
        assert first_of_each(labels, n).tolist() == expected


def test_subset_is_balanced_and_seeded():
    world = scenes(120, 16)
    dataset = InMemoryDataset(world.images, world.label, ['x'] * 12)
    first = dataset.subset(4)
    assert torch.bincount(first.labels).tolist() == [4] * 12
    assert first.images.equal(dataset.subset(4).images)
    assert not first.images.equal(dataset.subset(4, seed=1).images)


# -- archives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('split, n', [('train', 30), ('val', 9), ('test', 9)])
@pytest.mark.parametrize('size', [48, 32])
def test_archive_equals_folder(tmp_path, split, n, size):
    a = read_archive(make_archive(tmp_path / 'set.tar.xz'), split, size, None, True)
    b = read_folder(make_folder(tmp_path / 'set'), split, size, None, True)
    assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.classes == b.classes == CLASSES
    assert len(a) == n and a.images.dtype == torch.uint8


def test_images_of_the_right_size_are_not_changed(tmp_path):
    dataset = read_archive(make_archive(tmp_path / 'set.tar.xz'), 'train', 48, None, True)
    expected = to_tensor(Image.open(BytesIO(jpeg(4))))
    assert dataset.images[dataset.labels == 1][1].equal(expected)


def test_per_class_takes_the_first_images(tmp_path):
    file = make_archive(tmp_path / 'set.tar.xz')
    two = read_archive(file, 'train', 16, 2, True)
    everything = read_archive(file, 'train', 16, None, True)
    assert two.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert two.images.equal(everything.images[first_of_each(everything.labels, 2)])


def test_truncated_image_in_an_archive(tmp_path):
    file = make_archive(tmp_path / 'set.tar.xz', truncated=(4, 31))
    dataset, messages = with_warnings(read_archive, file, 'train', 32, None, False)
    assert len(dataset) == 29 and dataset.broken == 1
    assert messages == ['1 of 30 images cannot be decoded and are left out: train/bee/004.jpg']
    assert '1 of 9 images cannot be decoded: test/bee/031.jpg' in refusal(
        read_archive, file, 'val', 32, None, True
    )


def test_unsafe_and_other_members(tmp_path):
    extra = [
        ('../../../outside/ant/a.jpg', jpeg(50)),
        ('/train/ant/zz.jpg', jpeg(51)),
        ('train/ant/notes.txt', b'text'),
        ('train/ant/._x.jpg', b'mac'),
        ('README.jpg', b'no'),
    ]
    file = make_archive(tmp_path / 'set.tar.xz', extra=extra)
    dataset = read_archive(file, 'train', 32, None, True)
    assert len(dataset) == 31 and dataset.classes == CLASSES
    assert not (tmp_path.parent / 'outside').exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['data', 'set.tar.xz']


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(jpeg(1))
    file = make_archive(tmp_path / 'set.tar.xz')
    contents = list(members())
    with tarfile.open(file, 'w:xz') as archive:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
        link = tarfile.TarInfo('train/ant/link.jpg')
        link.type = tarfile.SYMTYPE
        link.linkname = str(tmp_path / 'secret.jpg')
        archive.addfile(link)
    names, _, _, _ = list_archive(file, 'train')
    assert len(names) == 30 and not any('link' in name for name in names)


@pytest.mark.parametrize('damage', ['half', 'text', 'empty'])
def test_damaged_archive(tmp_path, damage):
    file = make_archive(tmp_path / 'set.tar.xz')
    whole = file.read_bytes()
    damaged = {'half': whole[: len(whole) // 2], 'text': b'this is no archive' * 99, 'empty': b''}
    file.write_bytes(damaged[damage])
    assert 'set.tar.xz' in refusal(read_archive, file, 'train', 32, None, True)


def test_missing_split_and_empty_class(tmp_path):
    file = make_archive(tmp_path / 'set.tar.xz', extra=[('train/dog/x.jpg', jpeg(60))])
    message = refusal(read_archive, file, 'val', 32, None, True)
    assert message == 'set.tar.xz/test: the class "dog" has no image'
    message = refusal(read_archive, file, 'night', 32, None, True)
    assert message == 'set.tar.xz has no split "night"; it has: test, train'
    root = make_folder(tmp_path / 'set')
    (root / 'test' / 'dog').mkdir()
    message = refusal(read_folder, root, 'train', 32, None, True)
    assert message == 'set/train: the class "dog" has no image'


def test_no_image_can_be_decoded(tmp_path):
    file = make_archive(tmp_path / 'set.tar.xz', truncated=range(39))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert 'none of the 30 images can be decoded' in refusal(read_archive, file, 'train', 32, None, False)


# -- sizes and formats ---------------------------------------------------------------------------------------


def test_center_crop():
    wide = noise_image(0, height=32, aspect=2.0)
    assert resize_and_center_crop(wide, 32).equal(to_tensor(wide)[:, :, 16:48])
    for height, aspect, size in (
        (33, 1.7, 20),
        (20, 1.01, 32),
        (72, 1.31, 64),
        (375, 1.333, 224),
        (10, 3.7, 32),
        (501, 0.31, 64),
    ):
        assert resize_and_center_crop(noise_image(1, height, aspect), size).shape == (3, size, size)


def test_large_images_lose_their_border_and_small_ones_do_not():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2))
    assert resize_and_center_crop(ramp, 224)[0, 0, [0, -1]].tolist() == [16, 239]
    assert resize_and_center_crop(ramp, 128)[0, 0, 0] < 2


@pytest.mark.parametrize(
    'mode, suffix',
    [
        ('L', 'png'),
        ('RGBA', 'png'),
        ('P', 'gif'),
        ('CMYK', 'jpg'),
        ('1', 'bmp'),
        ('LA', 'png'),
        ('RGB', 'webp'),
    ],
)
def test_every_format_becomes_rgb(tmp_path, mode, suffix):
    noise_image(3).convert(mode).save(tmp_path / f'x.{suffix}')
    assert decode_image(tmp_path / f'x.{suffix}').mode == 'RGB'


def test_what_is_no_image(tmp_path):
    assert decode_image(tmp_path / 'absent.png') is None and decode_image(b'') is None


# -- the cache -----------------------------------------------------------------------------------------------


def test_the_cache_gives_the_same_bytes_and_notices_changes(tmp_path, monkeypatch):
    file = make_archive(tmp_path / 'data' / 'set.tar.xz')
    first = load_dataset('set', 'train', 32)
    monkeypatch.setattr(datasets, 'read_archive', lambda *_: pytest.fail('decoded again'))
    again = load_dataset('set', 'train', 32)
    assert first.images.equal(again.images) and first.labels.equal(again.labels) and again.classes == CLASSES
    assert [p.suffix for p in (tmp_path / 'cache').iterdir()] == ['.safetensors']
    requests = (('train', 32, None), ('val', 32, None), ('train', 16, None), ('train', 32, 5))
    keys = {cache_file(file, *request) for request in requests}
    file.touch()
    assert len(keys) == 4 and cache_file(file, 'train', 32, None) not in keys


@pytest.mark.parametrize('cache', ['', 'file/below'])
def test_without_a_cache(tmp_path, monkeypatch, cache):
    "Switched off, or in a folder that cannot be created."
    (tmp_path / 'file').write_text('not a folder')
    monkeypatch.setenv('MIMSTUDY_CACHE', str(tmp_path / cache) if cache else '')
    make_archive(tmp_path / 'data' / 'set.tar.xz')
    assert len(load_dataset('set', 'train', 32)) == 30


def test_strict_through_the_cache(tmp_path):
    make_archive(tmp_path / 'data' / 'set.tar.xz', truncated=(4,))
    dataset, messages = with_warnings(load_dataset, 'set', 'train', 32)
    assert dataset.broken == 1 and len(messages) == 1
    assert load_dataset('set', 'train', 32).broken == 1
    message = refusal(load_dataset, 'set', 'train', 32, strict=True)
    assert '1 of 30 images cannot be decoded: train/bee/004.jpg' in message


# -- folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    "A folder that does not fit into memory, because the limit is set to 0."
    monkeypatch.setattr(datasets, 'IN_MEMORY', 0)
    return make_folder(tmp_path / 'data' / 'many', truncated=(4,))


SAMPLER = list(torch.randperm(30, generator=torch.Generator().manual_seed(1)).split(8))


def crops(workers, sampler=SAMPLER, seed=0):
    "All batches of the large folder, cropped at random."
    dataset = load_dataset('many', 'train', 24, crop=RandomCrop(seed=seed))
    batches, _ = with_warnings(lambda: list(dataset.batches(sampler, workers)))
    return batches


def test_crops_do_not_depend_on_the_number_of_workers(large):
    for (x, y), (other_x, other_y) in zip(crops(0), crops(2), strict=True):
        assert x.equal(other_x) and y.equal(other_y) and x.dtype == torch.uint8
    assert [tuple(x.shape) for x, _ in crops(0)] == [(8, 3, 24, 24)] * 3 + [(6, 3, 24, 24)]


def test_crops_of_a_resumed_run_and_of_another_seed(large):
    whole = crops(0)
    for (x, _), (other_x, _) in zip(whole[2:], crops(1, SAMPLER[2:]), strict=True):
        assert x.equal(other_x)
    assert not whole[0][0].equal(crops(0, seed=1)[0][0])


def test_large_folder_skips_and_counts(large):
    dataset = load_dataset('many', 'train', 24, crop=RandomCrop())
    assert isinstance(dataset, FolderDataset)
    assert (dataset.crop, dataset.broken, dataset.side) == (RandomCrop(), 0, 24)
    _, messages = with_warnings(lambda: [list(dataset.batches(SAMPLER, workers)) for workers in (0, 2)])
    assert dataset.broken == 1 and len(messages) == 1 and '004.jpg cannot be decoded' in messages[0]


def test_a_replaced_image_brings_its_label(large):
    files, labels, classes = list_images(large, 'train')
    truncated = next(i for i, file in enumerate(files) if '004' in file)
    dataset = FolderDataset(files, labels, classes, 48)
    batches, _ = with_warnings(lambda: list(dataset.batches([torch.tensor([truncated])])))
    image, label = batches[0]
    assert label == labels[truncated + 1]
    assert image[0].equal(resize_and_center_crop(decode_image(files[truncated + 1]), 48))


@pytest.mark.parametrize('size', [24, 160])
def test_centre_crops_are_the_same_in_memory_and_from_files(large, monkeypatch, size):
    "A probe may be fitted on a split from files and scored on one in memory; both must show the same."
    indices = torch.arange(9)
    from_files, _ = next(iter(load_dataset('many', 'val', size, strict=True).batches([indices])))
    monkeypatch.setattr(datasets, 'IN_MEMORY', 2**30)
    in_memory = load_dataset('many', 'val', size, strict=True)
    assert isinstance(in_memory, InMemoryDataset) and in_memory.images[indices].equal(from_files)


@pytest.mark.parametrize('workers', [0, 2])
def test_large_folder_is_strict_in_evaluation(large, workers):
    dataset = load_dataset('many', 'train', 24, strict=True)
    message = refusal(lambda: list(dataset.batches(SAMPLER, workers)))
    assert message.endswith('004.jpg cannot be decoded')


def test_a_folder_of_broken_images(tmp_path):
    files, labels, classes = list_images(make_folder(tmp_path / 'set', truncated=range(39)), 'train')
    dataset = FolderDataset(files, labels, classes, 24)
    assert 'cannot be decoded' in refusal(lambda: list(dataset.batches([torch.arange(3)])))


def test_flat_folder_is_one_class(tmp_path):
    data = tmp_path / 'data'
    (data / 'flat').mkdir()
    for i in range(4):
        noise_image(i).save(data / 'flat' / f'{i}.png')
    flat = load_dataset('flat', 'train', 32)
    assert flat.classes == ['images'] and flat.labels.tolist() == [0] * 4
    assert refusal(load_dataset, 'flat', 'val', 32) == 'flat has no split "val"; it has: no folders'
    (data / 'nested' / 'images').mkdir(parents=True)
    noise_image(1).save(data / 'nested' / 'images' / 'one.png')
    assert len(load_dataset('nested', 'images', 32)) == 1
    (data / 'empty').mkdir()
    assert 'has no image' in refusal(load_dataset, 'empty', 'train', 32)


def test_classes_are_those_of_all_splits(tmp_path):
    root = make_folder(tmp_path / 'set')
    for file in (root / 'test' / 'bee').iterdir():
        file.unlink()
    assert 'the class "bee" has no image' in refusal(list_images, root, 'val')
    (root / 'test' / 'bee').rmdir()
    assert 'the class "bee" has no image' in refusal(list_images, root, 'val')


def test_a_crop_of_the_whole_is_the_image_or_its_mirror_image():
    image = noise_image(2, 40)
    generator = torch.Generator().manual_seed(0)
    whole = RandomCrop((1.0, 1.0), (1.0, 1.0), flip=0.0)
    mirrored = RandomCrop((1.0, 1.0), (1.0, 1.0), flip=1.0)
    assert random_crop(image, 40, whole, generator).equal(to_tensor(image))
    assert random_crop(image, 40, mirrored, generator).equal(to_tensor(image).flip(2))


def test_every_crop_uses_the_same_number_of_random_numbers():
    "Otherwise the crops of a batch would depend on which of its files can be decoded."
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    random_crop(noise_image(1, 48), 24, RandomCrop(), one)
    random_crop(noise_image(2, 10, aspect=30), 24, RandomCrop((0.9, 1.0)), other)  # no box fits
    assert one.get_state().equal(other.get_state())


# -- names ---------------------------------------------------------------------------------------------------


def test_scenes():
    small = load_dataset('scenes', 'train', 16, per_class=2)
    large = load_dataset('scenes', 'train', 16, per_class=9)
    assert torch.bincount(small.labels).tolist() == [2] * 12
    assert large.images[first_of_each(large.labels, 2)].equal(small.images)
    validation = load_dataset('scenes', 'val', 16)
    assert len(validation) == 1024 and not validation.images[0].equal(small.images[0])
    assert 'scenes has no split "night"' in refusal(load_dataset, 'scenes', 'night', 16)


def test_unknown_and_missing_names(monkeypatch, tmp_path):
    assert 'did you mean cifar10-jpeg' in refusal(load_dataset, 'cifar10-jpg', 'train', 32)
    assert 'MIMSTUDY_DATA_IMAGENET' in refusal(load_dataset, 'imagenet', 'train', 32)
    monkeypatch.setenv('MIMSTUDY_DATA_MY_SET', str(make_archive(tmp_path / 'elsewhere.tar.xz')))
    assert len(load_dataset('my-set', 'train', 32)) == 30


@pytest.mark.parametrize('name', [n for n, info in DATASETS.items() if info.kind == 'torchvision'])
def test_no_network(monkeypatch, name):
    def fails(*args, **options):
        raise OSError('<urlopen error no route to host>\nmore')

    for dataset_class in ('CIFAR10', 'CIFAR100', 'STL10', 'Imagenette'):
        monkeypatch.setattr(downloads.datasets, dataset_class, fails)
    assert f'settings.ini [data] {name}' in refusal(load_dataset, name, 'train', 32)


class FakeCIFAR:
    "What torchvision returns for CIFAR-10, with 20 images of two classes."

    classes = ['a', 'b']

    def __init__(self, root, part, download):
        self.data = torch.arange(20 * 32 * 32 * 3).to(torch.uint8).view(20, 32, 32, 3).numpy()
        self.targets = [i % 2 for i in range(20)]


class FakeSTL(FakeCIFAR):
    "The same images as torchvision returns STL-10."

    def __init__(self, root, part, download):
        super().__init__(root, part, download)
        self.data = self.data.transpose(0, 3, 1, 2)
        self.labels = torch.full((20,), -1.0).numpy() if part == 'unlabeled' else self.targets


def test_downloads_keep_their_bytes(monkeypatch):
    monkeypatch.setattr(downloads.datasets, 'CIFAR10', FakeCIFAR)
    monkeypatch.setattr(downloads.datasets, 'STL10', FakeSTL)
    cifar = load_dataset('cifar10', 'train', 32, per_class=3)
    assert cifar.labels.tolist() == [0, 1] * 3 and cifar.classes == ['a', 'b']
    expected = torch.from_numpy(FakeCIFAR(Path(), '', True).data).permute(0, 3, 1, 2)
    assert cifar.images.equal(expected[:6])
    unlabeled = load_dataset('stl10', 'unlabeled', 32)
    assert unlabeled.classes == ['images'] and unlabeled.images.equal(expected)
    assert load_dataset('stl10', 'val', 16).images.shape == (20, 3, 16, 16)


def test_real_archive(real_data):
    dataset = load_dataset('caltech101-72', 'val', 64, per_class=1, strict=True)
    assert dataset.images.shape == (101, 3, 64, 64) and dataset.labels.tolist() == list(range(101))
    assert len(dataset.classes) == DATASETS['caltech101-72'].classes and 'watch' in dataset.classes
    assert 100 < dataset.images.float().mean() < 160


# -- layouts that people have --------------------------------------------------------------------------------


def save_images(folder, count, suffix='.png', start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        noise_image(i, 40).save(folder / f'{i:03}{suffix}')


def test_flat_validation_images_beside_classes_are_refused(tmp_path):
    root = tmp_path / 'set'
    for label in ('ant', 'bee'):
        save_images(root / 'train' / label, 3)
    save_images(root / 'val', 3)
    message = refusal(list_images, root, 'val')
    assert message == (
        'set/val has no folders of classes, and another split has; arrange its images as val/CLASS/FILE'
    )


@pytest.mark.parametrize('below', ['train', '.'])
def test_without_a_validation_split_a_tenth_of_each_class_is_held_out(tmp_path, below):
    root = tmp_path / 'set'
    for label, count in (('ant', 23), ('bee', 4)):
        save_images(root / below / label, count)
    train, labels, classes = list_images(root, 'train')
    with pytest.warns(UserWarning, match='set has no validation split'):
        val, val_labels, val_classes = list_images(root, 'val')
    assert classes == val_classes == ['ant', 'bee']
    assert not set(train) & set(val) and len(train) + len(val) == 27
    assert torch.bincount(val_labels).tolist() == [2, 1]


@pytest.mark.parametrize('below', ['train', '.'])
def test_images_without_classes_are_all_taken(tmp_path, below):
    root = tmp_path / 'set'
    save_images(root / below, 12)
    files, labels, classes = list_images(root, 'train', per_class=5)
    assert len(files) == 12 and classes == [NO_CLASSES]


def test_hidden_files_and_folders_are_no_data(tmp_path):
    root = tmp_path / 'set'
    for split in ('train', 'val'):
        for label in ('ant', 'bee'):
            save_images(root / split / label, 2)
        save_images(root / split / 'ant' / '.ipynb_checkpoints', 3)
        save_images(root / split / '.ipynb_checkpoints', 3)
        save_images(root / split / '__MACOSX', 1)
    files, _, classes = list_images(root, 'train')
    assert len(files) == 4 and classes == ['ant', 'bee']
    archive = tmp_path / 'set.tar.xz'
    with tarfile.open(archive, 'w:xz') as tar:
        tar.add(root, 'set')
    names, _, _, classes = list_archive(archive, 'train')
    assert len(names) == 4 and classes == ['ant', 'bee']


def test_tiny_imagenet_as_published(tmp_path):
    root = tmp_path / 'tiny-imagenet-200'
    for label in ('n01', 'n02'):
        save_images(root / 'train' / label / 'images', 3, '.JPEG')
    save_images(root / 'val' / 'images', 4, '.JPEG')
    save_images(root / 'test' / 'images', 2, '.JPEG')
    lines = [f'{i:03}.JPEG\tn0{1 + i % 2}\t0\t0\t62\t62' for i in range(4)]
    (root / 'val' / 'val_annotations.txt').write_text('\n'.join(lines) + '\n')
    files, labels, classes = list_images(root, 'val')
    assert classes == list_images(root, 'train')[2] == ['n01', 'n02']
    assert [int(file[-8:-5]) % 2 for file in files] == labels.tolist() == [0, 0, 1, 1]
    assert decode_image(files[0]) is not None


def test_shards_are_said_to_be_shards(tmp_path):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / '0000.tar').write_bytes(b'')
    assert refusal(list_images, tmp_path / 'set', 'train') == (
        'set has no image, but 1 .tar files; unpack them into folders CLASS/FILE'
    )


# -- what a file means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'values, suffix',
    [
        (np.array([[0, 32768, 65535]], np.uint16), 'png'),
        (np.array([[0, 32768, 65535]], np.uint16), 'tif'),
        (np.array([[0, 0.5, 1]], np.float32), 'tif'),
        (np.array([[0, 127.5, 255]], np.float32), 'tif'),
        (np.array([[0, 32768, 65535]], np.int32), 'tif'),
    ],
)
def test_wide_values_are_scaled_by_their_range(tmp_path, values, suffix):
    Image.fromarray(values).save(tmp_path / f'x.{suffix}')
    image = decode_image(tmp_path / f'x.{suffix}')
    assert [image.getpixel((i, 0)) for i in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize('values', [[-1.0, 0.0, 1.0], [0.0, 1.0, 1e6]])
def test_values_of_an_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / 'x.tif')
    assert decode_image(tmp_path / 'x.tif') is None


def test_photographs_are_turned_upright(tmp_path):
    upright = noise_image(5, 40, 2.0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored sideways: turn by 90 degrees clockwise to see it upright
    upright.rotate(90, expand=True).save(tmp_path / 'x.png', exif=exif)
    assert to_tensor(decode_image(tmp_path / 'x.png')).equal(to_tensor(upright))

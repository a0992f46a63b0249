"Segmentation datasets: two layouts, resizing, ignored pixels, and files that are not what they should be."

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import REGIONS, scenes
from mimstudy.engine import segmentation_data
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.image_folder import decode_image
from mimstudy.engine.segmentation_data import (
    SegmentationDataset,
    decode_pairs,
    load_segmentation_dataset,
    read_label_map,
    read_pair,
)
from mimstudy.engine.segmentation_files import (
    IGNORE_LABEL,
    VOC_CLASSES,
    find_layout,
    list_pairs,
    read_classes,
)

N = 6  # images
C = len(REGIONS)  # classes


def example(side=32):
    "Images (N,3,S,S) and label maps (N,S,S) with ignored pixels."
    world = scenes(N, side)
    maps = world.maps.clone()
    maps[:, ::5, 3] = IGNORE_LABEL
    return world.images, maps


def save(array, file, palette=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array))
    if palette:
        image.putpalette([k for k in range(256) for _ in 'RGB'])
    image.save(file)


def make_voc(root, side=32, classes=True):
    for i, (image, labels) in enumerate(zip(*example(side))):
        save(image.permute(1, 2, 0), root / 'JPEGImages' / f'a.{i}.jpg')
        save(labels, root / 'SegmentationClass' / f'a.{i}.png', palette=True)
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text(''.join(f'a.{i}\n' for i in (4, 0, 2, 1)))
    (lists / 'val.txt').write_text('a.3\na.5')
    (lists / 'nobody.txt').write_text('\n\n')
    if classes:
        lines = [f'{k}\t{name}\t1,2,3\n' for k, name in enumerate(REGIONS)]
        (root / 'classes.txt').write_text(''.join(lines) + '255\tvoid (ignore)\t0,0,0\n')
    return root


def make_ade(root, side=32):
    for i, (image, labels) in enumerate(zip(*example(side))):
        split = 'training' if i < 4 else 'validation'
        save(image.permute(1, 2, 0), root / 'images' / split / f'{i}.png')
        save(labels + 1, root / 'annotations' / split / f'{i}.png')  # 255 + 1 is 0 in bytes
    lines = [f'{k}\t.1\t5\t5\t{name}, other\n' for k, name in enumerate(REGIONS, 1)]
    (root / 'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tName\n' + ''.join(lines))
    return root


@pytest.fixture(autouse=True)
def own_folders(request, tmp_path, monkeypatch):
    "Each test has its own data folder."
    (tmp_path / 'data').mkdir()
    if 'real_data' not in request.fixturenames:
        monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))


def refusal(call, *args, **options):
    "The message of the `StudyError` that a call raises; it is one line."
    with pytest.raises(StudyError) as error:
        call(*args, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def with_warnings(call, *args, **options):
    "What a call returns, and the messages of its warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return call(*args, **options), [str(w.message) for w in caught]


def all_batches(dataset, sampler, workers):
    return list(dataset.batches(sampler, workers))


# -- layouts -------------------------------------------------------------------------------------------------


def test_voc_round_trip(tmp_path):
    files = list_pairs(make_voc(tmp_path / 'voc'), 'train')
    _, maps = example()
    dataset = decode_pairs(files, 32, strict=True)
    assert [f.name for f in files.images] == ['a.4.jpg', 'a.0.jpg', 'a.2.jpg', 'a.1.jpg'] and files.shift == 0
    assert dataset.classes == list(REGIONS) and dataset.labels.dtype == dataset.images.dtype == torch.uint8
    assert dataset.labels.equal(maps[[4, 0, 2, 1]]) and (dataset.labels == IGNORE_LABEL).any()
    for file, image in zip(files.images, dataset.images):
        assert (np.array(decode_image(file)) == image.permute(1, 2, 0).numpy()).all()


def test_ade_round_trip(tmp_path):
    files = list_pairs(make_ade(tmp_path / 'ade'), 'train')
    images, maps = example()
    dataset = decode_pairs(files, 32, strict=True)
    assert files.shift == 1 and dataset.classes == list(REGIONS)
    assert dataset.labels.equal(maps[:4]) and dataset.images.equal(images[:4])
    assert len(list_pairs(tmp_path / 'ade', 'val').maps) == 2


@pytest.mark.parametrize('shift, expected', [(0, [0, 1, 2, 149, 255]), (1, [255, 0, 1, 149, 255])])
def test_shift(tmp_path, shift, expected):
    save(np.array([[0, 1, 2, 149 + shift, 255]], np.uint8), tmp_path / 'map.png')
    assert np.array(read_label_map(tmp_path / 'map.png', 150, shift)).tolist() == [expected]


def test_names_of_classes(tmp_path):
    make_voc(tmp_path / 'voc', classes=False)
    assert list_pairs(tmp_path / 'voc', 'val').classes == list(VOC_CLASSES) and len(VOC_CLASSES) == 21
    (make_ade(tmp_path / 'ade') / 'objectInfo150.txt').unlink()
    assert len(set(list_pairs(tmp_path / 'ade', 'val').classes)) == 150
    file = tmp_path / 'classes.txt'
    file.write_text('0 traffic light 1, 2, 3\n\n1 road\n255 void\n255 other')
    assert read_classes(file, 0) == ['traffic light', 'road']
    file.write_text('1 road\n0 sky')
    assert read_classes(file, 0) == ['sky', 'road']


@pytest.mark.parametrize('text', ['sky\nroad', '0 sky\n2 road', '1 sky', '0 sky\n0 road', '0\n1 road', ''])
def test_lists_of_classes_that_are_refused(tmp_path, text):
    file = tmp_path / 'classes.txt'
    file.write_text(text)
    assert 'classes.txt should have lines "index name colour"' in refusal(read_classes, file, 0)


def test_the_layout_may_lie_deeper(tmp_path):
    root = tmp_path / 'data' / 'voc'
    make_voc(root / 'VOCdevkit' / 'VOC2012')
    assert find_layout(root) == ('voc', root / 'VOCdevkit' / 'VOC2012')
    assert len(load_segmentation_dataset('voc', 'train', 16)) == 4
    make_ade(root / 'VOCdevkit' / 'ADE')
    assert 'holds 2 datasets: ADE, VOC2012' in refusal(load_segmentation_dataset, 'voc', 'train', 16)


# -- resizing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('side', [17, 32, 64, 201])
def test_resizing_invents_no_class_and_keeps_the_image_aligned(tmp_path, side):
    image = np.zeros((40, 90, 3), np.uint8)
    labels = np.full((40, 90), 7, np.uint8)
    image[10:30, 45:] = 255
    labels[10:30, 45:] = 19
    labels[:, 80:] = IGNORE_LABEL
    save(image, tmp_path / 'x.png')
    save(labels, tmp_path / 'y.png')
    x, y = read_pair(tmp_path / 'x.png', tmp_path / 'y.png', side, C)
    assert x.shape == (3, side, side) and y.shape == (side, side)
    assert set(y.unique().tolist()) == {7, 19, IGNORE_LABEL}
    labelled = y != IGNORE_LABEL
    assert ((x[0] > 127) == (y == 19))[labelled].float().mean() > 0.9
    assert abs((~labelled).float().mean() - 1 / 9) < 0.04


# -- memory and workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize('make', [make_voc, make_ade])
def test_memory_and_workers_agree(tmp_path, monkeypatch, make):
    make(tmp_path / 'data' / 'set', side=48)
    small = load_segmentation_dataset('set', 'train', 32, strict=True)
    monkeypatch.setattr(segmentation_data, 'IN_MEMORY', 4 * 32 * 32 * 4 - 1)
    large = load_segmentation_dataset('set', 'train', 32, strict=True)
    assert isinstance(small, InMemoryDataset) and isinstance(large, SegmentationDataset)
    assert isinstance(load_segmentation_dataset('set', 'train', 32, limit=3), InMemoryDataset)
    assert len(large) == len(small) == 4 and (large.side, large.crop) == (32, None)
    sampler = [torch.tensor([3, 1, 1]), torch.tensor([0, 2])]
    for workers in (0, 2):
        for (x, y), (a, b) in zip(large.batches(sampler, workers), small.batches(sampler), strict=True):
            assert x.equal(a) and y.equal(b) and x.dtype == y.dtype == torch.uint8


def test_limit_takes_the_first_pairs(tmp_path):
    make_voc(tmp_path / 'data' / 'set')
    whole = load_segmentation_dataset('set', 'train', 16)
    assert load_segmentation_dataset('set', 'train', 16, limit=2).labels.equal(whole.labels[:2])


def test_scenes():
    few = load_segmentation_dataset('scenes', 'val', 16, limit=3)
    more = load_segmentation_dataset('scenes', 'val', 16, limit=70)
    assert few.labels.equal(more.labels[:3]) and few.images.equal(more.images[:3])
    assert few.classes == list(REGIONS) and len(load_segmentation_dataset('scenes', 'val', 16)) == 1024
    assert not load_segmentation_dataset('scenes', 'train', 16, limit=3).labels.equal(few.labels)


# -- files that are not what they should be ------------------------------------------------------------------


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def spoil(root, fault):
    "Make the pair a.0 of a dataset useless."
    if fault == 'size':
        save(example()[1][0][:30], root / 'SegmentationClass' / 'a.0.png')
    elif fault == 'image':
        truncate(root / 'JPEGImages' / 'a.0.jpg')
    else:
        truncate(root / 'SegmentationClass' / 'a.0.png')


FAULTS = {
    'image': 'a.0.jpg cannot be decoded',
    'map': 'a.0.png cannot be decoded',
    'size': 'a.0.jpg has 32 x 32 pixels, but its label map 32 x 30',
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_pair_that_cannot_be_used_in_memory(tmp_path, fault):
    root = make_voc(tmp_path / 'voc')
    spoil(root, fault)
    files = list_pairs(root, 'train')
    dataset, messages = with_warnings(decode_pairs, files, 32, strict=False)
    assert (len(dataset), dataset.broken) == (3, 1) and len(messages) == 1 and FAULTS[fault] in messages[0]
    assert FAULTS[fault] in refusal(decode_pairs, files, 32, strict=True)


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('workers', [0, 1])
def test_a_pair_that_cannot_be_used_in_workers(tmp_path, fault, workers):
    root = make_voc(tmp_path / 'voc')
    spoil(root, fault)
    files = list_pairs(root, 'train')
    sampler = [torch.tensor([0, 1]), torch.tensor([1, 3])]  # a.0 has the index 1, a.2 the index 2
    dataset = SegmentationDataset(files, 32)
    batches, messages = with_warnings(all_batches, dataset, sampler, workers)
    assert dataset.broken == 1 and len(messages) == 1 and FAULTS[fault] in messages[0]
    images, maps = batches[0]
    assert maps.equal(example()[1][[4, 2]])
    assert images[1].equal(read_pair(files.images[2], files.maps[2], 32, C)[0])
    strict = SegmentationDataset(files, 32, strict=True)
    assert FAULTS[fault] in refusal(all_batches, strict, sampler, workers)


def test_no_pair_can_be_used(tmp_path):
    files = list_pairs(make_voc(tmp_path / 'voc'), 'train')
    for file in files.images:
        truncate(file)
    assert 'none of the 4 pairs can be used' in refusal(decode_pairs, files, 32, strict=False)
    dataset = SegmentationDataset(files, 32)
    assert 'cannot be decoded' in refusal(all_batches, dataset, [torch.tensor([2])], 0)


@pytest.mark.parametrize(
    'make, value, span', [(make_voc, C, f'0 to {C - 1}'), (make_ade, C + 1, f'1 to {C}')]
)
def test_a_number_that_is_no_class(tmp_path, make, value, span):
    files = list_pairs(make(tmp_path / 'set'), 'train')
    labels = np.array(Image.open(files.maps[1]))
    labels[5, 5] = value
    save(labels, files.maps[1])
    expected = f'{files.maps[1]} holds the number {value}; its classes are {span}, and 255 is ignored'
    assert refusal(decode_pairs, files, 8, strict=False) == expected  # although resizing drops this pixel
    for workers in (0, 1):
        dataset = SegmentationDataset(files, 8)
        assert refusal(all_batches, dataset, [torch.tensor([0, 1])], workers) == expected
    save(np.zeros((32, 32, 3), np.uint8), files.maps[0])
    assert f'{files.maps[0]} holds colours' in refusal(decode_pairs, files, 32, strict=False)


def test_missing_datasets_and_layouts(tmp_path):
    data = tmp_path / 'data'
    (data / 'empty' / 'deep' / 'deeper').mkdir(parents=True)
    (data / 'packed.tar.xz').write_bytes(b'')
    for name, split, message in (
        ('empty', 'train', 'empty has no label maps: neither JPEGImages/'),
        ('nowhere', 'train', 'MIMSTUDY_DATA_NOWHERE'),
        ('packed', 'train', 'packed.tar.xz is an archive'),
        ('scenes', 'night', 'scenes has no split "night"'),
    ):
        assert message in refusal(load_segmentation_dataset, name, split, 16)


def test_missing_splits(tmp_path):
    voc = make_voc(tmp_path / 'voc')
    ade = make_ade(tmp_path / 'ade')
    (ade / 'images' / 'bare').mkdir()
    assert refusal(list_pairs, voc, 'night') == 'voc has no split "night"; it has: nobody, train, val'
    assert refusal(list_pairs, ade, 'test') == 'ade has no split "test"; it has: bare, training, validation'
    assert refusal(list_pairs, voc, 'nobody') == f'the split "nobody" of {voc} is empty'
    assert refusal(list_pairs, ade, 'bare') == f'the split "bare" of {ade} is empty'


def test_missing_files(tmp_path):
    voc = make_voc(tmp_path / 'voc')
    ade = make_ade(tmp_path / 'ade')
    for root, image, label_map in (
        (voc, 'a.5.jpg', voc / 'SegmentationClass' / 'a.5.png'),
        (ade, '5.png', ade / 'annotations' / 'validation' / '5.png'),
    ):
        label_map.unlink()
        assert f'{image} has no label map; it should be {label_map}' in refusal(list_pairs, root, 'val')
    (voc / 'JPEGImages' / 'a.3.jpg').unlink()
    message = 'a.3.jpg is listed in the split "val", but it does not exist'
    assert message in refusal(list_pairs, voc, 'val')
    for file in (ade / 'annotations' / 'training').iterdir():
        file.unlink()
    (ade / 'annotations' / 'training').rmdir()
    assert '0.png has no label map' in refusal(list_pairs, ade, 'train')


# -- real datasets -------------------------------------------------------------------------------------------


def test_camvid(real_data):
    if not (real_data / 'camvid-voc').is_dir():
        pytest.skip('no camvid-voc')
    for split, n in (('train', 367), ('val', 101)):
        files = list_pairs(real_data / 'camvid-voc', split)
        assert len(files.images) == len(files.maps) == n
        assert len(files.classes) == 11 and files.classes[0] == 'sky' and files.shift == 0
    dataset = load_segmentation_dataset('camvid-voc', 'val', 64, limit=24, strict=True)
    found = set(dataset.labels.unique().tolist())
    assert dataset.labels.shape == (24, 64, 64)
    assert {0, 1, 3, IGNORE_LABEL} <= found <= {*range(11), IGNORE_LABEL}


def test_ade(real_data):
    root = real_data / 'ade20k-samples'
    if not root.is_dir():
        pytest.skip('no ade20k-samples')
    dataset = load_segmentation_dataset('ade20k-samples', 'val', 128, strict=True)
    assert dataset.labels.shape == (3, 128, 128)
    assert len(set(dataset.classes)) == 150 and dataset.classes[:2] == ['wall', 'building']
    assert set(dataset.labels.unique().tolist()) <= {*range(150), IGNORE_LABEL}
    assert 'no split "train"' in refusal(load_segmentation_dataset, 'ade20k-samples', 'train', 128)
    file = list_pairs(root, 'val').maps[0]
    numbers = np.array(Image.open(file))
    labels = np.array(read_label_map(file, 150, 1))
    assert ((numbers == 0) == (labels == IGNORE_LABEL)).all()
    assert (numbers[numbers > 0] - 1 == labels[numbers > 0]).all()


# -- what the files of people look like ----------------------------------------------------------------------


def with_orientation(image, turn, file):
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(file, exif=exif)
    return file


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('size', [(24, 24), (24, 40)])
@pytest.mark.parametrize('stored', ['as the image', 'upright', 'as the image, with its own orientation'])
def test_an_image_that_exif_turns_stays_aligned_with_its_map(tmp_path, turn, size, stored):
    "The grey value of a pixel is 20 times its label."
    labels = (
        np.random.default_rng(turn).integers(0, 5, (size[1] // 8, size[0] // 8)).repeat(8, 0).repeat(8, 1)
    )
    image = Image.fromarray((20 * labels).astype(np.uint8)).convert('RGB')
    image_file = with_orientation(image, turn, tmp_path / 'image.png')
    label_map = Image.fromarray(labels.astype(np.uint8))
    map_file = tmp_path / 'map.png'
    upright = decode_image(image_file)
    if stored == 'upright':
        if upright.size == image.size and turn > 1:
            return  # it cannot be told from a map of the stored pixels, which it is taken for
        Image.fromarray(np.array(upright)[..., 0] // 20).save(map_file)
    else:
        with_orientation(label_map, turn if 'own' in stored else 1, map_file)
    pixels, found = read_pair(image_file, map_file, 120, 5)  # a multiple of both sides
    flat = Image.fromarray(np.array(upright)).resize((120, 120), Image.Resampling.NEAREST)
    assert np.array_equal(found.numpy(), np.array(flat)[..., 0] // 20)
    assert (pixels[0].float() / 20 - found).abs().median() < 0.05


@pytest.mark.parametrize(
    'form', ['P', 'P with transparency', '1', 'L', 'I;16', 'grey of 2 bits', 'grey of 4 bits']
)
def test_label_maps_of_every_kind(tmp_path, form):
    "The numbers of a map are its labels, whatever its palette and its number of bits."
    largest = {'1': 1, 'grey of 2 bits': 3}.get(form, 15)
    labels = np.arange(64).reshape(8, 8) % (largest + 1)
    file = tmp_path / 'map.png'
    if form.startswith('grey'):
        write_grey_png(file, labels, 2 if '2' in form else 4)
    elif form == '1':
        Image.fromarray(labels.astype(bool)).save(file)
    elif form.startswith('P'):
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette([255, 0, 7] * 16)  # all colours alike, and only 16 of them
        image.save(file, **(dict(transparency=3) if 'transparency' in form else {}))
    else:
        Image.fromarray(labels.astype({'L': np.uint8, 'I;16': np.uint16}[form])).save(file)
    assert np.array_equal(np.array(read_label_map(file, largest + 1)), labels)


def write_grey_png(file, labels, bits):
    "A grey PNG file of 2 or 4 bits a pixel, which Pillow does not write."

    def chunk(kind, content):
        return (
            struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
        )

    shifts = np.arange(8 - bits, -1, -bits)
    packed = (labels.reshape(len(labels), -1, len(shifts)) << shifts).sum(-1).astype(np.uint8)
    rows = b''.join(b'\0' + row.tobytes() for row in packed)
    header = struct.pack('>IIBBBBB', labels.shape[1], len(labels), bits, 0, 0, 0, 0)
    chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    file.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*one) for one in chunks))


def test_a_16_bit_map_with_a_number_that_is_no_class(tmp_path):
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / 'map.png')
    assert 'holds the number 300; its classes are 0 to 4' in refusal(read_label_map, tmp_path / 'map.png', 5)


@pytest.mark.parametrize('make', [make_voc, make_ade])
def test_hidden_files_are_no_pairs(tmp_path, make):
    root = make(tmp_path / 'set')
    expected = list_pairs(root, 'train')
    for folder in [f for f in root.rglob('*') if f.is_dir()]:
        (folder / '.ipynb_checkpoints').mkdir()
        for name in ('._0.png', '._a.0.jpg', '._train.txt', '.DS_Store'):
            (folder / name).write_bytes(b'no image')
    (root / '.ipynb_checkpoints').mkdir()
    make(root / '.ipynb_checkpoints' / 'copy')
    assert list_pairs(root, 'train') == expected
    assert list_pairs(tmp_path, 'train') == expected
    assert '._' not in refusal(list_pairs, root, 'night') and '.ipynb' not in refusal(
        list_pairs, root, 'night'
    )

"Image sets with label maps: two layouts, one square, undecided pixels, and files that are not what they should be."

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import REGIONS, scenes
from mimstudy.engine import segmentation_data as room
from mimstudy.engine.image_folder import decode_image
from mimstudy.engine.segmentation_data import (
    IGNORE_LABEL,
    VOC_CLASSES,
    SegmentationDataset,
    find_layout,
    decode_pairs,
    list_pairs,
    load_segmentation_dataset,
    read_classes,
    read_label_map,
    read_pair,
)
from mimstudy.engine.datasets import InMemoryDataset

N, K = 6, len(REGIONS)


def truth(side=32):
    "Images (N,3,S,S) and maps (N,S,S) with undecided pixels."
    world = scenes(N, side)
    maps = world.maps.clone()
    maps[:, ::5, 3] = IGNORE_LABEL
    return world.images, maps


def put(array, file, palette=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array))
    if palette:
        image.putpalette([k for k in range(256) for _ in 'RGB'])
    image.save(file)


def as_voc(root, side=32, classes=True):
    for i, (image, ids) in enumerate(zip(*truth(side))):
        put(image.permute(1, 2, 0), root / 'JPEGImages' / f'a.{i}.jpg')
        put(ids, root / 'SegmentationClass' / f'a.{i}.png', palette=True)
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text(''.join(f'a.{i}\n' for i in (4, 0, 2, 1)))
    (lists / 'val.txt').write_text('a.3\na.5')
    (lists / 'nobody.txt').write_text('\n\n')
    if classes:
        (root / 'classes.txt').write_text(
            ''.join(f'{k}\t{name}\t1,2,3\n' for k, name in enumerate(REGIONS)) + '255\tvoid (ignore)\t0,0,0\n'
        )
    return root


def as_ade(root, side=32):
    for i, (image, ids) in enumerate(zip(*truth(side))):
        part = 'training' if i < 4 else 'validation'
        put(image.permute(1, 2, 0), root / 'images' / part / f'{i}.png')
        put(ids + 1, root / 'annotations' / part / f'{i}.png')  # 255 + 1 is 0
    (root / 'objectInfo150.txt').write_text(
        'Idx\tRatio\tTrain\tVal\tName\n'
        + ''.join(f'{k}\t.1\t5\t5\t{n}, other\n' for k, n in enumerate(REGIONS, 1))
    )
    return root


@pytest.fixture(autouse=True)
def private(request, tmp_path, monkeypatch):
    "The data folder of each test is its own."
    (tmp_path / 'data').mkdir()
    if 'real_data' not in request.fixturenames:
        monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))


def refused(call, *args, **kwargs):
    "The one line with which a call is refused."
    with pytest.raises(StudyError) as e:
        call(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return call(*args, **kwargs), [str(w.message) for w in caught]


# --- layouts


def test_voc_round_trip(tmp_path):
    files, (_, maps) = list_pairs(as_voc(tmp_path / 'voc'), 'train'), truth()
    held = decode_pairs(files, 32, strict=True)
    assert [f.name for f in files.images] == ['a.4.jpg', 'a.0.jpg', 'a.2.jpg', 'a.1.jpg'] and files.shift == 0
    assert held.classes == list(REGIONS) and held.labels.dtype == held.images.dtype == torch.uint8
    assert held.labels.equal(maps[[4, 0, 2, 1]]) and (held.labels == IGNORE_LABEL).any()
    for file, image in zip(files.images, held.images):
        assert (np.array(decode_image(file)) == image.permute(1, 2, 0).numpy()).all()


def test_ade_round_trip_and_shift(tmp_path):
    files, (images, maps) = list_pairs(as_ade(tmp_path / 'ade'), 'train'), truth()
    held = decode_pairs(files, 32, strict=True)
    assert files.shift == 1 and held.classes == list(REGIONS)
    assert held.labels.equal(maps[:4]) and held.images.equal(images[:4])
    assert len(list_pairs(tmp_path / 'ade', 'val').maps) == 2


@pytest.mark.parametrize('shift', [0, 1])
def test_shift_against_a_table(tmp_path, shift):
    put(np.array([[0, 1, 2, 150 - 1 + shift, 255]], np.uint8), tmp_path / 'm.png')
    assert np.array(read_label_map(tmp_path / 'm.png', 150, shift)).tolist() == [
        [0, 1, 2, 149, 255] if shift == 0 else [255, 0, 1, 149, 255]
    ]


def test_names_of_classes(tmp_path):
    as_voc(tmp_path / 'voc', classes=False)
    assert list_pairs(tmp_path / 'voc', 'val').classes == list(VOC_CLASSES) and len(VOC_CLASSES) == 21
    (as_ade(tmp_path / 'ade') / 'objectInfo150.txt').unlink()
    assert len(set(list_pairs(tmp_path / 'ade', 'val').classes)) == 150
    (file := tmp_path / 'classes.txt').write_text('0 traffic light 1, 2, 3\n\n1 road\n255 void')
    assert read_classes(file, 0) == ['traffic light', 'road']
    for wrong in ('sky\nroad', '0 sky\n2 road', '1 sky', '0 sky\n0 road', '0\n1 road', ''):
        file.write_text(wrong)
        assert 'classes.txt should have lines "index name colour"' in refused(read_classes, file, 0)


def test_layout_is_found_inside(tmp_path):
    as_voc(tmp_path / 'data' / 'voc' / 'VOCdevkit' / 'VOC2012')
    assert find_layout(tmp_path / 'data' / 'voc') == (
        'voc',
        tmp_path / 'data' / 'voc' / 'VOCdevkit' / 'VOC2012',
    )
    assert len(load_segmentation_dataset('voc', 'train', 16)) == 4
    as_ade(tmp_path / 'data' / 'voc' / 'VOCdevkit' / 'ADE')
    assert 'holds 2 sets: ADE, VOC2012' in refused(load_segmentation_dataset, 'voc', 'train', 16)


# --- geometry


def test_nearest_invents_no_class_and_image_stays_aligned(tmp_path):
    image = np.zeros((40, 90, 3), np.uint8)
    ids = np.full((40, 90), 7, np.uint8)
    image[10:30, 45:], ids[10:30, 45:] = 255, 19
    ids[:, 80:] = IGNORE_LABEL
    put(image, tmp_path / 'x.png')
    put(ids, tmp_path / 'y.png')
    for side in (17, 32, 64, 201):
        x, y = read_pair(tmp_path / 'x.png', tmp_path / 'y.png', side, K)
        assert (
            x.shape == (3, side, side)
            and y.shape == (side, side)
            and set(y.unique().tolist()) == {7, 19, IGNORE_LABEL}
        )
        known = y != IGNORE_LABEL
        assert ((x[0] > 127) == (y == 19))[known].float().mean() > 0.9
        assert abs((~known).float().mean() - 1 / 9) < 0.04


# --- memory and workers


@pytest.mark.parametrize('layout', [as_voc, as_ade])
def test_memory_and_workers_agree(tmp_path, monkeypatch, layout):
    layout(tmp_path / 'data' / 'set', side=48)
    held = load_segmentation_dataset('set', 'train', 32, strict=True)
    monkeypatch.setattr(room, 'IN_MEMORY', 4 * 32 * 32 * 4 - 1)
    large = load_segmentation_dataset('set', 'train', 32, strict=True)
    assert (
        isinstance(held, InMemoryDataset)
        and isinstance(large, SegmentationDataset)
        and isinstance(load_segmentation_dataset('set', 'train', 32, limit=3), InMemoryDataset)
    )
    assert (
        len(large) == len(held) == 4
        and large.labels.tolist() == [0] * 4
        and large.side == 32
        and large.crop is None
    )
    orders = [torch.tensor([3, 1, 1]), torch.tensor([0, 2])]
    for workers in (0, 2):
        for (x, y), (a, b) in zip(large.batches(orders, workers), held.batches(orders), strict=True):
            assert x.equal(a) and y.equal(b) and x.dtype == y.dtype == torch.uint8


def test_limit_is_a_beginning(tmp_path):
    as_voc(tmp_path / 'data' / 'set')
    assert load_segmentation_dataset('set', 'train', 16, limit=2).labels.equal(load_segmentation_dataset('set', 'train', 16).labels[:2])
    few, more = load_segmentation_dataset('scenes', 'val', 16, limit=3), load_segmentation_dataset('scenes', 'val', 16, limit=70)
    assert (
        few.labels.equal(more.labels[:3])
        and few.images.equal(more.images[:3])
        and few.classes == list(REGIONS)
    )
    assert len(load_segmentation_dataset('scenes', 'val', 16)) == 1024 and not load_segmentation_dataset(
        'scenes', 'train', 16, limit=3
    ).labels.equal(few.labels)


# --- what can be wrong


def torn(file):
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])


@pytest.mark.parametrize(
    'fault,said',
    [
        ('image', 'a.0.jpg cannot be decoded'),
        ('map', 'a.0.png cannot be decoded'),
        ('sides', 'a.0.jpg has 32 x 32 pixels, but its map 32 x 30'),
    ],
)
def test_a_pair_that_cannot_be_used(tmp_path, fault, said):
    root = as_voc(tmp_path / 'voc')
    if fault == 'sides':
        put(truth()[1][0][:30], root / 'SegmentationClass' / 'a.0.png')
    else:
        torn(root / dict(image='JPEGImages/a.0.jpg', map='SegmentationClass/a.0.png')[fault])
    files, orders = (
        list_pairs(root, 'train'),
        [torch.tensor([0, 1]), torch.tensor([1, 3])],
    )  # a.0 is number 1, a.2 number 2
    held, warned = quiet(decode_pairs, files, 32, strict=False)
    assert (len(held), held.broken) == (3, 1) and len(warned) == 1 and said in warned[0]
    for workers in (0, 1):
        pairs = SegmentationDataset(files, 32)
        got, warned = quiet(lambda: list(pairs.batches(orders, workers)))
        assert pairs.broken == 1 and len(warned) == 1 and said in warned[0]
        assert got[0][1].equal(truth()[1][[4, 2]]) and got[0][0][1].equal(
            read_pair(files.images[2], files.maps[2], 32, K)[0]
        )
        assert said in refused(
            lambda: list(SegmentationDataset(files, 32, strict=True).batches(orders, workers))
        )
    assert said in refused(decode_pairs, files, 32, strict=True)


def test_no_pair_can_be_used(tmp_path):
    files = list_pairs(as_voc(tmp_path / 'voc'), 'train')
    for file in files.images:
        torn(file)
    assert 'neither can any of the 4 pairs' in refused(decode_pairs, files, 32, strict=False)
    assert 'cannot be decoded' in refused(
        lambda: list(SegmentationDataset(files, 32).batches([torch.tensor([2])]))
    )


@pytest.mark.parametrize('layout,value,span', [(as_voc, K, f'0 to {K - 1}'), (as_ade, K + 1, f'1 to {K}')])
def test_number_that_is_no_class(tmp_path, layout, value, span):
    files = list_pairs(layout(tmp_path / 'set'), 'train')
    ids = np.array(Image.open(files.maps[1]))
    ids[5, 5] = value
    put(ids, files.maps[1])
    line = f'{files.maps[1]} holds the number {value}; its classes are {span}, and 255 is undecided'
    assert line == refused(decode_pairs, files, 8, strict=False), (
        'even where the pixel would not survive resizing'
    )
    for workers in (0, 1):
        assert line == refused(
            lambda: list(SegmentationDataset(files, 8).batches([torch.tensor([0, 1])], workers))
        )
    put(np.zeros((32, 32, 3), np.uint8), files.maps[0])
    assert f'{files.maps[0]} holds colours' in refused(decode_pairs, files, 32, strict=False)


def test_layouts_splits_and_files_that_are_missing(tmp_path):
    (tmp_path / 'data' / 'heap' / 'deep' / 'deeper').mkdir(parents=True)
    assert 'heap has no label maps: neither JPEGImages/' in refused(load_segmentation_dataset, 'heap', 'train', 16)
    assert 'MIMSTUDY_DATA_NOWHERE' in refused(load_segmentation_dataset, 'nowhere', 'train', 16)
    (tmp_path / 'data' / 'packed.tar.xz').write_bytes(b'')
    assert 'packed.tar.xz is an archive' in refused(load_segmentation_dataset, 'packed', 'train', 16)
    assert 'scenes has no split "night"' in refused(load_segmentation_dataset, 'scenes', 'night', 16)
    voc, ade = as_voc(tmp_path / 'data' / 'voc'), as_ade(tmp_path / 'data' / 'ade')
    assert refused(list_pairs, voc, 'night') == 'voc has no split "night"; it has: nobody, train, val'
    assert refused(list_pairs, ade, 'test') == 'ade has no split "test"; it has: training, validation'
    assert 'the split "nobody"' in refused(list_pairs, voc, 'nobody') and 'is empty' in refused(
        list_pairs, voc, 'nobody'
    )
    (ade / 'images' / 'bare').mkdir()
    assert 'the split "bare"' in refused(list_pairs, ade, 'bare')
    for root, gone in ((voc, 'SegmentationClass/a.5.png'), (ade, 'annotations/validation/5.png')):
        (root / gone).unlink()
        assert f'5.{"jpg" if root == voc else "png"} has no map; it should be {root / gone}' in refused(
            list_pairs, root, 'val'
        )
    (voc / 'JPEGImages' / 'a.3.jpg').unlink()
    assert 'a.3.jpg is listed in the split "val", but it is not there' in refused(list_pairs, voc, 'val')
    for file in (ade / 'annotations' / 'training').iterdir():
        file.unlink()
    (ade / 'annotations' / 'training').rmdir()
    assert '0.png has no map' in refused(list_pairs, ade, 'train')


# --- real sets


def test_camvid(real_data):
    if not (real_data / 'camvid-voc').is_dir():
        pytest.skip('no camvid-voc')
    for split, n in (('train', 367), ('val', 101)):
        files = list_pairs(real_data / 'camvid-voc', split)
        assert (
            len(files.images) == len(files.maps) == n
            and len(files.classes) == 11
            and files.classes[0] == 'sky'
            and files.shift == 0
        )
    held = load_segmentation_dataset('camvid-voc', 'val', 64, limit=24, strict=True)
    there = set(held.labels.unique().tolist())
    assert (
        held.labels.shape == (24, 64, 64)
        and there <= {*range(11), IGNORE_LABEL}
        and {0, 1, 3, IGNORE_LABEL} <= there
    )


def test_ade(real_data):
    if not (real_data / 'ade20k-samples').is_dir():
        pytest.skip('no ade20k-samples')
    held = load_segmentation_dataset('ade20k-samples', 'val', 128, strict=True)
    assert (
        held.labels.shape == (3, 128, 128)
        and len(set(held.classes)) == 150
        and held.classes[:2] == ['wall', 'building']
    )
    assert set(held.labels.unique().tolist()) <= {*range(150), IGNORE_LABEL}
    assert 'no split "train"' in refused(load_segmentation_dataset, 'ade20k-samples', 'train', 128)
    files = list_pairs(real_data / 'ade20k-samples', 'val')
    raw, ids = (np.array(m) for m in (Image.open(files.maps[0]), read_label_map(files.maps[0], 150, 1)))
    assert ((raw == 0) == (ids == IGNORE_LABEL)).all() and (raw[raw > 0] - 1 == ids[raw > 0]).all()

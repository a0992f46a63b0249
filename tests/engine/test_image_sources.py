"Sources of images: archives have the layouts of folders, lists of labels, shards, datasets of Hugging Face."

import io
import json
import pickle
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mimstudy.core.errors import StudyError
from mimstudy.engine import datasets
from mimstudy.engine.archives import ArchiveTree
from mimstudy.engine.datasets import load_dataset
from mimstudy.engine.image_folder import FolderDataset, decode_image
from mimstudy.engine.image_sources import dataset_kind, open_images
from mimstudy.engine.shards import shard_files


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "Each test has its own cache and data folder."
    (tmp_path / 'data').mkdir()
    monkeypatch.setenv('MIMSTUDY_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))


def png(i):
    "Image number i: 8 x 8 pixels of noise."
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'png')
    return file.getvalue()


def write(root, files):
    "Files of a folder; a number is the content of that image."
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = png(content) if isinstance(content, int) else content
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def pack(root, suffix, below=''):
    "An archive of a folder beside it."
    file = root.with_name(f'{root.name}{suffix}')
    paths = sorted(root.rglob('*'))
    if suffix == '.zip':
        with zipfile.ZipFile(file, 'w') as archive:
            for path in paths:
                archive.write(path, f'{below}{path.relative_to(root)}')
        return file
    with tarfile.open(file, 'w:' + suffix.removeprefix('.tar').removeprefix('.')) as archive:
        for path in paths:
            archive.add(path, f'{below}{path.relative_to(root)}', recursive=False)
    return file


def images(*folders, count=3, suffix='.png'):
    "Numbered images of some folders."
    names = [f'{folder}/{i:03}{suffix}' for folder in folders for i in range(count)]
    return {name: i for i, name in enumerate(names)}


def refusal(call, *args):
    "The message of the `StudyError` that a call raises; it is one line."
    with pytest.raises(StudyError) as error:
        call(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


def development_kit():
    "The numbers of three validation images, and the table of the classes."
    table = io.BytesIO()
    synsets = np.array([(1, 'n02'), (2, 'n01'), (3, 'n03')], dtype=[('ILSVRC2012_ID', int), ('WNID', object)])
    savemat(table, {'synsets': synsets})
    kit = 'ILSVRC2012_devkit_t12/data'
    return {
        f'{kit}/ILSVRC2012_validation_ground_truth.txt': '2\n1\n2\n',
        f'{kit}/meta.mat': table.getvalue(),
    }


TRAIN = images('train/n01', 'train/n02')
VAL = images('val')
HIDDEN = {
    'train/n01/.ipynb_checkpoints/000-checkpoint.png': 1,
    'train/.ipynb_checkpoints/x.png': 1,
    'train/n01/._000.png': 'mac',
    '__MACOSX/train/n01/000.png': 1,
}
PUBLISHED = images('train/n01/images', 'train/n02/images', suffix='.JPEG') | images('val/images')
ANNOTATIONS = ''.join(f'{i:03}.png\tn0{1 + (i == 1)}\t0\t0\t7\t7\n' for i in range(3))
SOLUTION = 'ImageId,PredictionString\n002,n01 1 1 3 3 n01 2 2 4 4 \n000,n01 0 0 7 7 \n001,n02 0 0 7 7 \n'
CLASS_A_LINE = {'imagenet_2012_validation_synset_labels.txt': 'n01\nn02\nn01\n'}
LAYOUTS = {  # name -> files, classes, names of the training images, labels of the validation images
    'splits': (TRAIN | images('val/n01', 'val/n02') | HIDDEN, 6, [0, 0, 0, 1, 1, 1]),
    'one folder deeper': (
        {f'set/{k}': v for k, v in (TRAIN | images('test/n01', 'test/n02')).items()},
        6,
        [0] * 3 + [1] * 3,
    ),
    'held out': (images('n01', 'n02', count=12), 22, [0, 1]),
    'held out of train': (images('train/n01', 'train/n02', count=12), 22, [0, 1]),
    'Tiny ImageNet': (
        PUBLISHED | {'val/val_annotations.txt': ANNOTATIONS} | images('test/images'),
        6,
        [0, 0, 1],
    ),
    'ImageNet, Kaggle': (
        {f'ILSVRC/Data/CLS-LOC/{k}': v for k, v in (TRAIN | VAL | images('test')).items()}
        | {'LOC_val_solution.csv': SOLUTION, 'ILSVRC/Annotations/x.xml': ''},
        6,
        [0, 0, 1],
    ),
    'ImageNet, development kit': (TRAIN | VAL | development_kit(), 6, [0, 0, 1]),
    'ImageNet, TensorFlow': (TRAIN | VAL | CLASS_A_LINE, 6, [0, 0, 1]),
    'ImageNet, Caffe': (TRAIN | VAL | {'val.txt': '000.png 0\n001.png 1\n002.png 0\n'}, 6, [0, 0, 1]),
}


@pytest.mark.filterwarnings('ignore:.*no validation split')
@pytest.mark.parametrize('suffix', ['', '.zip', '.tar', '.tar.gz'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts_of_folders_and_archives(tmp_path, name, suffix):
    files, n_train, val_labels = LAYOUTS[name]
    root = write(tmp_path / 'set', files)
    source = pack(root, suffix) if suffix else root
    train, val = (open_images(source, split) for split in ('train', 'val'))
    assert train.classes == val.classes == ['n01', 'n02']
    assert len(train.names) == n_train and torch.bincount(train.labels).tolist() == [n_train // 2] * 2
    assert val.labels.tolist() == val_labels and {*train.names}.isdisjoint(val.names)
    for one in (*train.names, *val.names):
        expected = decode_image(png(files[one]))
        assert np.array_equal(
            decode_image(train.read(one) if one in train.names else val.read(one)), expected
        )
    if 'ImageNet' in name:
        assert [int(one[-8:-4].strip('/.')) for one in val.names] == [0, 2, 1]


@pytest.mark.parametrize('suffix', ['', '.zip', '.tar', '.tar.gz'])
@pytest.mark.parametrize(
    'files, split, message',
    [
        (TRAIN | VAL, 'val', 'val has no folders of classes, and another split has'),
        (TRAIN | images('val/images'), 'val', 'val has no folders of classes, and another split has'),
        (TRAIN | images('val/n01'), 'val', 'val: the class "n02" has no image'),
        (TRAIN | images('val/n01', 'val/n02', 'val/n03'), 'train', 'train: the class "n03" has no image'),
        (TRAIN | VAL | {'val.txt': '000.png 0\n'}, 'val', 'val.txt has no label for 2 of 3 images: 001'),
        (TRAIN | VAL | {'val.txt': '000.png n7\n001.png n7\n002.png n7\n'}, 'val', 'training images: n7'),
        (TRAIN | VAL | CLASS_A_LINE | {'val/9.png': 1}, 'val', 'does not list the labels of 4 images'),
        (images('.'), 'val', 'has no split "val"; it has: no folders'),
        (images('photos'), 'val', 'has no classes, so no validation images are held out'),
        ({'notes.txt': ''}, 'train', 'has no image; names of images end with'),
        (TRAIN, 'night', 'has no split "night"; it has: train'),
    ],
)
def test_what_is_refused_of_folders_and_archives(tmp_path, files, split, message, suffix):
    root = write(tmp_path / 'set', files)
    source = pack(root, suffix) if suffix else root
    found = refusal(open_images, source, split)
    assert found.startswith(f'set{suffix}') and message in found


@pytest.mark.parametrize('suffix', ['', '.zip', '.tar', '.tar.gz'])
@pytest.mark.parametrize('folder', ['.', 'photos', 'images', 'train', 'train/images', 'train/photos'])
def test_images_of_no_class_are_all_taken(tmp_path, folder, suffix):
    "Also those of a single class: `per_class` is for sets with classes."
    root = write(tmp_path / 'set', images(folder, count=16))
    found = open_images(pack(root, suffix) if suffix else root, 'train', per_class=5)
    assert len(found.names) == 16 and found.classes == ['images'] and not found.labels.any()


WITHOUT_CLASSES = {  # name -> files, number of training images, of validation images
    'Pascal VOC': (
        {f'VOCdevkit/VOC2012/{k}': v for k, v in images('JPEGImages', 'SegmentationClass').items()}
        | {'VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt': '000\n'},
        3,
        0,
    ),
    'ADE20K': (images('images/training', 'images/validation', 'annotations/training'), 3, 3),
    'COCO': (images('train2017', 'val2017', 'semseg/train2017') | {'annotations/x.json': '{}'}, 3, 3),
}


@pytest.mark.parametrize('suffix', ['', '.zip', '.tar', '.tar.gz'])
@pytest.mark.parametrize('name', WITHOUT_CLASSES)
def test_label_maps_are_no_images(tmp_path, name, suffix):
    files, *counts = WITHOUT_CLASSES[name]
    root = write(tmp_path / 'set', files)
    source = pack(root, suffix) if suffix else root
    for split, count in zip(('train', 'val'), counts):
        if count:
            found = open_images(source, split)
            assert len(found.names) == count and found.classes == ['images']
            assert not any(part in one for one in found.names for part in ('Class', 'annotations', 'semseg'))
        else:
            assert 'has no split "val"' in refusal(open_images, source, split)


def test_training_images_are_found_beside_an_unlabelled_test_split(tmp_path):
    root = write(tmp_path / 'set', TRAIN | images('val/n01', 'val/n02') | images('test/images'))
    assert open_images(root, 'train').classes == open_images(root, 'val').classes == ['n01', 'n02']


@pytest.mark.parametrize('suffix', ['.zip', '.tar', '.tar.gz'])
def test_a_large_archive_is_decoded_by_workers_as_a_folder_is(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(datasets, 'IN_MEMORY', 0)
    root = write(tmp_path / 'data' / 'one', TRAIN)
    pack(root, suffix).rename(tmp_path / 'data' / f'two{suffix}')
    sampler = [torch.tensor([3, 0]), torch.tensor([1, 2])]
    for workers in (0, 2):
        batches = []
        for name in ('one', 'two'):
            dataset = load_dataset(name, 'train', 8)
            assert isinstance(dataset, FolderDataset)
            batches.append([x for x, _ in dataset.batches(sampler, workers)])
        assert all(a.equal(b) for a, b in zip(*batches, strict=True))
    assert not (tmp_path / 'cache').exists()


def test_an_archive_is_opened_again_in_another_process(tmp_path):
    file = pack(write(tmp_path / 'set', TRAIN), '.zip')
    tree = pickle.loads(pickle.dumps(ArchiveTree(file)))
    assert tree.read('train/n01/000.png') == png(0)


@pytest.mark.parametrize('damage', ['half', 'text', 'encrypted'])
def test_a_damaged_zip_is_one_line(tmp_path, damage):
    file = pack(write(tmp_path / 'set', TRAIN), '.zip')
    content = bytearray(file.read_bytes())
    if damage == 'encrypted':
        for i in range(len(content) - 4):
            if content[i : i + 4] in (b'PK\x03\x04', b'PK\x01\x02'):
                content[i + (6 if content[i + 2] == 3 else 8)] |= 1
        file.write_bytes(content)
        found = open_images(file, 'train')
        assert decode_image(found.read(found.names[0])) is None
        return
    file.write_bytes(content[: len(content) // 2] if damage == 'half' else b'no archive' * 99)
    assert refusal(open_images, file, 'train').startswith(f'{file} cannot be read: ')


def test_a_link_in_a_zip_is_no_image(tmp_path):
    file = pack(write(tmp_path / 'set', TRAIN), '.zip')
    with zipfile.ZipFile(file, 'a') as archive:
        link = zipfile.ZipInfo('train/n01/link.png')
        link.external_attr = 0o120777 << 16
        archive.writestr(link, '/etc/passwd')
    assert not any('link' in name for name in open_images(file, 'train').names)


# -- shards --------------------------------------------------------------------------------------------------


def write_shards(folder, splits=('train', 'val'), label='cls', count=12):
    "Two shards of each split; image i has the class i % 3, whose name is a number."
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        for shard in range(2):
            with tarfile.open(folder / f'set-{split}-{shard:03}.tar', 'w') as archive:
                for i in range(shard * count // 2, (shard + 1) * count // 2):
                    label_file = json.dumps({'label': 9 + i % 3}) if label == 'json' else str(9 + i % 3)
                    for name, content in ((f'{i:04}.png', png(i)), (f'{i:04}.{label}', label_file.encode())):
                        if label or not name.endswith('.'):
                            info = tarfile.TarInfo(name)
                            info.size = len(content)
                            archive.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.filterwarnings('ignore:.*no validation split')
@pytest.mark.parametrize('label', ['cls', 'json'])
@pytest.mark.parametrize('form', ['folder', 'pattern', 'held out'])
def test_shards(tmp_path, form, label):
    pytest.importorskip('webdataset')
    splits = ('train',) if form == 'held out' else ('train', 'val')
    count = 60 if form == 'held out' else 12
    folder = write_shards(tmp_path / 'shards', splits, label, count)
    source = folder / 'set-{train,val}-{000..001}.tar' if form == 'pattern' else folder
    assert dataset_kind(source) == 'shards'
    train, val = (open_images(source, split) for split in ('train', 'val'))
    assert train.classes == val.classes == ['9', '10', '11']
    assert (len(train.names), len(val.names)) == ((54, 6) if form == 'held out' else (12, 12))
    for name, k in zip(train.names, train.labels.tolist()):
        assert train.read(name) == png(int(name)) and int(name) % 3 == k
    assert open_images(source, 'train', per_class=2).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_shards_without_labels(tmp_path):
    pytest.importorskip('webdataset')
    source = write_shards(tmp_path / 'shards', ('train',), '')
    found = open_images(source, 'train', per_class=2)
    assert len(found.names) == 12 and found.classes == ['images']


def test_shards_load_by_name(tmp_path):
    pytest.importorskip('webdataset')
    write_shards(tmp_path / 'data' / 'shards')
    assert load_dataset('shards', 'val', 8).images.shape == (12, 3, 8, 8)


def test_shards_that_cannot_be_read(tmp_path):
    pytest.importorskip('webdataset')
    folder = write_shards(tmp_path / 'shards', ('train',))
    file = folder / 'set-train-001.tar'
    file.write_bytes(file.read_bytes()[:3000])
    assert 'a shard cannot be read' in refusal(open_images, folder, 'train')
    assert 'no file has a name of the pattern' in refusal(open_images, folder / 'x-{0..3}.tar', 'train')


def test_archives_of_classes_are_said_to_be_that(tmp_path):
    for i in (1, 2):
        write(tmp_path / 'set', {f'train/n0000000{i}.tar': b''})
    assert refusal(shard_files, tmp_path / 'set') == (
        'set holds 2 tar files, one for each class; unpack each into its own folder'
    )


# -- datasets of Hugging Face --------------------------------------------------------------------------------


def hugging_face(splits=('train', 'test'), labels=True):
    "A small dataset of the library; image i has the class i % 3."
    hf = pytest.importorskip('datasets')
    columns = {'image': hf.Image()}
    if labels:
        columns['label'] = hf.ClassLabel(names=['cat', 'ant', 'bee'])
    rows = {'image': [{'bytes': png(i), 'path': None} for i in range(30)]}
    if labels:
        rows['label'] = [i % 3 for i in range(30)]
    return hf.DatasetDict({s: hf.Dataset.from_dict(rows, features=hf.Features(columns)) for s in splits})


@pytest.mark.filterwarnings('ignore:.*no validation split')
@pytest.mark.parametrize('form', ['saved', 'one split', 'parquet folder', 'parquet file'])
def test_hugging_face(tmp_path, form):
    made = hugging_face()
    folder = tmp_path / 'data' / 'mine'
    if form == 'saved':
        made.save_to_disk(str(folder))
    elif form == 'one split':
        made['train'].save_to_disk(str(folder))
    else:
        (folder / 'data').mkdir(parents=True)
        for split in ('train', 'test'):
            made[split].to_parquet(str(folder / 'data' / f'{split}-00000-of-00001.parquet'))
    source = folder / 'data' / 'train-00000-of-00001.parquet' if form == 'parquet file' else folder
    assert dataset_kind(source) == 'hugging face'
    train, val = (open_images(source, split) for split in ('train', 'val'))
    assert train.classes == val.classes == ['cat', 'ant', 'bee']
    sizes = (30, 30) if form in ('saved', 'parquet folder') else (27, 3)
    assert (len(train.names), len(val.names)) == sizes
    for name, k in zip(train.names, train.labels.tolist()):
        assert train.read(name) == png(int(name)) and int(name) % 3 == k
    if form == 'saved':
        assert load_dataset('mine', 'train', 8, per_class=2).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_hugging_face_without_labels(tmp_path):
    hugging_face(('train',), labels=False).save_to_disk(str(tmp_path / 'mine'))
    found = open_images(tmp_path / 'mine', 'train', per_class=2)
    assert len(found.names) == 30 and found.classes == ['images']


def test_hugging_face_by_name_downloads_nothing(tmp_path, monkeypatch):
    hf = pytest.importorskip('datasets')
    asked = []

    def load(name, **options):
        asked.append((name, options['download_config'].local_files_only))
        if name == 'absent':
            raise FileNotFoundError('no such dataset\nmore')
        return hugging_face()

    monkeypatch.setattr(hf, 'load_dataset', load)
    monkeypatch.setenv('MIMSTUDY_DATA_MINE', 'hf:someone/mine')
    monkeypatch.setenv('MIMSTUDY_DATA_ABSENT', 'hf:absent')
    assert len(load_dataset('mine', 'val', 8)) == 30
    message = refusal(load_dataset, 'absent', 'train', 8)
    assert message.startswith('hf:absent cannot be read: no such dataset; it must lie in the cache')
    assert asked == [('someone/mine', True), ('absent', True)]


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'state.json').write_text('{}')
    assert refusal(open_images, tmp_path / 'mine', 'train').endswith('pip install "mimstudy[hf]"')
    folder = write_shards(tmp_path / 'shards')
    assert refusal(open_images, folder, 'train').endswith('pip install "mimstudy[webdataset]"')

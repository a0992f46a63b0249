"`mimstudy data`: what a dataset holds, what is wrong with it, and where to get what is missing."

import zipfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.engine import downloads, survey as module
from mimstudy.engine.dataset_catalogue import DATASETS, dataset_names, dataset_state
from mimstudy.engine.survey import survey


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    "An empty data folder; nothing may be downloaded."
    monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))
    monkeypatch.setattr(downloads, '_torchvision_data', lambda *_: pytest.fail('a download was started'))
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data'


def show(name):
    "The lines of the command, which fit into 80 columns, and its exit code."
    done = CliRunner().invoke(app, ['data', str(name)])
    lines = done.output.splitlines()
    assert all(len(line) <= 80 or ' ' not in line.strip() for line in lines), done.output
    return lines, done.exit_code


def save(file, size=(8, 6)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(file)


def labelled(root, train=(4, 3), val=(2, 2)):
    for split, counts in (('train', train), ('val', val)):
        for label, count in zip(('ant', 'bee'), counts):
            for i in range(count):
                save(root / split / label / f'{i}.png', (8 + i, 6))
    return root


def test_a_set_that_can_be_used(data):
    labelled(data / 'pics')
    lines, code = show('pics')
    assert code == 0 and lines == [
        'pics: folder',
        '  train       7 images in 2 classes, 3 to 4 in each, 8 x 6 to 11 x 6 pixels',
        '  val         4 images in 2 classes, 2 in each, 8 x 6 to 9 x 6 pixels',
        '  classes     ant, bee',
        '  usable for  pre-training and probes',
    ]
    with zipfile.ZipFile(data / 'packed.zip', 'w') as archive:
        for file in (data / 'pics').rglob('*.png'):
            archive.write(file, file.relative_to(data))
    assert show('packed') == (['packed: archive', *lines[1:]], 0)


def test_all_unreadable_files_are_named_at_once(data, monkeypatch):
    root = labelled(data / 'pics')
    (root / 'train' / 'ant' / '0.png').write_bytes(b'torn')
    for name in ('ant/1.png', 'bee/0.png'):
        (root / 'val' / name).write_bytes(b'torn')
    lines, code = show('pics')
    assert code == 1 and '              1 of 7 cannot be decoded:' in lines
    assert [line.strip() for line in lines if line.endswith('.png')] == [
        'train/ant/0.png',
        'val/ant/1.png',
        'val/bee/0.png',
    ]
    assert '  problem     2 of 4 validation images cannot be decoded: replace them' in lines
    for file in (root / 'val').rglob('*.png'):
        save(file)
    assert show('pics')[1] == 0, 'a broken training image is left out and counted'
    monkeypatch.setattr(module, 'WORKERS_FROM', 1)
    assert survey('pics').splits[0].unreadable == ['train/ant/0.png']


def test_a_set_without_classes(data):
    for i in range(3):
        save(data / 'flat' / f'{i}.png')
    lines, code = show(data / 'flat')
    assert code == 0 and lines[0].startswith('flat-') and lines[0].endswith(': folder')
    assert lines[1] == '  train       3 images, no classes, 8 x 6 pixels'
    assert lines[-1] == '  usable for  pre-training; it has no classes to probe'


def test_a_split_that_is_held_out_is_said_to_be(data):
    for label in ('ant', 'bee'):
        for i in range(12):
            save(data / 'pics' / label / f'{i}.png')
    lines, code = show('pics')
    assert code == 0 and '  val         2 images in 2 classes, 1 in each, 8 x 6 pixels' in lines
    assert any('no validation split: every tenth image' in line for line in lines)


@pytest.mark.parametrize(
    'spoil, problem',
    [
        (lambda root: save(root / 'val' / 'cat' / '0.png'), 'the class "cat" has no image'),
        (lambda root: [f.unlink() for f in (root / 'val' / 'bee').iterdir()], 'class "bee" has no image'),
        (
            lambda root: [f.write_bytes(b'') for f in (root / 'train').rglob('*.png')],
            'none of the 7 training',
        ),
        (
            lambda root: (root / 'val').rename(root / 'x') and save(root / 'val' / '0.png'),
            'no folders of classes',
        ),
    ],
)
def test_a_set_that_cannot_be_used(data, spoil, problem):
    spoil(labelled(data / 'pics'))
    lines, code = show('pics')
    text = ' '.join(line.strip() for line in lines)
    assert code == 1 and problem in text and lines[-1].endswith('cannot be used as it is')


@pytest.mark.parametrize('name', [n for n, info in DATASETS.items() if info.kind != 'scenes'])
def test_what_is_missing_and_where_to_get_it(name):
    lines, code = show(name)
    text = ' '.join(line.strip() for line in lines)
    info = DATASETS[name]
    assert code == 1 and lines[0] == f'{name}: not on this machine'
    assert info.origin in text and info.terms in text and f'settings.ini [data] {name}' in text
    assert ('verifies its checksum' in text) == (info.kind == 'torchvision')


def test_scenes_unknown_names_and_label_maps(data):
    assert show('scenes')[1] == 0
    lines, code = show('scnes')
    assert code == 2 and 'did you mean scenes' in lines[0]
    missing = CliRunner().invoke(app, ['data', str(data / 'nothing')])
    assert missing.exit_code == 2 and 'there is no dataset at' in missing.output
    for i in range(3):
        save(data / 'voc' / 'JPEGImages' / f'{i}.jpg')
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(data / 'voc' / f'{i}.png')
    (data / 'voc' / 'SegmentationClass').mkdir()
    (data / 'voc' / 'ImageSets' / 'Segmentation').mkdir(parents=True)
    for i in range(3):
        (data / 'voc' / f'{i}.png').rename(data / 'voc' / 'SegmentationClass' / f'{i}.png')
    (data / 'voc' / 'ImageSets' / 'Segmentation' / 'train.txt').write_text('0\n1\n2\n')
    lines, code = show('voc')
    assert code == 0 and '  label maps  train: 3 label maps (voc), 21 classes' in lines
    Image.fromarray(np.zeros((5, 8), np.uint8)).save(data / 'voc' / 'SegmentationClass' / '1.png')
    lines, code = show('voc')
    assert code == 1 and any('but its label map 8 x 5' in line for line in lines)


def test_the_list_marks_what_is_not_there(data, monkeypatch):
    labelled(data / 'pics')
    monkeypatch.setenv('MIMSTUDY_DATA_GONE', str(data / 'nowhere'))
    done = CliRunner().invoke(app, ['list', 'data'])
    assert all(len(line) <= 80 for line in done.output.splitlines())
    states = {line.split()[0]: line.split()[1] for line in done.output.splitlines() if line[0] != ' '}
    assert states == {name: dataset_state(name) for name in dataset_names()}
    expected = dict(scenes='made', pics='here', gone='missing', imagenet='missing', cifar10='download')
    assert expected.items() <= states.items()
    assert CliRunner().invoke(app, ['data']).output == done.output

"Changed images: fingerprints, records and trainings of other files, datasets that are given as a path."

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from PIL import Image

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.settings import dataset_path
from mimstudy.engine import fingerprint as module
from mimstudy.engine.fingerprint import fingerprint, named_dataset
from mimstudy.papers.experiments import experiment
from mimstudy.study.changed_images import (
    change_lines,
    claim_folder,
    images_fingerprint,
    is_done,
)
from mimstudy.study.plan import status
from mimstudy.study.records import RecordStore, record
from mimstudy.study.row import evaluate_row, pretrain

MIMSTUDY = [sys.executable, '-m', 'mimstudy']


@pytest.fixture
def data(tmp_path, monkeypatch):
    "The data folder, with a set of 24 training and 6 validation images of two classes."
    monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('MIMSTUDY_CACHE', '')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    write_set(tmp_path / 'data' / 'pics')
    return tmp_path / 'data'


def write_set(root, train=48, first=0):
    world = scenes(train + 12, 32, seed=first)
    for i, image in enumerate(world.images):
        folder = root / ('train' if i < train else 'val') / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'{i:02}.bmp')
    return root


def pack(root, file):
    if file.suffix == '.zip':
        with zipfile.ZipFile(file, 'w') as archive:
            for path in sorted(root.rglob('*.bmp')):
                archive.write(path, path.relative_to(root))
    else:
        with tarfile.open(file, 'w:xz' if file.suffix == '.xz' else 'w') as archive:
            archive.add(root, '.')
    return file


# -- fingerprints -----------------------------------------------------------------------------------


def add(root):
    shutil.copy(root / 'train/a/00.bmp', root / 'train/a/99.bmp')


def rename(root):
    (root / 'train/a/00.bmp').rename(root / 'train/a/98.bmp')


def replace_by_the_same_size(root):
    content = bytearray((root / 'val/b/49.bmp').read_bytes())
    content[len(content) // 2] ^= 1
    (root / 'val/b/49.bmp').write_bytes(content)


def swap_two_classes(root):
    (root / 'train/a').rename(root / 'train/c')
    (root / 'train/b').rename(root / 'train/a')
    (root / 'train/c').rename(root / 'train/b')


def change_a_list(root):
    (root / 'val' / 'val_annotations.txt').write_text('00.bmp\ta\n')


CHANGES = (add, rename, replace_by_the_same_size, swap_two_classes, change_a_list)


@pytest.mark.parametrize('form', ['folder', '.zip', '.tar', '.tar.xz'])
@pytest.mark.parametrize('change', CHANGES)
def test_every_change_is_noticed(data, change, form):
    root = data / 'pics'
    seen = []
    for i in range(2):
        if form != 'folder':
            pack(root, data / f'packed{form}')
        seen.append(fingerprint('pics' if form == 'folder' else 'packed'))
        if i == 0:
            change(root)
    assert seen[0] != seen[1] or (change is change_a_list and form == '.zip')


def test_what_is_no_change(data):
    before = fingerprint('pics')
    (data / 'pics' / 'train' / '.DS_Store').touch()
    (data / 'pics' / '.ipynb_checkpoints').mkdir()
    shutil.copy(data / 'pics/train/a/00.bmp', data / 'pics/.ipynb_checkpoints/0.bmp')
    (data / 'pics' / 'train' / 'a' / '00.bmp').touch()
    assert fingerprint('pics') == before
    shutil.copytree(data / 'pics', data / 'copy')
    assert fingerprint('copy') == before
    assert (fingerprint('scenes'), fingerprint('cifar10')) == ('scenes', 'cifar10')


def test_a_fingerprint_reads_little(data, monkeypatch):
    read = []
    original = module._read_at
    monkeypatch.setattr(module, 'SAMPLED_FILES', 8)
    monkeypatch.setattr(module, '_read_at', lambda *a: read.append(a[2]) or original(*a))
    fingerprint('pics')
    assert len(read) == 8 and max(read) == module.SAMPLED_BYTES


def test_the_fingerprint_of_committed_records_is_that_of_today(real_data):
    archive = real_data / 'tiny-imagenet-64c' / 'tiny-imagenet-64c.tar.xz'
    assert fingerprint('tiny-imagenet-64c') == '48,032,788 bytes, 963c449b9681' or not archive.is_file()


# -- records and trainings ---------------------------------------------------------------------------


def test_a_record_of_other_images_is_not_done(data, tmp_path):
    one = experiment('semanticmim-t1/random', 'smoke', 'pics')
    store = RecordStore(tmp_path / 'out')
    evaluate_row(one, pretrain(one, store), store)
    assert status(one, store) == 'done' and change_lines([one], store) == []
    before = images_fingerprint(one)
    add(data / 'pics')
    store = RecordStore(tmp_path / 'out')
    assert status(one, store) == 'changed' and not is_done(one, store)
    (line,) = change_lines([one], store)
    today = images_fingerprint(one)
    assert line == (
        f'pics has changed since 1 record was made: {before} then, {today} now; the rows are run again'
    )
    evaluate_row(one, pretrain(one, store), store)
    (now,) = store.find(experiment=one.id)
    assert status(one, store) == 'done' and now['fingerprint'] == today != before


def test_fingerprints_are_computed_once_and_only_for_records(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr('mimstudy.study.changed_images.fingerprint', lambda name: calls.append(name) or name)
    store = RecordStore(tmp_path / 'out')
    rows = [experiment(f'semanticmim-t1/{row}', 'smoke', 'pics') for row in ('random', 'pixels', 'beit')]
    assert {status(one, store) for one in rows} == {'missing'} and calls == []
    for one in rows:
        store.add(record(one, 'linear', {'linear/1/patch': 1.0}, 9, fingerprint='pics'))
    assert {status(one, store) for one in rows} == {'done'} and calls == ['pics']


@pytest.mark.parametrize('known', ['', 'scenes'])
def test_an_unknown_fingerprint_is_no_change(data, tmp_path, known):
    "A record without one, or a dataset that is not on this machine."
    store = RecordStore(tmp_path / 'out')
    one = experiment('semanticmim-t1/beit', 'smoke', 'pics' if not known else 'scenes')
    store.add(record(one, 'linear', {'linear/1/patch': 1.0}, 9, fingerprint=known))
    assert status(one, store) == 'done'
    away = experiment('semanticmim-t1/beit', 'laptop')
    store.add(record(away, 'linear', {'linear/1/patch': 1.0}, 9, fingerprint='9 files, abc'))
    assert status(away, store) == 'done'


def test_a_training_of_other_images_is_set_aside(data, tmp_path):
    one = experiment('semanticmim-t1/maskfeat', 'smoke', 'pics')
    store = RecordStore(tmp_path / 'out')
    first = pretrain(one, store)
    folder = store.run_folder(one.train_id)
    assert status(one, store) == 'trained'
    shutil.rmtree(data / 'pics')
    write_set(data / 'pics', first=7)  # as many images of the same names and sizes
    store = RecordStore(tmp_path / 'out')
    assert status(one, store) == 'changed'
    second = pretrain(one, store)
    assert status(one, store) == 'trained'
    assert first.history.loss.tolist() != second.history.loss.tolist()
    assert len([*folder.parent.glob(f'{folder.name}*')]) == 2
    assert pretrain(one, store).history.loss.tolist() == second.history.loss.tolist()


def test_an_older_folder_is_judged_by_its_records(tmp_path):
    folder = tmp_path / 'runs' / 'x'
    folder.mkdir(parents=True)
    (folder / 'done.json').touch()
    claim_folder(folder, 'now', [])
    assert (folder / 'done.json').exists()
    (folder / 'images.json').unlink()
    claim_folder(folder, 'now', ['before'])
    assert not (folder / 'done.json').exists() and (tmp_path / 'runs' / 'x-before' / 'done.json').exists()
    claim_folder(folder, 'later')
    claim_folder(folder, 'now')
    claim_folder(folder, 'later')  # what an earlier change left is replaced
    assert json.loads((folder / 'images.json').read_text()) == {'fingerprint': 'later'}


def test_label_maps_of_another_dataset_are_part_of_it(data, tmp_path, monkeypatch):
    one = experiment('semanticmim-t1/beit', 'paper', 'pics', protocols=('voc',))
    own = one.downstream_config('voc').data.dataset
    monkeypatch.setenv(f'MIMSTUDY_DATA_{own.upper().replace("-", "_")}', str(data / 'pics'))
    assert images_fingerprint(one, 'voc') == '; '.join([fingerprint('pics')] * 2)
    assert images_fingerprint(one, 'linear') == images_fingerprint(one) == fingerprint('pics')
    made = experiment('semanticmim-t1/beit', 'smoke', 'pics', protocols=('voc',))
    assert images_fingerprint(made, 'voc') == fingerprint('pics')


@pytest.mark.slow
def test_the_command_runs_the_rows_of_a_changed_set_again(data, tmp_path):
    words = ['run', 'semanticmim-t1', '--rows', 'random', 'pixels', '--scale', 'smoke', '--data', 'pics']
    words += ['--results', str(tmp_path / 'out')]

    def call(*more):
        done = subprocess.run([*MIMSTUDY, *words, *more], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    call()
    assert '2 done' in call('--dry-run')
    replace_by_the_same_size(data / 'pics')
    said = call()
    assert '2 changed' in said and 'pics has changed since 2 records were made: 60 files' in said
    assert '2 done' in call('--dry-run')


# -- datasets that are given as a path ---------------------------------------------------------------


@pytest.fixture
def environment():
    "The variables of this process are as before afterwards."
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_a_path_is_named_after_its_stem_and_its_images(data, tmp_path, environment):
    root = write_set(tmp_path / 'My Photos')
    name = named_dataset(str(root))
    assert name.startswith('my-photos-') and dataset_path(name) == root
    assert named_dataset(f'{root}/') == name
    packed = named_dataset(str(pack(root, tmp_path / 'Packed.zip')))
    assert packed.startswith('packed-')
    copy = shutil.copytree(root, tmp_path / 'elsewhere' / 'My Photos')
    assert named_dataset(str(copy)) == name
    add(root)
    assert named_dataset(str(root)) != name
    one = experiment('semanticmim-t1/random', 'smoke', name)
    assert str(tmp_path) not in json.dumps(one.values) and name in one.id


def test_a_name_is_preferred_to_a_path(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'scenes').mkdir()
    assert named_dataset('scenes') == 'scenes'
    with pytest.raises(StudyError, match='there is no dataset at ./nothing'):
        named_dataset('./nothing')
    assert named_dataset('nothing') == 'nothing'

"The images of all rows are checked before the first process of a run starts."

import zipfile

import pytest
from PIL import Image
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine.datasets import load_dataset
from mimstudy.papers.experiments import experiment
from mimstudy.study import image_check, scheduler
from mimstudy.study.image_check import check_images, check_split


@pytest.fixture
def pics(tmp_path, monkeypatch):
    "A folder of 60 training and 20 validation images in two classes; no row may be started."
    monkeypatch.setenv('MIMSTUDY_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('MIMSTUDY_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(scheduler, 'execute', lambda *_: pytest.fail('a row was started'))
    for i, image in enumerate(scenes(80, 32).images):
        file = tmp_path / 'data' / 'pics' / ('train' if i < 60 else 'val') / 'ab'[i % 2] / f'{i:02}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return tmp_path / 'data' / 'pics'


def run(pics, *more):
    "`mimstudy run` of two rows on the folder."
    words = ['run', 'semanticmim-t1', '--rows', 'pixels', 'beit', '--scale', 'smoke', '--data', 'pics']
    return CliRunner().invoke(app, [*words, '--results', str(pics.parent.parent / 'out'), *more])


def rows(*names):
    return [experiment(f'semanticmim-t1/{name}', 'smoke', 'pics') for name in names]


def test_all_broken_validation_images_are_named_before_anything_starts(pics):
    for name in ('a/60.png', 'b/71.png'):
        (pics / 'val' / name).write_bytes(b'broken')
    done = run(pics)
    *plan, error = done.stderr.splitlines()
    assert done.exit_code == 2 and 'Traceback' not in done.output
    assert len(plan) == 1 and plan[0].startswith('semanticmim-t1 at smoke scale on pics')
    assert error.startswith('error: 2 of 20 validation images of pics cannot be decoded')
    assert 'val/a/60.png' in error and 'val/b/71.png' in error
    assert not list(pics.parent.parent.glob('out/runs/*'))


def test_every_problem_is_in_the_one_message(pics):
    (pics / 'val' / 'a' / '60.png').write_bytes(b'broken')
    for file in [*(pics / 'train').glob('*/*')][15:]:
        file.write_bytes(b'broken')
    with pytest.raises(StudyError) as error:
        check_images(rows('pixels', 'beit'))
    assert '\n' not in str(error.value)
    for part in ('a/60.png', 'training images, and smoke scale trains with batches of 32'):
        assert part in str(error.value)


def test_a_class_that_one_split_lacks_is_named(pics):
    (pics / 'val' / 'b').rename(pics / 'val' / 'c')
    with pytest.raises(StudyError, match='pics/train: the class "c" has no image'):
        check_images(rows('pixels'))


def test_a_broken_training_image_is_left_out_and_named(pics):
    (pics / 'train' / 'a' / '00.png').write_bytes(b'broken')
    used, left_out = check_images(rows('pixels'))
    assert used == 'pics: 32 of 60 training images used, 2 classes, 20 validation images'
    assert left_out.startswith('pics: 1 of 32 training images cannot be decoded') and 'a/00.png' in left_out


def test_only_the_images_that_are_used_are_decoded(pics):
    "The selection is that of `load_dataset`."
    (pics / 'train' / 'b' / '59.png').write_bytes(b'broken')
    found = check_split('pics', 'train', 32, per_class=16)
    assert (found.images, found.available, found.unreadable) == (32, 60, [])
    assert found.usable == len(load_dataset('pics', 'train', 32, 16))


def test_images_without_classes_need_no_validation_split(pics):
    for file in [*pics.glob('*/*/*')]:
        file.rename(pics / file.name)
    for folder in [*pics.glob('*/*/'), *pics.glob('*/')]:
        folder.rmdir()
    assert check_images(rows('beit')) == ['pics: 80 of 80 training images used']


def test_a_large_split_is_sampled(pics, monkeypatch):
    monkeypatch.setattr(image_check, 'DECODED_FULLY', 30)
    monkeypatch.setattr(image_check, 'SAMPLE', 10)
    lines = check_images(rows('pixels'))
    assert lines[1] == 'pics: a sample of 8 training images was decoded'
    assert len(lines) == 2, 'the 20 validation images are all decoded'


def test_cached_archives_and_scenes_are_not_decoded(pics, monkeypatch):
    with zipfile.ZipFile(pics.with_suffix('.zip'), 'w') as archive:
        for file in pics.rglob('*.png'):
            archive.write(file, file.relative_to(pics))
    pics.rename(pics.with_name('.pics'))
    (one,) = rows('pixels')
    data = one.config.data
    assert check_split('pics', 'val', data.size).decoded == 20
    load_dataset('pics', 'train', data.size, data.per_class)
    load_dataset('pics', 'val', data.size, strict=True)
    monkeypatch.setattr(image_check, 'image_sizes', lambda _: pytest.fail('an image was decoded'))
    assert check_images([one]) == ['pics: 32 of 32 training images used, 2 classes, 20 validation images']
    assert check_images([experiment('semanticmim-t1/pixels', 'smoke')]) == []

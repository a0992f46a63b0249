"Settings: the file, environment variables that override it, dataset paths, device and precision."

import os
from pathlib import Path

import pytest
import torch

from mimstudy.core.errors import StudyError
from mimstudy.core.settings import (
    dataset_path,
    has_native_bf16,
    resolve_device,
    resolve_precision,
    settings,
    settings_file,
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    "write(text) -> a settings file with this text; no variable of the environment overrides it."
    for name in list(os.environ):
        if name.startswith('MIMSTUDY_'):
            monkeypatch.delenv(name)

    def write_text(text):
        file = tmp_path / 'settings.ini'
        file.write_text(text, 'utf-8')
        return file

    return write_text


def test_a_missing_file_means_defaults(write, tmp_path):
    values = settings(tmp_path / 'settings.ini')
    assert (values.device, values.precision, values.workers) == ('auto', 'auto', 2)
    assert values.results == (tmp_path / 'results').resolve()


def test_paths_are_relative_to_the_file(write, tmp_path):
    values = settings(write('[study]\nresults = there\nfigures = /elsewhere\n'))
    assert values.results == (tmp_path / 'there').resolve()
    assert values.figures == Path('/elsewhere')


def test_the_environment_overrides_the_file(write, monkeypatch):
    file = write('[study]\nworkers = 1\ndevice = cuda\n')
    monkeypatch.setenv('MIMSTUDY_WORKERS', '5')
    monkeypatch.setenv('MIMSTUDY_DEVICE', 'cpu')
    values = settings(file)
    assert (values.workers, values.device) == (5, 'cpu')


@pytest.mark.parametrize(
    'text,named',
    [
        ('[study]\nworkers = many\n', 'workers'),
        ('[study]\nworkers = -1\n', 'workers'),
        ('[study]\ndevice = gpu\n', 'device'),
        ('[study]\nprecision = fp8\n', 'precision'),
        ('[study]\nresult = there\n', 'results'),
        ('[studies]\nworkers = 1\n', 'study'),
        ('workers = 1\n', 'settings.ini'),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(write, text, named):
    with pytest.raises(StudyError) as error:
        settings(write(text))
    assert named in str(error.value) and '\n' not in str(error.value)


def test_a_wrong_variable_is_named(write, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_WORKERS', 'many')
    with pytest.raises(StudyError, match='MIMSTUDY_WORKERS'):
        settings(write(''))


def test_settings_cannot_be_changed(write):
    with pytest.raises(AttributeError):
        settings(write('')).workers = 3


def test_a_named_file_that_does_not_exist_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv('MIMSTUDY_SETTINGS', str(tmp_path / 'none.ini'))
    with pytest.raises(StudyError, match='MIMSTUDY_SETTINGS'):
        settings_file()


# -- datasets --------------------------------------------------------------------------------


def test_a_dataset_is_found_by_its_key_its_variable_or_in_the_data_folder(write, tmp_path, monkeypatch):
    file = write('[data]\nmy-set = images\n')
    (tmp_path / 'images').mkdir()
    (tmp_path / 'data' / 'other').mkdir(parents=True)
    (tmp_path / 'variable').mkdir()
    assert dataset_path('my-set', settings(file)) == (tmp_path / 'images').resolve()
    assert dataset_path('other', settings(file)) == (tmp_path / 'data' / 'other').resolve()
    monkeypatch.setenv('MIMSTUDY_DATA_MY_SET', str(tmp_path / 'variable'))
    assert dataset_path('my-set', settings(file)) == (tmp_path / 'variable').resolve()


def test_an_archive_inside_a_dataset_folder_is_preferred(write, tmp_path):
    folder = tmp_path / 'data' / 'other'
    folder.mkdir(parents=True)
    archive = folder / 'other.tar.xz'
    archive.write_bytes(b'')
    assert dataset_path('other', settings(write(''))) == archive.resolve()


def test_a_missing_dataset_names_the_key_and_the_variable(write):
    with pytest.raises(StudyError) as error:
        dataset_path('my-set', settings(write('')))
    assert 'my-set' in str(error.value) and 'MIMSTUDY_DATA_MY_SET' in str(error.value)


# -- device and precision --------------------------------------------------------------------------------


def test_a_device_that_is_not_available_is_an_error():
    assert resolve_device('cpu') == torch.device('cpu')
    for name, available in (('cuda', torch.cuda.is_available()), ('mps', torch.backends.mps.is_available())):
        if not available:
            with pytest.raises(StudyError, match=name):
                resolve_device(name)
    with pytest.raises(StudyError, match='cuda'):
        resolve_device('cuda:x')


def test_precision_auto():
    assert resolve_precision('auto', torch.device('cuda')) == 'bf16'
    assert resolve_precision('auto', torch.device('mps')) == 'no'
    assert resolve_precision('auto', torch.device('cpu')) == ('bf16' if has_native_bf16() else 'no')
    assert resolve_precision('fp16', torch.device('cpu')) == 'fp16'

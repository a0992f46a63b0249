"Records of the first schema: they are read with the identifiers that their experiments have today."

import json
from pathlib import Path
from shutil import copytree

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.papers.experiments import experiment
from mimstudy.study.old_records import upgrade_record
from mimstudy.study.records import FIELDS, RecordStore

OLD_RECORDS = Path(__file__).parent / 'old_records'  # measured before the second schema
RENAMED_FIELDS = dict(data='dataset', pictures_seen='images_seen', recipe='config')


def read_old():
    "The records as they were written."
    return [json.loads(file.read_text('utf-8')) for file in sorted(OLD_RECORDS.glob('*.json'))]


def experiment_of(record):
    "The experiment that a record of today belongs to."
    name = f'{record["table"]}/{record["row"]}'
    return experiment(name, record['scale'], record['dataset'], record['seed'], (record['protocol'],))


@pytest.fixture
def store(tmp_path):
    "A store that holds only records of the first schema."
    copytree(OLD_RECORDS, tmp_path / 'scores')
    return RecordStore(tmp_path)


def test_the_files_are_of_the_first_schema():
    old = read_old()
    assert len(old) == 3
    assert all('schema' not in record for record in old)
    assert {(record['features'], record['protocol']) for record in old} == {
        ('trained', 'linear'),
        ('trained', 'finetune'),
        ('random', 'linear'),
    }


def test_old_records_have_the_identifiers_of_today(store, capsys):
    found = store.find()
    assert not capsys.readouterr().err, 'a record was left out'
    assert len(found) == 3
    for record in found:
        today = experiment_of(record)
        assert set(record) == set(FIELDS)
        assert record['id'] == today.record_id(record['protocol'])
        assert record['experiment'] == today.id
        assert record['train'] == today.train_id
        assert record['config'] == today.values
        assert store.done(today)


def test_the_settings_of_a_fine_tuning_are_those_of_today(store):
    (record,) = store.find(protocol='finetune')
    settings = dict(record['evaluation'])
    assert settings.pop('n_train') > 0
    assert settings == experiment_of(record).downstream_config('finetune').to_json()


def test_what_was_measured_is_unchanged():
    for old in read_old():
        new = upgrade_record(old)
        computed = {'schema', 'id', 'experiment', 'train', 'config', 'evaluation'}
        for name, value in old.items():
            name = RENAMED_FIELDS.get(name, name)
            if name not in computed:
                assert new[name] == value, name


def test_a_new_record_of_the_same_experiment_replaces_the_old_one(store):
    (old,) = store.find(features='random')
    store.add(old | dict(seconds=3.0))
    (new,) = store.find(features='random')
    assert new['seconds'] == 3.0


@pytest.mark.parametrize('field', ['recipe', 'protocol', 'seed'])
def test_an_incomplete_old_record_is_named_and_left_out(store, capsys, field):
    file = next((store.root / 'scores').glob('*.json'))
    values = json.loads(file.read_text('utf-8'))
    del values[field]
    file.write_text(json.dumps(values))
    with pytest.raises(StudyError, match='lacks'):
        upgrade_record(values)
    assert len(store.find()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'scores/{file.name} is left out: ')

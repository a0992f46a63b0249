"The plan of a run: which names are known, which steps there are, and how far each is."

import builtins

import pytest
from invented_records import invented_record

from mimstudy.core.errors import StudyError
from mimstudy.papers.experiments import experiment
from mimstudy.papers.tables import TABLES
from mimstudy.papers.tables import SEMANTICMIM_T1
from mimstudy.study.plan import (
    check_datasets,
    check_parameters,
    named_experiment,
    plan,
    status,
    training_progress,
)
from mimstudy.study.records import RecordStore

PARAMETERS = dict(experiment='semanticmim-t1/beit', scale='smoke', dataset='', seed=0, out='')


# -- parameters of a run notebook ---------------------------------------------------------------


def test_parameters_name_an_experiment():
    expected = experiment('semanticmim-t1/beit', 'smoke')
    assert check_parameters(PARAMETERS) == expected
    assert check_parameters(PARAMETERS | dict(protocols='')) == expected
    on_scenes = check_parameters(PARAMETERS | dict(dataset='scenes', seed=3))
    assert on_scenes == experiment('semanticmim-t1/beit', 'smoke', 'scenes', 3)
    probed = check_parameters(PARAMETERS | dict(protocols='linear voc'))
    assert probed.protocols == ('linear', 'voc')


def test_other_globals_of_a_notebook_are_no_parameters():
    others = dict(builtins=builtins, open=open, _x=3, In=['1 + 1'], Out={})
    assert check_parameters(PARAMETERS | others) == experiment('semanticmim-t1/beit', 'smoke')


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(seed='0'), '"seed" must be a whole number'),
        (dict(seed=0.0), '"seed" must be a whole number'),
        (dict(seed=True), '"seed" must be a whole number'),
        (dict(seed=-1), 'must lie between 0'),
        (dict(seed=None), '"seed" must be a whole number'),
        (dict(experiment=['a']), '"experiment" must be a string'),
        (dict(out=0), '"out" must be a string'),
        (dict(sead=0), 'did you mean seed'),
        (dict(lr=1e-3), 'unknown parameter "lr"'),
        (dict(data='scenes'), 'did you mean dataset'),
        (dict(experiment='semanticmim-t1/biet'), 'did you mean beit'),
        (dict(experiment='semanticmim/beit'), 'did you mean semanticmim-t1'),
        (dict(scale='smok'), 'did you mean smoke'),
        (dict(dataset='cifar-10-jpeg'), 'did you mean cifar10-jpeg'),
        (dict(protocols='finetoon'), 'did you mean finetune'),
    ],
)
def test_wrong_parameters_are_one_line(wrong, message):
    with pytest.raises(StudyError) as error:
        check_parameters(PARAMETERS | wrong)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_pixels_cannot_be_trained_further():
    with pytest.raises(StudyError, match='no encoder that finetune could train further'):
        check_parameters(PARAMETERS | dict(experiment='semanticmim-t1/pixels', protocols='finetune'))


# -- datasets -----------------------------------------------------------------------------------


def test_a_dataset_of_a_variable_has_a_known_name(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match='unknown dataset "photos"'):
        named_experiment('semanticmim-t1/beit', 'smoke', 'photos')
    monkeypatch.setenv('MIMSTUDY_DATA_PHOTOS', str(tmp_path))
    assert named_experiment('semanticmim-t1/beit', 'smoke', 'photos').dataset == 'photos'


def test_a_missing_dataset_is_named_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_PHOTOS', str(tmp_path))
    check_datasets(['scenes', 'photos'])
    monkeypatch.setenv('MIMSTUDY_DATA_PHOTOS', str(tmp_path / 'nowhere'))
    with pytest.raises(StudyError, match='the dataset "photos" is not at'):
        check_datasets(['scenes', 'photos'])


# -- steps --------------------------------------------------------------------------------------


def test_a_plan_has_all_rows_seed_after_seed(tmp_path):
    steps = plan('conmim-t8', scale='smoke', seeds=(0, 1), store=RecordStore(tmp_path))
    rows = [row.name for row in TABLES['conmim-t8'].rows]
    assert [step.experiment.row for step in steps] == rows + rows
    assert [step.experiment.seed for step in steps] == [0] * 5 + [1] * 5
    assert {step.status for step in steps} == {'missing'}
    assert steps[0].title == f'{rows[0]} seed 0'
    assert list(tmp_path.iterdir()) == [], 'a plan writes nothing'


def test_a_name_given_twice_is_one_step(tmp_path):
    store = RecordStore(tmp_path)
    assert len(plan('conmim-t8', ['tau=0.1', 'tau=0.1'], 'smoke', seeds=(0, 0), store=store)) == 1


def test_rows_that_cannot_be_trained_further_are_left_out(tmp_path):
    steps = plan('semanticmim-t1', scale='smoke', store=RecordStore(tmp_path), protocols=('finetune',))
    assert len(steps) == len(SEMANTICMIM_T1.rows) - 1
    assert 'pixels' not in {step.experiment.row for step in steps}


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(table='conmim-t99'), 'unknown table "conmim-t99"'),
        (dict(rows=['tau=1']), 'unknown row of conmim-t8 "tau=1"'),
        (dict(scale='smok'), 'did you mean smoke'),
        (dict(dataset='nothing'), 'unknown dataset "nothing"'),
        (dict(protocols=('finetoon',)), 'unknown protocol of conmim-t8 "finetoon"'),
    ],
)
def test_wrong_names_are_errors(tmp_path, wrong, message):
    with pytest.raises(StudyError, match=message):
        plan(**dict(table='conmim-t8', scale='smoke') | wrong, store=RecordStore(tmp_path))


# -- how far a step is --------------------------------------------------------------------------


def test_status_follows_the_folder_and_the_records(tmp_path):
    store = RecordStore(tmp_path)
    one = experiment('semanticmim-t1/beit', 'smoke')
    folder = store.run_folder(one.train_id)
    assert status(one, store) == 'missing'
    folder.mkdir(parents=True)
    (folder / 'checkpoint.pt').touch()
    assert status(one, store) == 'resumable'
    (folder / 'done.json').write_text('{}')
    assert status(one, store) == 'trained'
    store.add(invented_record(one.name, scale='smoke', linear_1_patch=1.0))
    assert status(one, store) == 'done'
    assert [step.status for step in plan('semanticmim-t1', ['beit'], 'smoke', store=store)] == ['done']


def test_progress_is_read_from_the_last_row_of_the_log(tmp_path):
    store = RecordStore(tmp_path)
    one = experiment('semanticmim-t1/beit', 'smoke')
    folder = store.run_folder(one.train_id)
    folder.mkdir(parents=True)
    (folder / 'log.csv').write_text('step,epoch,loss\n4,0.5,6.1\n8,1.0,5.54321\n')
    assert training_progress(one, store) == '50 %, epoch 1.0 of 2, loss 5.543'


@pytest.mark.parametrize(
    'log, expected',
    [
        (None, 'its log is missing'),
        ('', 'its log is missing'),
        ('step,epoch,loss\n', 'its log is missing'),
        ('not,a\nlog', 'its log is missing'),
        ('step,epoch,loss\n3,0.04,5.54\n4,0.0', '2 %, epoch 0.0 of 2, loss 5.54'),
    ],
)
def test_a_damaged_log_is_no_error(tmp_path, log, expected):
    "A process that was killed may leave half a line; then the whole lines before it are used."
    store = RecordStore(tmp_path)
    one = experiment('semanticmim-t1/beit', 'smoke')
    folder = store.run_folder(one.train_id)
    folder.mkdir(parents=True)
    (folder / 'checkpoint.pt').touch()
    if log is not None:
        (folder / 'log.csv').write_text(log)
    assert status(one, store) == 'resumable'
    assert training_progress(one, store) == expected


def test_rows_that_git_tracks_are_published_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_RESULTS', str(tmp_path / 'local'))
    monkeypatch.setenv('MIMSTUDY_PUBLISHED', str(tmp_path / 'tracked'))
    RecordStore(tmp_path / 'tracked').add(invented_record('semanticmim-t1/pixels', scale='smoke'))
    statuses = {step.experiment.row: step.status for step in plan('semanticmim-t1', scale='smoke')}
    assert statuses.pop('pixels') == 'published' and set(statuses.values()) == {'missing'}
    (step,) = plan('semanticmim-t1', ['pixels'], 'smoke', store=RecordStore(tmp_path / 'local'))
    assert step.status == 'missing', 'a folder that is named holds what it holds'


@pytest.mark.parametrize('seed', [-1, 2**32, 12345678901234567890])
def test_a_seed_that_generators_do_not_take_is_one_line(seed):
    with pytest.raises(StudyError, match='a seed must lie between 0 and 4294967295'):
        plan('semanticmim-t1', ['pixels'], 'smoke', seeds=[seed])

"What a batch that runs alone needs: shared pre-trainings, kept failures, a time budget, several tables."

from threading import Lock
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.cli.running import chosen_tables
from mimstudy.core.errors import StudyError
from mimstudy.papers.tables import TABLES
from mimstudy.study.plan import FAILURE_FILE, failure, plan, row_folder, status
from mimstudy.study.records import RecordStore
from mimstudy.study.scheduler import _take, mark_failure, run


def two_rows_of_one_training(store):
    return plan('semanticmim-t1', ['beit'], 'smoke', store=store) + plan(
        'all-methods', ['beit'], 'smoke', store=store
    )


def test_a_row_waits_while_another_worker_runs_its_pretraining(tmp_path):
    first, second = (step.experiment for step in two_rows_of_one_training(RecordStore(tmp_path)))
    assert first.train_id == second.train_id
    shared = SimpleNamespace(queue=[first, second], training=set(), lock=Lock())
    assert _take(shared) == first
    assert _take(shared) is None and shared.queue == [second]
    shared.training.discard(first.train_id)
    assert _take(shared) == second and not shared.queue


@pytest.mark.slow
def test_a_shared_pretraining_runs_once(tmp_path):
    store = RecordStore(tmp_path)
    steps = two_rows_of_one_training(store)
    assert run(steps, store, jobs=2) == []
    assert all(status(step.experiment, store) == 'done' for step in steps)
    trained = [one for one in store.find() if one['features'] == 'trained']
    assert len({one['images_per_second'] for one in trained}) == 1  # of one training


def test_a_failure_is_kept_until_the_row_reaches_its_end(tmp_path):
    store = RecordStore(tmp_path)
    (step,) = plan('semanticmim-t1', ['beit'], 'smoke', store=store)
    folder = row_folder(step.experiment, store)
    folder.mkdir(parents=True)
    mark_failure(folder, 'the disk is full')
    assert status(step.experiment, store) == 'failed'
    assert failure(step.experiment, store) == 'the disk is full'
    mark_failure(folder, None)
    assert status(step.experiment, store) == 'missing'
    assert not (folder / FAILURE_FILE).exists()


def test_status_shows_why_a_row_failed_and_where_its_notebook_is(tmp_path):
    store = RecordStore(tmp_path)
    (step,) = plan('semanticmim-t1', ['beit'], 'smoke', store=store)
    folder = row_folder(step.experiment, store)
    folder.mkdir(parents=True)
    (folder / 'row.ipynb').write_text('{}')
    mark_failure(folder, 'the disk is full')
    shown = CliRunner().invoke(
        app, ['status', 'semanticmim-t1', '--scale', 'smoke', '--results', str(tmp_path)]
    )
    (line,) = [line for line in shown.output.splitlines() if 'failed:' in line]
    assert 'beit seed 0' in line and 'the disk is full' in line and 'row.ipynb' in line


@pytest.mark.slow
def test_a_run_stops_when_its_time_is_over(tmp_path):
    words = 'run semanticmim-t1 --rows beit --scale smoke --hours 0.001 --results'
    done = CliRunner().invoke(app, [*words.split(), str(tmp_path)])
    assert done.exit_code == 1
    assert '0.001 hours are over' in done.output
    assert 'the same command continues' in done.output
    assert not RecordStore(tmp_path).find()


def test_all_tables_are_planned_and_the_time_is_estimated(tmp_path):
    done = CliRunner().invoke(app, f'run all --scale smoke --dry-run --results {tmp_path}'.split())
    assert done.exit_code == 0
    measured = sum(len(table.measured) for table in TABLES.values())
    assert done.stdout.count('missing    ') == measured
    assert f'{measured} rows have no similar record' in done.stderr


def test_several_tables_are_planned_each_once(tmp_path):
    words = f'run conmim-t8 conmim-t9 conmim-t8 --scale smoke --dry-run --results {tmp_path}'
    done = CliRunner().invoke(app, words.split())
    assert done.stdout.count('conmim-t8/') == len(TABLES['conmim-t8'].measured)
    assert done.stdout.count('conmim-t9/') == len(TABLES['conmim-t9'].measured)


def test_an_unknown_table_or_executor_is_one_line(tmp_path):
    with pytest.raises(StudyError, match='did you mean'):
        chosen_tables(['semanticmim-t1', 'conmim-t88'])
    words = f'run conmim-t8 --executor slrum --results {tmp_path}'
    assert 'did you mean slurm' in CliRunner().invoke(app, words.split()).output

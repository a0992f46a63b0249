import os

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.study.cluster import RowJob, submit
from mimstudy.study.plan import plan
from mimstudy.study.records import RecordStore

submitit = pytest.importorskip('submitit')


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    "A folder on the PATH with an sbatch that keeps the scripts it gets, and gives them numbers."
    commands = tmp_path / 'commands'
    commands.mkdir()
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    text = (
        '#!/bin/sh\n'
        f'number=$(($(ls {scripts} | wc -l) + 100))\n'
        f'for file in "$@"; do :; done\n'
        f'cp "$file" {scripts}/$number\n'
        'echo "Submitted batch job $number"\n'
    )
    for name in ('sbatch', 'srun'):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{commands}{os.pathsep}{os.environ["PATH"]}')
    return scripts


def settings_with(tmp_path, monkeypatch, lines):
    file = tmp_path / 'settings.ini'
    file.write_text(f'[slurm]\n{lines}\n')
    monkeypatch.setenv('MIMSTUDY_SETTINGS', str(file))


def test_each_row_is_a_job_with_the_time_limit_and_what_the_settings_ask_for(sbatch, tmp_path, monkeypatch):
    settings_with(
        tmp_path, monkeypatch, 'slurm_partition = gpu\ngpus_per_node = 1\ncpus_per_task = 8\nmem_gb = 32'
    )
    store = RecordStore(tmp_path / 'results')
    steps = plan('semanticmim-t1', ['beit', 'maskfeat'], 'smoke', store=store)
    submitted = submit(steps, store, hours=1.5)
    assert [one.title for one in submitted] == ['beit seed 0', 'maskfeat seed 0']
    text = (sbatch / submitted[0].job.job_id).read_text()
    for option in ('--time=90', '--partition=gpu', '--gpus-per-node=1', '--cpus-per-task=8', '--mem=32GB'):
        assert option in text
    assert '--signal=USR2@90' in text  # announced early enough to submit the job again
    assert '--dependency' not in text


def test_a_row_waits_for_the_job_that_trains_its_encoder(sbatch, tmp_path):
    store = RecordStore(tmp_path)
    steps = plan('semanticmim-t1', ['beit'], 'smoke', store=store)
    steps += plan('all-methods', ['beit'], 'smoke', store=store)
    first, second = submit(steps, store)
    assert f'--dependency=afterany:{first.job.job_id}' in (sbatch / second.job.job_id).read_text()


def test_rows_that_are_done_are_not_submitted(sbatch, tmp_path):
    store = RecordStore(tmp_path)
    (step,) = plan('semanticmim-t1', ['beit'], 'smoke', store=store)
    assert submit([step._replace(status='done')], store) == []


def test_an_unknown_parameter_of_the_cluster_is_named(sbatch, tmp_path, monkeypatch):
    settings_with(tmp_path, monkeypatch, 'gpus = 1')
    store = RecordStore(tmp_path)
    with pytest.raises(StudyError, match=r'settings.ini \[slurm\].*gpus'):
        submit(plan('semanticmim-t1', ['beit'], 'smoke', store=store), store)


def test_a_job_is_submitted_again_as_it_was(tmp_path):
    store = RecordStore(tmp_path)
    (step,) = plan('semanticmim-t1', ['beit'], 'smoke', store=store)
    job = RowJob(step.experiment, str(tmp_path))
    assert job.checkpoint().function is job


@pytest.mark.slow
def test_a_job_runs_its_row_to_the_record(tmp_path):
    store = RecordStore(tmp_path)
    steps = plan('semanticmim-t1', ['random'], 'smoke', store=store)
    (one,) = submit(steps, store, hours=0.2, cluster='local')
    assert one.job.result() == 'random seed 0'
    assert store.done(steps[0].experiment)

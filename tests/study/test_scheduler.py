"The runner: parameters, plans, processes, one row from end to end, interrupts, and two runs in one folder."

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from PIL import Image

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.study import processes
from mimstudy.study import scheduler as runner
from mimstudy.study.row import measure, pretrain
from mimstudy.study.records import RecordStore
from mimstudy.study.scheduler import training_progress, status
from mimstudy.papers.tables import TABLES, experiment

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the children: many threads on busy cores are slow
ASKED = dict(experiment='semanticmim-t1/beit', scale='smoke', data='', seed=0, out='')
MIMSTUDY = [sys.executable, '-c', 'from mimstudy.cli.commands import app; app()']


def notebook(folder, *sources):
    "A notebook of these cells, the first tagged `parameters`, that names a kernel nobody has."
    cells = [
        dict(
            cell_type='code',
            id=f'cell{i}',
            metadata=dict(tags=['parameters'][: i == 0]),
            source=s,
            outputs=[],
            execution_count=None,
        )
        for i, s in enumerate(sources)
    ]
    (file := folder / 'page.ipynb').write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata=dict(kernelspec=dict(name='gone', display_name='gone')),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )
    return file


@pytest.fixture(scope='module')
def is_finished(tmp_path_factory):
    "A results folder in which two rows were carried out, two at a time."
    results = RecordStore(tmp_path_factory.mktemp('results'))
    steps = runner.plan('semanticmim-t1', ['pixels', 'beit+semanticmim'], 'smoke', results=results)
    return results, steps, runner.run(steps, results, jobs=2)


# -- parameters and plans -------------------------------------------------------------------------------------------


def test_parameters_name_an_experiment():
    assert runner.check_parameters(ASKED) == experiment('semanticmim-t1/beit', 'smoke')
    assert (
        runner.check_parameters(ASKED | dict(runner=runner, _x=3, open=open)).seed == 0
    )  # what else a notebook's globals hold


@pytest.mark.parametrize(
    'wrong, said',
    [
        (dict(seed='0'), '"seed" must be a whole number'),
        (dict(seed=0.0), '"seed" must be a whole number'),
        (dict(seed=True), '"seed" must be a whole number'),
        (dict(seed=-1), '0 or more'),
        (dict(seed=None), '"seed" must be a whole number'),
        (dict(experiment=['a']), '"experiment" must be a text'),
        (dict(out=0), '"out" must be a text'),
        (dict(sead=0), 'did you mean seed'),
        (dict(lr=1e-3), 'unknown parameter "lr"'),
        (dict(experiment='semanticmim-t1/biet'), 'did you mean beit'),
        (dict(experiment='semanticmim/beit'), 'did you mean semanticmim-t1'),
        (dict(scale='smok'), 'did you mean smoke'),
        (dict(data='cifar-10-jpeg'), 'did you mean cifar10-jpeg'),
    ],
)
def test_wrong_parameters_are_one_line(wrong, said):
    with pytest.raises(StudyError, match='.') as e:
        runner.check_parameters(ASKED | wrong)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_plan(tmp_path):
    steps = runner.plan('conmim-t8', scale='smoke', seeds=(0, 1), results=RecordStore(tmp_path))
    assert [s.experiment.seed for s in steps] == [0] * 5 + [1] * 5 and {s.status for s in steps} == {
        'missing'
    }
    assert [s.experiment.row for s in steps[:5]] == [r.name for r in TABLES['conmim-t8'].rows]
    assert len(runner.plan('conmim-t8', ['tau=0.1', 'tau=0.1'], 'smoke', results=RecordStore(tmp_path))) == 1
    for wrong in (('conmim-t99',), ('conmim-t8', ['tau=1']), ('conmim-t8', [], 'smoke', 'nothing')):
        with pytest.raises(StudyError):
            runner.plan(*wrong, results=RecordStore(tmp_path))


# -- processes ------------------------------------------------------------------------------------------------------


def test_parameters_survive_and_the_kernel_is_ours(tmp_path, monkeypatch):
    (bad := tmp_path / 'user' / 'kernels' / 'python3').mkdir(parents=True)
    (bad / 'kernel.json').write_text(
        json.dumps(dict(argv=['/bin/false'], display_name='another environment', language='python'))
    )
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'user'))
    value = 'a=b {braces} "quotes" \'and\' τ=0.1 # yes'
    page, heard = (
        notebook(
            tmp_path, 'text, number = "", 0', 'import sys', 'print(repr(text), number + 1, sys.executable)'
        ),
        [],
    )
    env = processes.environment(tmp_path / 'kernel')
    assert (
        processes.execute(page, dict(text=value, number=41), tmp_path / 'out {x}', env, heard.append) is None
    )
    assert heard == [f'{value!r} 42 {sys.executable}'] and (tmp_path / 'out {x}' / 'page.ipynb').is_file()
    assert (tmp_path / 'out {x}' / 'page.log').read_text().splitlines()[0] == heard[
        0
    ]  # the kernel's own stderr may follow


def test_a_dead_kernel_is_one_line(tmp_path):
    page = notebook(tmp_path, 'x = 0', 'import os; os._exit(9)')
    why = processes.execute(
        page, {}, tmp_path / 'out', processes.environment(tmp_path / 'kernel'), lambda line: None
    )
    assert why.startswith('its kernel died') and '\n' not in why


def test_a_wrong_type_fails_with_one_line(tmp_path):
    why = processes.execute(
        processes.run_notebook('row'),
        ASKED | dict(seed='zero'),
        tmp_path / 'out',
        processes.environment(tmp_path / 'kernel'),
        lambda line: None,
    )
    assert why == 'the parameter "seed" must be a whole number, not \'zero\''


def test_display_counts_all_rows():
    display = runner.ProgressDisplay(2, page := io.StringIO())
    for name, line in (('a', 'step 1 · 20 %'), ('b', 'loss 7'), ('a', 'step 9 · 80 %'), ('a', 'done')):
        display.tell(name, line)
    assert display.far == {'a': 0.8, 'b': 0.0} and page.getvalue().count('\n') == 4

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with patch.dict(os.environ, MIMSTUDY_PROGRESS=''):
        display = runner.ProgressDisplay(2, page := Terminal())
    display.tell('a', 'step 9 · 86 %')
    assert '43 %' in page.getvalue() and 'step 9' in page.getvalue()
    display.close()


# -- one row from end to end ----------------------------------------------------------------------------------------


def test_a_row_leaves_record_page_and_encoder(finished):
    results, steps, failures = finished
    assert failures == []
    for e in (s.experiment for s in steps):
        assert results.done(e) and runner.status(e, results) == 'done'
        page = json.loads((results.root / 'runs' / e.id / 'row.ipynb').read_text())
        injected = [c for c in page['cells'] if 'injected-parameters' in c['metadata'].get('tags', ())]
        assert f'experiment = "{e.name}"' in ''.join(injected[0]['source'])
        (one,) = results.find(experiment=e.id)
        assert (
            one['recipe'] == e.values
            and one['n_val'] > 0
            and one['evaluation']['n_train'] == 264
            and one['seconds'] > 0
        )
    trained, pixels = (results.find(row=row)[0] for row in ('beit+semanticmim', 'pixels'))
    assert (
        trained['images_seen'] == 2 * 8 * 32
        and trained['images_per_second'] > 0
        and trained['peak_memory'] > 0
    )
    assert list(pixels['scores']) == ['linear/0/pixels'] and {
        'linear/1/prefix',
        'linear/2/patch',
        'linear/best/patch/block',
    } <= set(trained['scores'])
    assert results.encoder(trained['train']).P == 8


def test_what_is_done_is_not_done_again(finished):
    results, steps, _ = finished
    again = runner.plan('semanticmim-t1', ['pixels', 'beit+semanticmim'], 'smoke', results=results)
    before = {f: f.stat().st_mtime_ns for f in results.root.rglob('*') if f.is_file()}
    with patch.object(processes.ProcessGroup, 'follow', side_effect=AssertionError('a row was started')):
        assert (
            runner.run(again, results) == [] and runner.run(steps, results) == []
        )  # `steps` are as planned before the first run
    assert {
        f: f.stat().st_mtime_ns for f in results.root.rglob('*') if f.is_file() and f.name != 'row.lock'
    } == {f: t for f, t in before.items() if f.name != 'row.lock'}


def test_a_lost_record_needs_no_training(finished):
    results, steps, _ = finished
    e = steps[1].experiment
    (kept,) = (results.root / 'scores').glob(f'{e.id}-*')
    scores = json.loads(kept.read_text())['scores']
    done = (results.run_folder(e.train_id) / 'done.json').stat().st_mtime_ns
    kept.unlink()
    assert runner.run(runner.plan('semanticmim-t1', [e.row], 'smoke', results=results), results) == []
    assert (
        json.loads(kept.read_text())['scores'] == scores
        and (results.run_folder(e.train_id) / 'done.json').stat().st_mtime_ns == done
    )


# -- interrupts and company -----------------------------------------------------------------------------------------


def wait_for(what, seconds=180):
    "Poll until `what()` is true."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, 'waited too long'
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize('word', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_the_row_goes_on(tmp_path, word):
    env = os.environ | dict(MIMSTUDY_CHECKPOINT_SECONDS='0')
    asked = [
        *MIMSTUDY,
        'run',
        'semanticmim-t1',
        '--rows',
        'maskfeat',
        '--scale',
        'laptop',
        '--data',
        'scenes',
        '--results',
        str(tmp_path),
    ]
    reached = []
    for _ in range(2):
        before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('checkpoint.pt')}
        child = subprocess.Popen(
            asked,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        wait_for(
            lambda: [f for f in tmp_path.rglob('checkpoint.pt') if f.stat().st_mtime_ns != before.get(f)]
        )
        family = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(word)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 130 and 'the same command goes on from here' in said, said
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        (step,) = runner.plan(
            'semanticmim-t1', ['maskfeat'], 'laptop', 'scenes', results=RecordStore(tmp_path)
        )
        log = (
            (RecordStore(tmp_path).run_folder(step.experiment.train_id) / 'log.csv').read_text().splitlines()
        )
        assert step.status == 'resumable' and '%' in runner.far(step.experiment, RecordStore(tmp_path))
        steps = [line.split(',')[0] for line in log[1:]]
        assert steps == list(dict.fromkeys(steps))  # no step twice
        reached.append(float(steps[-1]))
    assert reached[1] > reached[0]


@pytest.mark.slow
def test_two_runs_share_one_folder(tmp_path):
    asked = [
        *MIMSTUDY,
        'run',
        'semanticmim-t1',
        '--rows',
        'pixels',
        'random',
        'maskfeat',
        '--scale',
        'smoke',
        '--results',
        str(tmp_path),
    ]
    both = [
        subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    said = [child.communicate(timeout=400)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert len(RecordStore(tmp_path).find()) == 3
    assert len(list(tmp_path.rglob('tb/events*'))) == 1, 'the row was trained twice'


def test_notebooks_that_are_not_there(tmp_path):
    with pytest.raises(StudyError, match='pip install -e'):
        processes.run_notebook('row', Path(tmp_path))


# -- broken images, and where a command is called from ------------------------------------------------------------


def image_folder(root, torn):
    "Nine classes of five training and two validation images; the bytes of the file `torn` are cut short."
    world = scenes(63, size=32, seed=5).images
    for i, image in enumerate(world):
        file = root / ('train' if i < 45 else 'val') / f'class_{i % 9}' / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        if file.name == torn:
            file.write_bytes(file.read_bytes()[:200])
    return root


def test_a_torn_training_image_is_skipped_to_the_end(tmp_path, monkeypatch, capsys):
    "TrainingResult without it, counted, and the probe is fitted on the images that are left: nothing computed is lost."
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(image_folder(tmp_path / 'pics', '16.jpg')))
    asked, results = experiment('semanticmim-t1/maskfeat', 'smoke', 'pics'), RecordStore(tmp_path / 'out')
    trained = pretrain(asked, results)
    assert status(asked, results) == 'trained'
    (record,) = measure(asked, trained, results)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert len(warned) == 2 and all(
        '1 of 45 images cannot be decoded' in line and '16.jpg' in line for line in warned
    )
    assert json.loads((results.run_folder(asked.train_id) / 'done.json').read_text())['broken'] == 1
    assert results.done(asked) and record['n_val'] == 18 and record['evaluation']['n_train'] == 9 * 5 - 1


def test_a_torn_validation_image_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(image_folder(tmp_path / 'pics', '50.jpg')))
    asked, results = experiment('semanticmim-t1/maskfeat', 'smoke', 'pics'), RecordStore(tmp_path / 'out')
    with pytest.raises(StudyError, match='50.jpg cannot be decoded'):
        pretrain(asked, results)
    assert not results.run_folder(asked.train_id).exists()


def test_a_warning_stays_in_sight(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(image_folder(tmp_path / 'pics', '16.jpg')))
    done = subprocess.run(
        [
            *MIMSTUDY,
            'run',
            'semanticmim-t1',
            '--rows',
            'pixels',
            '--scale',
            'smoke',
            '--data',
            'pics',
            '--results',
            tmp_path / 'out',
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and 'pixels seed 0: warning: 1 of 45 images cannot be decoded' in done.stderr
        and '16.jpg' in done.stderr
    )


@pytest.mark.parametrize(
    'log', [None, '', 'step,epoch,loss\n', 'step,epoch,loss\n3,0.04,5.54\n4,0.0', 'not,a\nlog']
)
def test_how_far_without_a_whole_log(tmp_path, log):
    "A log that a killed run left damaged costs the status its number, not the command."
    results, one = RecordStore(tmp_path), experiment('semanticmim-t1/beit', 'smoke')
    (folder := results.run_folder(one.train_id)).mkdir(parents=True)
    (folder / 'checkpoint.pt').touch()
    if log is not None:
        (folder / 'log.csv').write_text(log)
    assert status(one, results) == 'resumable'
    assert training_progress(one, results) == (
        '2 %, epoch 0.0 of 2, loss 5.54'
        if log and log.startswith('step,epoch,loss\n3')
        else 'its log is gone'
    )


def test_a_relative_results_folder_is_that_of_the_caller(tmp_path):
    done = subprocess.run(
        [*MIMSTUDY, 'run', 'semanticmim-t1', '--rows', 'pixels', '--scale', 'smoke', '--results', 'here'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'here' / 'scores').glob('*.json'))) == 1

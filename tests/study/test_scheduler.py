"Rows in processes of their own: notebooks, rows from end to end, interrupts, two commands in one folder."

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import psutil
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.engine.checkpoint import load_checkpoint
from mimstudy.papers.experiments import experiment
from mimstudy.study import processes, scheduler
from mimstudy.study.plan import plan, row_folder, status, training_progress
from mimstudy.study.processes import (
    ProcessGroup,
    child_environment,
    execute,
    failure_reason,
    papermill_command,
    run_notebook,
)
from mimstudy.study.records import RecordStore
from mimstudy.study.row import evaluate_row, pretrain
from mimstudy.study.scheduler import number_of_trainings, run

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for child processes: many threads on busy cores are slow
MIMSTUDY = [sys.executable, '-c', 'from mimstudy.cli.commands import app; app()']


def command(*words, results):
    "The arguments of `mimstudy run semanticmim-t1`."
    return [*MIMSTUDY, 'run', 'semanticmim-t1', *words, '--results', str(results)]


# -- notebooks in processes ---------------------------------------------------------------------


def write_notebook(folder, *sources):
    "A notebook of these cells, the first tagged `parameters`, that names a kernel which does not exist."
    cells = []
    for i, source in enumerate(sources):
        tags = ['parameters'] if i == 0 else []
        cell = dict(cell_type='code', id=f'cell{i}', metadata=dict(tags=tags), source=source)
        cells.append(cell | dict(outputs=[], execution_count=None))
    kernel = dict(name='gone', display_name='gone')
    notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    file = folder / 'page.ipynb'
    file.write_text(json.dumps(notebook))
    return file


@pytest.mark.parametrize('text', ['🐟 τ', 'yes', '1e3', '007', '', ' ', 'a: b', '\x7f\t', 'x' * 300])
def test_papermill_reads_parameters_as_they_were_given(text, tmp_path):
    parameters = dict(text=text, number=2**32 - 1)
    words = papermill_command(tmp_path / 'a.ipynb', tmp_path / 'b.ipynb', parameters)
    assert yaml.safe_load(words[words.index('-y') + 1]) == parameters


def test_parameters_arrive_unchanged_and_the_kernel_is_this_interpreter(tmp_path, monkeypatch):
    kernel = tmp_path / 'user' / 'kernels' / 'python3'
    kernel.mkdir(parents=True)
    another = dict(argv=['/bin/false'], display_name='another environment', language='python')
    (kernel / 'kernel.json').write_text(json.dumps(another))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'user'))

    value = 'a=b {braces} "quotes" \'and\' τ=0.1 # yes 🐟'
    sources = ('text = ""\nnumber = 0', 'import sys', 'print(repr(text), number + 1, sys.executable)')
    notebook = write_notebook(tmp_path, *sources)
    env = child_environment(tmp_path / 'kernel')
    out = tmp_path / 'out {x}'
    lines = []
    assert execute(notebook, dict(text=value, number=41), out, env, lines.append) is None
    assert lines == [f'{value!r} 42 {sys.executable}']
    assert (out / 'page.ipynb').is_file()
    assert (out / 'page.log').read_text().splitlines()[0] == lines[0]


def test_a_killed_kernel_is_one_line_with_the_cause_and_what_to_do(tmp_path):
    notebook = write_notebook(tmp_path, 'x = 0', 'import os\nos.kill(os.getpid(), 9)')
    reason = execute(notebook, {}, tmp_path / 'out', child_environment(tmp_path / 'kernel'))
    assert reason.startswith('its kernel died; most often the system ends it (signal 9) for lack of memory')
    assert '--jobs 1, a smaller scale' in reason
    assert '\n' not in reason


def write_failure(folder, name, message):
    "An executed notebook with this error, and its log as papermill leaves it."
    error = dict(output_type='error', ename=name, evalue=message, traceback=[])
    (folder / 'page.ipynb').write_text(json.dumps(dict(cells=[dict(outputs=[error])])))
    log = folder / 'page.log'
    log.write_text(f'{"-" * 75}\nException encountered at "In [3]":\n{"-" * 75}\n{name}: {message}\n\n')
    return folder / 'page.ipynb', log


@pytest.mark.parametrize(
    'name, message, advice',
    [
        ('MemoryError', '', '--jobs 1'),
        ('OutOfMemoryError', 'CUDA out of memory. Tried to allocate 2.00 GiB', '--jobs 1'),
        ('RuntimeError', "DefaultCPUAllocator: can't allocate memory: you tried", '--jobs 1'),
        ('RuntimeError', 'DataLoader worker (pid 7) is killed by signal: Killed. ', '--jobs 1'),
        ('OSError', '[Errno 28] No space left on device', 'free some space on the disk of'),
        ('ValueError', 'torn', None),
    ],
)
@pytest.mark.parametrize('saved', [True, False])
def test_the_line_of_a_failure_has_its_cause_and_what_to_do(tmp_path, name, message, advice, saved):
    "Whether the executed notebook could be saved or only the log was left."
    notebook, log = write_failure(tmp_path, name, message)
    if not saved:
        notebook.unlink()
    reason = failure_reason(notebook, log)
    assert reason.startswith(name) and message.strip() in reason
    assert '\n' not in reason and 'Exception encountered' not in reason
    assert advice in reason if advice else '; ' not in reason


def test_a_full_disk_is_named_where_nothing_could_be_written(tmp_path, monkeypatch):
    log = tmp_path / 'page.log'
    log.touch()
    assert failure_reason(tmp_path / 'page.ipynb', log).startswith('it ended without any output (see ')
    assert 'ended by SIGKILL' in failure_reason(tmp_path / 'page.ipynb', log, -9)
    monkeypatch.setattr(processes, 'full_disks', lambda folders: [str(tmp_path)])
    reason = failure_reason(tmp_path / 'page.ipynb', log)
    assert reason == f'the disk of {tmp_path} is full; free some space and run the same again'


@pytest.fixture
def small_disk(tmp_path):
    "small_disk(kilobytes) -> a folder on a disk of this size; a skip where none can be made."
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = []

    def make(kilobytes):
        options = ['-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(folder)]
        if subprocess.run(['mount', *options], capture_output=True).returncode:
            pytest.skip('a small disk needs the right to mount a tmpfs')
        mounted.append(folder)
        return folder

    yield make
    for one in mounted:
        subprocess.run(['umount', '-l', str(one)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize('kilobytes', [64, 300])
def test_a_disk_that_fills_is_one_line(small_disk, kilobytes):
    "Before the executed notebook is written, or while it is; what is printed fills it up."
    root = small_disk(kilobytes)
    notebook = write_notebook(root, 'x = 0', 'for _ in range(9): print("x" * 50_000, flush=True)')
    try:
        reason = execute(notebook, {}, root / 'out', child_environment(root / 'kernel'), lambda line: None)
    except StudyError as e:
        reason = str(e)
    assert '\n' not in reason and 'free some space' in reason and str(root) in reason


def test_a_wrong_type_fails_with_one_line(tmp_path):
    parameters = dict(experiment='semanticmim-t1/beit', scale='smoke', dataset='', seed='zero', out='')
    env = child_environment(tmp_path / 'kernel')
    reason = execute(run_notebook('row'), parameters, tmp_path / 'out', env)
    assert reason == 'the parameter "seed" must be a whole number, not \'zero\''


def test_a_stopped_group_starts_nothing(tmp_path):
    group = ProcessGroup()
    group.stop()
    code = group.run([sys.executable, '-c', 'print(1)'], dict(os.environ), tmp_path / 'log', print)
    assert code == -1
    assert not group.children


def test_a_package_without_its_notebooks_is_an_error(tmp_path):
    with pytest.raises(StudyError, match='install the package again'):
        run_notebook('row', [tmp_path])


def test_rows_that_run_together_share_the_cores(tmp_path):
    env = child_environment(tmp_path, jobs=10_000)
    assert env['OMP_NUM_THREADS'] == '1'
    assert env['MIMSTUDY_PROGRESS'] == 'json'


# -- one row from end to end --------------------------------------------------------------------

ROWS = ['pixels', 'beit+semanticmim']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A store in which two rows were run at the same time, the steps as planned before, and the failures."
    store = RecordStore(tmp_path_factory.mktemp('results'))
    steps = plan('semanticmim-t1', ROWS, 'smoke', store=store)
    return store, steps, run(steps, store, jobs=2)


def test_every_row_leaves_a_record_and_an_executed_notebook(finished):
    store, steps, failures = finished
    assert failures == []
    for one in (step.experiment for step in steps):
        assert store.done(one)
        assert status(one, store) == 'done'
        notebook = json.loads((row_folder(one, store) / 'row.ipynb').read_text())
        cells = [cell for cell in notebook['cells'] if 'injected-parameters' in cell['metadata']['tags']]
        assert f'experiment = "{one.name}"' in ''.join(cells[0]['source'])
        (record,) = store.find(experiment=one.id)
        assert record['config'] == one.values
        assert record['n_val'] > 0
        assert record['evaluation']['n_train'] == 264
        assert record['seconds'] > 0


def test_the_records_hold_scores_and_the_cost_of_the_training(finished):
    store, _, _ = finished
    (trained,) = store.find(row='beit+semanticmim')
    (pixels,) = store.find(row='pixels')
    assert trained['images_seen'] == 2 * 8 * 32
    assert trained['images_per_second'] > 0
    assert trained['peak_memory'] > 0
    assert list(pixels['scores']) == ['linear/0/pixels']
    assert {'linear/1/prefix', 'linear/2/patch', 'linear/best/patch/block'} <= set(trained['scores'])
    assert store.encoder(trained['train']).P == 8


def modification_times(folder):
    "When each file was last written; locks are touched by every run."
    files = [file for file in folder.rglob('*') if file.is_file() and file.name != 'row.lock']
    return {file: file.stat().st_mtime_ns for file in files}


def test_what_is_done_is_not_run_again(finished):
    store, steps, _ = finished
    before = modification_times(store.root)
    with patch.object(ProcessGroup, 'run', side_effect=AssertionError('a row was started')):
        assert run(plan('semanticmim-t1', ROWS, 'smoke', store=store), store) == []
        assert run(steps, store) == []  # planned before the first run, so they say 'missing'
    assert modification_times(store.root) == before


def test_a_lost_record_needs_no_new_training(finished):
    store, steps, _ = finished
    one = steps[1].experiment
    (file,) = (store.root / 'scores').glob(f'{one.id}-*')
    scores = json.loads(file.read_text())['scores']
    end_of_training = store.run_folder(one.train_id) / 'done.json'
    trained = end_of_training.stat().st_mtime_ns
    file.unlink()
    again = plan('semanticmim-t1', [one.row], 'smoke', store=store)
    assert [step.status for step in again] == ['trained']
    assert run(again, store) == []
    assert json.loads(file.read_text())['scores'] == scores
    assert end_of_training.stat().st_mtime_ns == trained


def test_other_protocols_have_a_folder_of_their_own(tmp_path):
    store = RecordStore(tmp_path)
    probed = experiment('semanticmim-t1/beit', 'smoke')
    further = experiment('semanticmim-t1/beit', 'smoke', protocols=('finetune', 'voc'))
    assert row_folder(probed, store).name == probed.id
    assert row_folder(further, store).name == f'{probed.id}-finetune-voc'
    assert number_of_trainings(probed) == 1
    assert number_of_trainings(further) == 4, 'fine-tuning trains once for each kind of token'


# -- errors in every stage ----------------------------------------------------------------------


def row_notebook_with(folder, source):
    "The run notebook of a row, with a cell before its first one after the parameters."
    notebook = json.loads(run_notebook('row').read_text())
    (parameters,) = [
        i for i, cell in enumerate(notebook['cells']) if 'parameters' in cell['metadata'].get('tags', ())
    ]
    cell = dict(cell_type='code', id='planted', metadata={}, source=source, outputs=[], execution_count=None)
    notebook['cells'].insert(parameters + 1, cell)
    file = folder / 'row.ipynb'
    file.write_text(json.dumps(notebook))
    return file


PLANT = '''
from mimstudy.core.errors import StudyError
import mimstudy.study.row as row

def fail(*args, **options):
    raise StudyError('planted: this stage failed')

row.{place} = fail
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    'place', ['build_task', 'load_training_images', 'train', 'evaluate', 'save_encoder', 'RecordStore.add']
)
def test_an_error_in_any_stage_is_one_line_and_exit_code_1(tmp_path, monkeypatch, place):
    notebook = row_notebook_with(tmp_path, PLANT.format(place=place))
    monkeypatch.setattr(scheduler, 'run_notebook', lambda name: notebook)
    words = 'run semanticmim-t1 --rows maskfeat --scale smoke --results'.split()
    done = CliRunner().invoke(app, [*words, str(tmp_path / 'out')])
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if 'planted' in line]
    assert lines == ['error: maskfeat seed 0: planted: this stage failed']
    assert 'Traceback' not in done.output and 'StudyError' not in done.output
    assert done.stderr.splitlines()[-1] == '1 of 1 rows failed; the same command tries them again'


def test_an_error_of_the_scheduler_itself_is_a_failure_of_its_row(tmp_path, monkeypatch, capsys):
    "The other rows are run, and each failure has its reason."

    def fails(experiment, run):
        if experiment.row == 'pixels':
            raise StudyError('planted: no folder')

    monkeypatch.setattr(scheduler, 'run_row', fails)
    store = RecordStore(tmp_path)
    steps = plan('semanticmim-t1', ['pixels', 'random', 'beit'], 'smoke', store=store)
    assert run(steps, store, jobs=2) == [('pixels seed 0', 'planted: no folder')]
    assert 'error: pixels seed 0: planted: no folder' in capsys.readouterr().err.splitlines()


# -- interrupts, and two commands at the same time ----------------------------------------------


def wait_for(condition, seconds=180):
    "Poll until the condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(0.2)


def interrupt_after_a_checkpoint(arguments, folder, word):
    "Start a command, interrupt it after its next checkpoint; its output."
    before = {file: file.stat().st_mtime_ns for file in folder.rglob('checkpoint.pt')}

    def checkpoint_is_new():
        files = folder.rglob('checkpoint.pt')
        return any(file.stat().st_mtime_ns != before.get(file) for file in files)

    env = os.environ | dict(MIMSTUDY_CHECKPOINT_SECONDS='0')
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    child = subprocess.Popen(arguments, env=env, start_new_session=True, **streams)
    wait_for(checkpoint_is_new)
    descendants = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(word)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130, output
    running = [process for process in descendants if process.is_running()]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in running)
    return output


@pytest.mark.slow
@pytest.mark.parametrize('word', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_processes_and_the_row_can_be_continued(tmp_path, word):
    store = RecordStore(tmp_path)
    words = ['--rows', 'maskfeat', '--scale', 'laptop', '--data', 'scenes']
    last_steps = []
    for _ in range(2):
        output = interrupt_after_a_checkpoint(command(*words, results=tmp_path), tmp_path, word)
        assert 'the same command continues from here' in output
        (step,) = plan('semanticmim-t1', ['maskfeat'], 'laptop', 'scenes', store=store)
        assert step.status == 'resumable'
        assert re.match(r'\d+ %, epoch', training_progress(step.experiment, store))
        log = (store.run_folder(step.experiment.train_id) / 'log.csv').read_text().splitlines()
        steps = [line.split(',')[0] for line in log[1:]]
        assert len(set(steps)) == len(steps), 'no step is logged twice'
        last_steps.append(float(steps[-1]))
    assert last_steps[1] > last_steps[0]


@pytest.mark.slow
def test_a_terminal_that_is_closed_leaves_a_checkpoint(tmp_path):
    "Its end reaches the command as SIGHUP, and nothing more can be printed."
    words = ['--rows', 'maskfeat', '--scale', 'laptop', '--data', 'scenes']
    env = os.environ | dict(MIMSTUDY_CHECKPOINT_SECONDS='1e6')
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, command(*words, results=tmp_path), env)
    wait_for(lambda: any(file.stat().st_size for file in tmp_path.rglob('log.csv')))
    descendants = psutil.Process(pid).children(recursive=True)
    os.close(terminal)
    _, status_code = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status_code) == 130
    gone, alive = psutil.wait_procs(descendants, timeout=30)
    assert not alive and gone
    store = RecordStore(tmp_path)
    (step,) = plan('semanticmim-t1', ['maskfeat'], 'laptop', 'scenes', store=store)
    assert step.status == 'resumable'
    assert load_checkpoint(store.run_folder(step.experiment.train_id))['step'] > 0


@pytest.mark.slow
def test_two_commands_share_one_folder(tmp_path):
    arguments = command('--rows', 'pixels', 'random', 'maskfeat', '--scale', 'smoke', results=tmp_path)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = [subprocess.Popen(arguments, **streams) for _ in range(2)]
    outputs = [child.communicate(timeout=400)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len(RecordStore(tmp_path).find()) == 3
    assert len(list(tmp_path.rglob('tb/events*'))) == 1, 'the row was trained twice'


# -- broken images, and relative folders --------------------------------------------------------


def write_images(root, torn):
    "Nine classes of five training and two validation images; the file `torn` is cut short."
    for i, image in enumerate(scenes(63, size=32, seed=5).images):
        file = root / ('train' if i < 45 else 'val') / f'class_{i % 9}' / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        if file.name == torn:
            file.write_bytes(file.read_bytes()[:200])
    return root


def test_a_torn_training_image_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    "The encoder is trained without it, and the probe is fitted to the images that are left."
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(write_images(tmp_path / 'pics', '16.jpg')))
    store = RecordStore(tmp_path / 'out')
    one = experiment('semanticmim-t1/maskfeat', 'smoke', 'pics')
    trained = pretrain(one, store)
    assert status(one, store) == 'trained'
    (record,) = evaluate_row(one, trained, store)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert len(warnings) == 2
    assert all('1 of 45 images cannot be decoded' in line for line in warnings)
    assert all('16.jpg' in line for line in warnings)
    assert json.loads((store.run_folder(one.train_id) / 'done.json').read_text())['broken'] == 1
    assert store.done(one)
    assert record['n_val'] == 18
    assert record['evaluation']['n_train'] == 9 * 5 - 1


def test_a_torn_validation_image_is_reported_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(write_images(tmp_path / 'pics', '50.jpg')))
    store = RecordStore(tmp_path / 'out')
    one = experiment('semanticmim-t1/maskfeat', 'smoke', 'pics')
    with pytest.raises(StudyError, match='1 of 18 images cannot be decoded: .*50.jpg'):
        pretrain(one, store)
    assert not store.run_folder(one.train_id).exists()


def test_the_warning_of_a_row_is_shown_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_PICS', str(write_images(tmp_path / 'pics', '16.jpg')))
    words = ['--rows', 'pixels', '--scale', 'smoke', '--data', 'pics']
    arguments = command(*words, results=tmp_path / 'out')
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pixels seed 0: warning: 1 of 45 images cannot be decoded' in done.stderr
    assert '16.jpg' in done.stderr


def test_a_relative_results_folder_is_relative_to_the_working_folder(tmp_path):
    arguments = command('--rows', 'pixels', '--scale', 'smoke', results='out')
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'out' / 'scores').glob('*.json'))) == 1

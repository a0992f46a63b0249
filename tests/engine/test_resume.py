"A training that is killed and started again ends with the rows and the weights of one that was not, bit for bit."

import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import small_training
import torch
from safetensors.torch import load_file
from small_training import RECIPE, Small, make_batch, images

import mimstudy.engine.train as engine
from mimstudy.core.errors import StudyError
from mimstudy.engine.checkpoint import is_finished, load_checkpoint, is_resumable, save_checkpoint
from mimstudy.engine.train import train

STEPS, COLUMNS = 50, ['step', 'epoch', 'loss', 'spread', 'grad_norm', 'lr']


def start(folder, step_seconds=0.02, checkpoint_seconds=0.05):
    "The training as a process of its own."
    env = os.environ | dict(
        MIMSTUDY_CHECKPOINT_SECONDS=str(checkpoint_seconds), MIMSTUDY_PROGRESS='lines', OMP_NUM_THREADS='1'
    )
    return subprocess.Popen(
        [sys.executable, small_training.__file__, str(folder), str(step_seconds)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


def rows(folder):
    return (
        len(pd.read_csv(folder / 'log.csv'))
        if (folder / 'log.csv').is_file() and (folder / 'log.csv').stat().st_size
        else 0
    )


def wait_for(folder, wanted, process):
    "Until the process has written `wanted` rows and a checkpoint."
    until = time.monotonic() + 120
    while rows(folder) < wanted or not (folder / 'checkpoint.pt').is_file():
        assert process.poll() is None and time.monotonic() < until, (
            'the training ended too early, or never began'
        )
        time.sleep(0.005)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed') / 'run'
    return train(Small(), images(), make_batch, RECIPE, folder, seed=3, device='cpu'), folder


def same(folder, undisturbed):
    "Rows and weights of a folder equal those of the undisturbed training."
    ours, theirs = pd.read_csv(folder / 'log.csv'), pd.read_csv(undisturbed[1] / 'log.csv')
    pd.testing.assert_frame_equal(ours[COLUMNS], theirs[COLUMNS], check_exact=True)
    ours, theirs = (load_file(f / 'task.safetensors') for f in (folder, undisturbed[1]))
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in theirs)


def test_killed_and_resumed(tmp_path, undisturbed):
    "SIGKILL in the middle, then the same again in this process."
    folder = tmp_path / 'run'
    process = start(folder)
    wait_for(folder, 20, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and is_resumable(folder) and not is_finished(folder)
    again = train(Small(), images(), make_batch, RECIPE, folder, seed=3, device='cpu')
    assert 0 < again.resumed_from < STEPS and again.steps == STEPS == len(again.history)
    same(folder, undisturbed)
    weights = undisturbed[0].task.state_dict()
    assert all(v.equal(weights[k]) for k, v in again.task.state_dict().items())


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, undisturbed):
    "The same command, killed at five different moments, comes to the same end."
    folder = tmp_path / 'run'
    for wanted in (3, 11, 12, 30, 47):
        process = start(folder, 0.05)
        wait_for(folder, wanted, process)
        process.kill()
        process.wait()
    process = start(folder, 0.0)
    assert process.wait(300) == 0
    same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, code', [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)]
)
def test_signals_leave_a_checkpoint(tmp_path, undisturbed, number, code):
    "SIGTERM and SIGINT write a checkpoint of the very step, say so, and end the process."
    folder = tmp_path / 'run'
    process = start(folder, 0.05, checkpoint_seconds=1e6)
    while rows(folder) < 10:
        time.sleep(0.01)
    assert not (folder / 'checkpoint.pt').exists()
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code and 'stopped on request' in said
    step = load_checkpoint(folder)['step']
    assert 10 <= step == rows(folder) < STEPS
    assert train(Small(), images(), make_batch, RECIPE, folder, seed=3, device='cpu').resumed_from == step
    same(folder, undisturbed)


@pytest.mark.slow
def test_two_at_once(tmp_path, undisturbed):
    "Two processes, one folder: the second waits, finds the work done, and both end well."
    folder = tmp_path / 'run'
    both = [start(folder, 0.05) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum('another run is at work here' in text for text in said) == 1
    same(folder, undisturbed)


def test_a_step_within_a_row_is_not_lost(tmp_path, monkeypatch):
    "Rows of several steps: a crash inside a row resumes at the row's beginning, and the rows are the same."
    monkeypatch.setattr(engine, 'log_interval', lambda steps: 4)

    def crashing(x, labels, generator):
        if len(task.calls) == 22:
            raise EOFError
        return make_batch(x, labels, generator)

    task = Small()
    with pytest.raises(EOFError):
        train(task, images(), crashing, RECIPE, tmp_path, device='cpu', checkpoint_seconds=0)
    again, whole = (
        train(Small(), images(), make_batch, RECIPE, out, device='cpu') for out in (tmp_path, None)
    )
    assert again.resumed_from == 20 and again.history.step.tolist() == [*range(4, 50, 4), 50]
    pd.testing.assert_frame_equal(again.history[COLUMNS], whole.history[COLUMNS], check_exact=True)
    assert all(v.equal(whole.task.state_dict()[k]) for k, v in again.task.state_dict().items())


def test_full_disk(tmp_path, undisturbed, monkeypatch):
    "No room for a checkpoint: one line, the last checkpoint untouched, no remains; with room again it goes on."
    folder, room = tmp_path / 'run', torch.save

    def full(state, file, *args, **kwargs):
        if state['step'] < 20:
            return room(state, file, *args, **kwargs)
        file.write(b'the first part of it')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(StudyError, match='No space left on device; the last checkpoint is untouched') as e:
        train(Small(), images(), make_batch, RECIPE, folder, seed=3, device='cpu', checkpoint_seconds=0)
    assert '\n' not in str(e.value) and load_checkpoint(folder)['step'] == 19
    assert not list(folder.glob('*.part'))
    monkeypatch.undo()
    assert train(Small(), images(), make_batch, RECIPE, folder, seed=3, device='cpu').resumed_from == 19
    same(folder, undisturbed)


def test_not_finite(tmp_path):
    "The step is named, and the checkpoint before it survives."

    def poisoned(x, labels, generator):
        batch = make_batch(x, labels, generator)
        return batch._replace(views=[batch.views[0] * float('nan')]) if len(task.calls) == 12 else batch

    task = Small()
    with pytest.raises(StudyError, match='small: the loss of step 13 of 50 is not finite'):
        train(task, images(), poisoned, RECIPE, tmp_path, device='cpu', checkpoint_seconds=0)
    saved = load_checkpoint(tmp_path)
    assert saved['step'] == 12 and all(v.isfinite().all() for v in saved['task'].values())


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(recipe=RECIPE.but(lr=2e-2)), 'lr is 0.01 there and 0.02 here'),
        (dict(seed=4), 'seed is 3 there and 4 here'),
        (dict(images=images(50)), 'images is 42 there and 50 here'),
    ],
)
@pytest.mark.parametrize('done', [True, False])
def test_another_training_is_refused(tmp_path, undisturbed, change, said, done):
    "Both a checkpoint and a finished training name what differs."
    ours = dict(recipe=RECIPE, seed=3, images=images()) | change
    folder = undisturbed[1]
    if not done:
        folder = tmp_path
        (folder / 'checkpoint.pt').write_bytes((undisturbed[1] / 'checkpoint.pt').read_bytes())
    with pytest.raises(StudyError, match=said) as e:
        train(Small(), ours['images'], make_batch, ours['recipe'], folder, ours['seed'], device='cpu')
    assert '\n' not in str(e.value)


def test_another_task_is_refused(tmp_path, undisturbed):
    class Wider(Small):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    (tmp_path / 'checkpoint.pt').write_bytes((undisturbed[1] / 'checkpoint.pt').read_bytes())
    with pytest.raises(StudyError, match='does not fit the task: Missing key.*more.weight'):
        train(Wider(), images(), make_batch, RECIPE, tmp_path, 3, device='cpu')
    with pytest.raises(StudyError, match='do not fit the task'):
        train(Wider(), images(), make_batch, RECIPE, undisturbed[1], 3, device='cpu')


def test_damaged_checkpoint(tmp_path):
    for content in (b'', b'PK\x03\x04 half a zip', b'not a zip at all'):
        (tmp_path / 'checkpoint.pt').write_bytes(content)
        with pytest.raises(StudyError, match='checkpoint.pt cannot be read; delete it to begin again'):
            load_checkpoint(tmp_path)


def test_a_checkpoint_of_something_else(tmp_path, undisturbed):
    whole = load_checkpoint(undisturbed[1])
    wrong_optimiser = whole | {'optimiser': {'state': {}, 'param_groups': []}}
    for state, said in (
        ([1, 2], 'is no checkpoint of a training'),
        ({'model': torch.ones(2)}, 'has no identity'),
        (whole | {'identity': {}}, 'does not say its images'),
        (wrong_optimiser, 'does not fit the task: .*group'),
        (whole | {'processes': 2}, 'was begun by 2 processes'),
    ):
        torch.save(state, tmp_path / 'checkpoint.pt')
        with pytest.raises(StudyError, match=said) as e:
            train(Small(), images(), make_batch, RECIPE, tmp_path, 3, device='cpu')
        assert '\n' not in str(e.value)


def test_the_rest_of_a_torn_checkpoint_is_swept(tmp_path):
    (tmp_path / '.checkpoint.pt.abc.part').write_bytes(b'half')
    save_checkpoint(tmp_path, {})
    assert [f.name for f in tmp_path.iterdir()] == ['checkpoint.pt']


def test_a_finished_training_without_its_log(tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path / 'run')
    (tmp_path / 'run' / 'log.csv').unlink()
    again = train(Small(), images(), make_batch, RECIPE, tmp_path / 'run', 3, device='cpu')
    assert again.history.empty and again.resumed_from == again.steps
    (tmp_path / 'run' / 'done.json').write_text('{"steps": 3}')
    with pytest.raises(StudyError, match='does not say its images'):
        train(Small(), images(), make_batch, RECIPE, tmp_path / 'run', 3, device='cpu')


def test_checkpoints_hold_no_code(undisturbed):
    "Read with weights_only, and nothing in it but tensors and plain values."

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values())) if value else set()
        if isinstance(value, (list, tuple)):
            return set().union(*map(kinds, value)) if value else set()
        return {type(value)}

    assert kinds(load_checkpoint(undisturbed[1])) <= {torch.Tensor, int, float, str, bool, type(None)}


def test_finished_is_finished(undisturbed):
    "A finished folder asks for no batch, and gives back what the training gave."

    def nobody(*_):
        raise AssertionError('a finished training asked for a batch')

    again = train(Small(seed=99), images(), nobody, RECIPE, undisturbed[1], seed=3, device='cpu')
    assert again.resumed_from == again.steps == STEPS and is_finished(undisturbed[1])
    assert all(v.equal(undisturbed[0].task.state_dict()[k]) for k, v in again.task.state_dict().items())
    pd.testing.assert_frame_equal(again.history, undisturbed[0].history)
    assert (again.seconds, again.images_per_second, again.peak_memory) == (
        undisturbed[0].seconds,
        undisturbed[0].images_per_second,
        undisturbed[0].peak_memory,
    )

"A training that is killed and resumed has the same rows and weights as an undisturbed one, bit for bit."

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
from small_training import CONFIG, SmallTask, make_batch, training_images, with_optim

import mimstudy.engine.train as train_module
from mimstudy.core.errors import StudyError
from mimstudy.engine.checkpoint import load_checkpoint, save_checkpoint
from mimstudy.engine.files import is_finished, is_resumable
from mimstudy.engine.train import train

STEPS = 50
COLUMNS = ['step', 'epoch', 'loss', 'std', 'grad_norm', 'lr']


def run(out=None, task=None, batch_function=make_batch, config=CONFIG, seed=3, **options):
    "Train the small task in this process."
    task = task or SmallTask()
    return train(task, training_images(), batch_function, config, out, seed, device='cpu', **options)


def start(folder, step_seconds=0.02, checkpoint_seconds=0.05, steps_per_row=1):
    "Train the small task in a process of its own."
    env = os.environ | dict(
        MIMSTUDY_CHECKPOINT_SECONDS=str(checkpoint_seconds), MIMSTUDY_PROGRESS='lines', OMP_NUM_THREADS='1'
    )
    command = [sys.executable, small_training.__file__, str(folder), str(step_seconds), str(steps_per_row)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def rows(folder):
    file = folder / 'log.csv'
    return len(pd.read_csv(file)) if file.is_file() and file.stat().st_size else 0


def wait_for_rows(folder, wanted, process, checkpoint=True):
    "Wait until the process has written `wanted` rows and a checkpoint."
    deadline = time.monotonic() + 120
    while rows(folder) < wanted or (checkpoint and not (folder / 'checkpoint.pt').is_file()):
        assert process.poll() is None and time.monotonic() < deadline, 'the training ended or did not start'
        time.sleep(0.005)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed') / 'run'
    return run(folder), folder


def assert_same(folder, undisturbed):
    "Rows and weights of a folder equal those of the undisturbed training."
    ours = pd.read_csv(folder / 'log.csv')
    expected = pd.read_csv(undisturbed[1] / 'log.csv')
    pd.testing.assert_frame_equal(ours[COLUMNS], expected[COLUMNS], check_exact=True)
    ours = load_file(folder / 'task.safetensors')
    expected = load_file(undisturbed[1] / 'task.safetensors')
    assert ours.keys() == expected.keys() and all(ours[k].equal(expected[k]) for k in expected)


def assert_same_weights(a, b):
    expected = b.task.state_dict()
    assert all(value.equal(expected[name]) for name, value in a.task.state_dict().items())


# -- killed processes ----------------------------------------------------------------------------------------


def test_killed_and_resumed(tmp_path, undisturbed):
    "SIGKILL in the middle, then the same training again in this process."
    folder = tmp_path / 'run'
    process = start(folder)
    wait_for_rows(folder, 20, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and is_resumable(folder) and not is_finished(folder)
    resumed = run(folder)
    assert 0 < resumed.resumed_from < STEPS and resumed.steps == STEPS == len(resumed.history)
    assert_same(folder, undisturbed)
    assert_same_weights(resumed, undisturbed[0])


@pytest.mark.slow
def test_killed_five_times(tmp_path, undisturbed):
    folder = tmp_path / 'run'
    for wanted in (3, 11, 12, 30, 47):
        process = start(folder, 0.05)
        wait_for_rows(folder, wanted, process)
        process.kill()
        process.wait()
    process = start(folder, 0.0)
    assert process.wait(300) == 0
    assert_same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, code',
    [
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGINT, -signal.SIGINT),
        (signal.SIGHUP, 128 + signal.SIGHUP),
    ],
)
def test_signals_leave_a_checkpoint(tmp_path, undisturbed, number, code):
    "A signal writes a checkpoint of the current step, prints a line, and ends the process."
    folder = tmp_path / 'run'
    process = start(folder, 0.05, checkpoint_seconds=1e6)
    wait_for_rows(folder, 10, process, checkpoint=False)
    assert not (folder / 'checkpoint.pt').exists()
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code and 'stopped on request' in output
    step = load_checkpoint(folder)['step']
    assert 10 <= step == rows(folder) < STEPS
    assert run(folder).resumed_from == step
    assert_same(folder, undisturbed)


def test_a_signal_waits_for_the_end_of_the_row(tmp_path):
    "With ten steps a row, a signal in between still leaves a checkpoint, at the end of the row."
    process = start(tmp_path, 0.05, checkpoint_seconds=1e6, steps_per_row=10)
    wait_for_rows(tmp_path, 1, process, checkpoint=False)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and 'stopped on request' in output
    assert load_checkpoint(tmp_path)['step'] in (10, 20, 30) and is_resumable(tmp_path)


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path, undisturbed):
    "The second process waits, finds the training finished, and both end without an error."
    folder = tmp_path / 'run'
    both = [start(folder, 0.05) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum('another run is at work here' in output for output in outputs) == 1
    assert_same(folder, undisturbed)


# -- errors in a training ------------------------------------------------------------------------------------


def test_an_error_within_a_row(tmp_path, monkeypatch):
    "With several steps a row, a resume begins at the start of the row, and the rows are the same."
    monkeypatch.setattr(train_module, 'log_interval', lambda steps: 4)
    task = SmallTask()

    def fails_at_step_23(x, labels, generator):
        if len(task.progress_values) == 22:
            raise EOFError
        return make_batch(x, labels, generator)

    with pytest.raises(EOFError):
        run(tmp_path, task, fails_at_step_23, checkpoint_seconds=0)
    resumed = run(tmp_path)
    whole = run()
    assert resumed.resumed_from == 20 and resumed.history.step.tolist() == [*range(4, 50, 4), 50]
    pd.testing.assert_frame_equal(resumed.history[COLUMNS], whole.history[COLUMNS], check_exact=True)
    assert_same_weights(resumed, whole)


def test_full_disk(tmp_path, undisturbed, monkeypatch):
    "Without space for a checkpoint the last one is kept; with space again the training continues."
    folder = tmp_path / 'run'
    torch_save = torch.save

    def full(state, file, *args, **options):
        if state['step'] < 20:
            return torch_save(state, file, *args, **options)
        file.write(b'the first part of it')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(
        StudyError, match='No space left on device; the last checkpoint is unchanged'
    ) as error:
        run(folder, checkpoint_seconds=0)
    assert '\n' not in str(error.value) and load_checkpoint(folder)['step'] == 19
    assert not list(folder.glob('*.part'))
    monkeypatch.undo()
    assert run(folder).resumed_from == 19
    assert_same(folder, undisturbed)


def test_loss_that_is_not_finite(tmp_path):
    "The step is named, and the checkpoint before it is kept."
    task = SmallTask()

    def nan_at_step_13(x, labels, generator):
        batch = make_batch(x, labels, generator)
        if len(task.progress_values) == 12:
            return batch._replace(views=[batch.views[0] * float('nan')])
        return batch

    with pytest.raises(StudyError, match='small: the loss of step 13 of 50 is not finite'):
        run(tmp_path, task, nan_at_step_13, checkpoint_seconds=0)
    saved = load_checkpoint(tmp_path)
    assert saved['step'] == 12 and all(value.isfinite().all() for value in saved['task'].values())


# -- folders of other trainings, and damaged ones ------------------------------------------------------------


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(config=with_optim(lr=2e-2)), 'optim.lr is 0.01 there and 0.02 here'),
        (dict(seed=4), 'seed is 3 there and 4 here'),
        (dict(images=training_images(50)), 'images is 42 there and 50 here'),
    ],
)
@pytest.mark.parametrize('finished', [True, False])
def test_another_training_is_refused(tmp_path, undisturbed, change, message, finished):
    "Both a checkpoint and a finished training name what differs."
    ours = dict(config=CONFIG, seed=3, images=training_images()) | change
    folder = undisturbed[1]
    if not finished:
        folder = tmp_path
        shutil.copy(undisturbed[1] / 'checkpoint.pt', folder)
    with pytest.raises(StudyError, match=message) as error:
        train(SmallTask(), ours['images'], make_batch, ours['config'], folder, ours['seed'], device='cpu')
    assert '\n' not in str(error.value)


def test_another_name_is_not_another_training(undisturbed):
    assert run(undisturbed[1], config=CONFIG.but(name='renamed')).resumed_from == STEPS


def test_another_task_is_refused(tmp_path, undisturbed):
    class Wider(SmallTask):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    shutil.copy(undisturbed[1] / 'checkpoint.pt', tmp_path)
    with pytest.raises(StudyError, match='does not fit the task: Missing key.*more.weight'):
        run(tmp_path, Wider())
    with pytest.raises(StudyError, match='do not fit the task'):
        run(undisturbed[1], Wider())


def test_damaged_checkpoint(tmp_path):
    for content in (b'', b'PK\x03\x04 half a zip', b'not a zip at all'):
        (tmp_path / 'checkpoint.pt').write_bytes(content)
        with pytest.raises(StudyError, match='checkpoint.pt cannot be read; delete it to begin again'):
            load_checkpoint(tmp_path)


def test_a_checkpoint_of_something_else(tmp_path, undisturbed):
    whole = load_checkpoint(undisturbed[1])
    wrong_optimiser = whole | {'optimiser': {'state': {}, 'param_groups': []}}
    for state, message in (
        ([1, 2], 'is not a checkpoint of a training'),
        ({'model': torch.ones(2)}, 'has no conditions'),
        (whole | {'identity': {}}, 'has no config'),
        (wrong_optimiser, 'does not fit the task: .*group'),
        (whole | {'conditions': [1]}, 'has no conditions'),
    ):
        torch.save(state, tmp_path / 'checkpoint.pt')
        with pytest.raises(StudyError, match=message) as error:
            run(tmp_path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name, value',
    [
        ('precision', 'fp16'),
        ('processes', 2),
        ('accumulate', 4),
        ('device', 'cuda'),
        ('attention', 'written out'),
        ('compile', 'inductor'),
        ('matmul', 'medium'),
    ],
)
def test_other_conditions_are_refused(tmp_path, undisturbed, name, value):
    "A checkpoint that was written under another condition names it."
    saved = load_checkpoint(undisturbed[1])
    saved['conditions'][name] = value
    torch.save(saved, tmp_path / 'checkpoint.pt')
    with pytest.raises(StudyError, match=f'was begun with {name} = {value}, whose numbers differ') as error:
        run(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['threads', 'torch', 'timm'])
def test_what_changes_only_rounding_is_said(tmp_path, undisturbed, name):
    saved = load_checkpoint(undisturbed[1])
    saved['conditions'][name] = 'another'
    torch.save(saved, tmp_path / 'checkpoint.pt')
    with pytest.warns(UserWarning, match=f'continued with {name} .* instead of another'):
        assert run(tmp_path).steps == STEPS


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path, undisturbed):
    "It stored precision, processes and slices only."
    saved = load_checkpoint(undisturbed[1])
    saved['conditions'] = {k: saved['conditions'][k] for k in ('precision', 'processes', 'accumulate')}
    torch.save(saved, tmp_path / 'checkpoint.pt')
    assert run(tmp_path).steps == STEPS


def test_slices_from_a_variable_are_a_condition(tmp_path, undisturbed, monkeypatch):
    shutil.copy(undisturbed[1] / 'checkpoint.pt', tmp_path)
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '2')
    with pytest.raises(StudyError, match='with accumulate = 1, whose numbers differ'):
        run(tmp_path)
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', 'two')
    with pytest.raises(StudyError, match='ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be a whole number'):
        run(tmp_path)


def test_images_that_were_replaced_are_noticed(tmp_path, undisturbed):
    "As many images under the same name, other pixels."
    shutil.copy(undisturbed[1] / 'checkpoint.pt', tmp_path)
    images = training_images()
    images.images = 255 - images.images
    with pytest.raises(StudyError, match='the images have changed since the training'):
        train(SmallTask(), images, make_batch, CONFIG, tmp_path, 3, device='cpu')


def test_unfinished_temporary_files_are_removed(tmp_path):
    (tmp_path / '.checkpoint.pt.abc.part').write_bytes(b'half')
    save_checkpoint(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ['checkpoint.pt']


def test_a_finished_training_without_its_log(tmp_path, undisturbed):
    folder = tmp_path / 'run'
    shutil.copytree(undisturbed[1], folder)
    (folder / 'log.csv').unlink()
    again = run(folder)
    assert again.history.empty and again.resumed_from == again.steps
    (folder / 'done.json').write_text('{"steps": 3}')
    with pytest.raises(StudyError, match='has no config'):
        run(folder)


def test_checkpoints_hold_no_code(undisturbed):
    "Read with weights_only, a checkpoint holds nothing but tensors and plain values."

    def types(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return set().union(*map(types, value))
        return {type(value)}

    assert types(load_checkpoint(undisturbed[1])) <= {torch.Tensor, int, float, str, bool, type(None)}


def test_a_finished_training_is_not_repeated(undisturbed):
    "A finished folder asks for no batch, and returns what the training returned."

    def never_called(*_):
        raise AssertionError('a finished training asked for a batch')

    again = run(undisturbed[1], SmallTask(seed=99), never_called)
    first = undisturbed[0]
    assert again.resumed_from == again.steps == STEPS and is_finished(undisturbed[1])
    assert_same_weights(again, first)
    pd.testing.assert_frame_equal(again.history, first.history)
    for name in ('seconds', 'images_per_second', 'peak_memory'):
        assert getattr(again, name) == getattr(first, name)

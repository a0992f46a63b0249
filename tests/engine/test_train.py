"The training loop: what it computes, what it calls, what it leaves unchanged, and what it writes and prints."

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import small_training
import torch
from conftest import assert_close
from small_training import CONFIG, SmallTask, make_batch, training_images, with_optim, without_randomness
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mimstudy.engine.train as train_module
from mimstudy.core.errors import StudyError
from mimstudy.core.settings import resolve_precision
from mimstudy.core.task import Batch, Task
from mimstudy.engine.checkpoint import is_finished, load_result, read_summary
from mimstudy.engine.optimiser import build_optimiser
from mimstudy.engine.sampling import BatchSampler, mix_seeds
from mimstudy.engine.schedules import decay_at, learning_rate
from mimstudy.engine.train import train
from mimstudy.engine.training_config import DownstreamConfig


def run(task=None, config=CONFIG, batch_function=make_batch, out=None, precision='no', **options):
    "Train the small task on the CPU."
    options |= dict(device='cpu', precision=precision)
    return train(task or SmallTask(), training_images(), batch_function, config, out, **options)


# -- what it computes ----------------------------------------------------------------------------------------


def by_hand(optim, seed=3):
    "The same training as a plain PyTorch loop."
    task = SmallTask().train()
    optimiser = build_optimiser(task, optim)
    sampler = BatchSampler(42, optim.batch, optim.epochs, seed)
    generator = torch.Generator()
    losses = []
    for step, (x, labels) in enumerate(training_images().batches(sampler)):
        for group in optimiser.param_groups:
            group['lr'] = learning_rate(optim, step, sampler.per_epoch)
            if group['weight_decay']:
                group['weight_decay'] = decay_at(optim, step, sampler.per_epoch)
        generator.manual_seed(mix_seeds('feed', seed, step, 0))
        torch.manual_seed(mix_seeds('model', seed, step, 0))
        loss = task(make_batch(x, labels, generator), step / sampler.steps)['loss']
        loss.backward()
        if optim.clip:
            nn.utils.clip_grad_norm_(task.parameters(), optim.clip)
        optimiser.step()
        optimiser.zero_grad()
        task.after_step(step / sampler.steps)
        losses.append(loss.item())
    return task, losses


@pytest.mark.parametrize(
    'change',
    [{}, dict(clip=None), dict(clip=0.01), dict(weight_decay_end=0.9), dict(optimiser='sgd', lr=0.1)],
    ids=['clip 1', 'no clip', 'clip .01', 'rising decay', 'sgd'],
)
def test_the_loop_equals_a_plain_one(change):
    config = with_optim(**change)
    task, losses = by_hand(config.optim)
    trained = run(config=config, seed=3)
    assert trained.history.loss.tolist() == losses
    expected = task.state_dict()
    assert all(value.equal(expected[name]) for name, value in trained.task.state_dict().items())


def test_the_logged_norm_is_the_unclipped_one():
    norms = [run(config=with_optim(clip=clip)).history.grad_norm for clip in (None, 1e-3)]
    assert norms[0][0] == norms[1][0] > 1e-2


def test_after_step_is_called_once_a_step_with_its_progress():
    task = SmallTask()
    run(task, accumulate=2)
    assert task.progress_values == [step / 50 for step in range(50)]


def test_the_seed_decides():
    first, second, other = (run(config=with_optim(epochs=2), seed=seed).history.loss for seed in (0, 0, 1))
    assert first.equals(second) and not first.equals(other)


class SmallClassifier(Task):
    "An encoder with layers, and a linear head."

    def __init__(self):
        super().__init__()
        self.encoder = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=1, num_classes=0, global_pool='avg'
        )
        self.head = nn.Linear(8, 3)

    def forward(self, batch, progress):
        logits = self.head(self.encoder(batch.views[0]))
        return {'loss': nn.functional.cross_entropy(logits, batch.label)}


def test_layer_wise_rates_follow_the_schedule(monkeypatch):
    "The learning rate of each group is the schedule's times its own factor."
    steps = []
    original = torch.optim.AdamW.step

    def recorded(self, *args, **options):
        steps.append([(group['lr'], group['lr_scale']) for group in self.param_groups])
        return original(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, 'step', recorded)
    config = with_optim(layer_decay=0.5, epochs=2)
    run(SmallClassifier(), config)
    for step, groups in enumerate(steps):
        for rate, factor in groups:
            assert rate == learning_rate(config.optim, step, 5) * factor
    assert {factor for groups in steps for _, factor in groups} == {1.0, 0.5, 0.25, 0.125}


def test_no_number_is_read_from_the_device_within_a_row(monkeypatch):
    "Between two rows there is no item, no tolist and no conversion to a Python number."
    reads = []  # name of the method, whether it was called within a step
    in_step = []
    original_step = train_module.train_step

    def watch(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *args):
            reads.append((name, bool(in_step)))
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)

    def step(*args):
        in_step.append(True)
        try:
            return original_step(*args)
        finally:
            in_step.clear()

    for name in ('item', 'tolist', '__float__', '__int__', '__bool__', 'nonzero', 'cpu', 'numpy'):
        watch(name)
    monkeypatch.setattr(train_module, 'train_step', step)
    monkeypatch.setattr(train_module, 'log_interval', lambda steps: 10)
    history = run().history
    assert len(history) == 5 and not [name for name, inside in reads if inside]
    at_the_start = 2  # labels and some images, for the conditions of the training
    assert sum(name == 'cpu' for name, _ in reads) == at_the_start + 5


def test_rows_are_means_over_their_steps(monkeypatch):
    single = run().history
    monkeypatch.setattr(train_module, 'log_interval', lambda steps: 10)
    tens = run().history
    assert_close(torch.tensor(tens.loss.values), torch.tensor(single.loss.values).view(5, 10).mean(1), 1e-12)
    assert tens.step.tolist() == [10, 20, 30, 40, 50] and tens.lr.tolist() == single.lr[9::10].tolist()


def test_slices_add_up():
    "Without randomness, a batch in two slices gives the same training up to rounding."

    class Deterministic(SmallTask):
        def forward(self, batch, progress):
            z = self.stem(batch.views[0].flatten(1).unflatten(1, (16, 48)))
            return {'loss': ((self.head(z + self.branch(z)) - 1) ** 2).mean()}

    def without_noise(x, labels, generator):
        return Batch([x.float() / 255], label=labels)

    one, two = (
        run(without_randomness(Deterministic()), batch_function=without_noise, accumulate=slices).history
        for slices in (1, 2)
    )
    assert_close(torch.tensor(two.loss.values), torch.tensor(one.loss.values), 1e-5)
    assert_close(torch.tensor(two.grad_norm.values), torch.tensor(one.grad_norm.values), 1e-4)


# -- what it leaves unchanged --------------------------------------------------------------------------------


def test_global_state_is_unchanged():
    "Global random numbers, signal handlers, and the task's own forward are what they were."
    torch.manual_seed(5)
    expected = torch.rand(3)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    task = SmallTask()
    torch.manual_seed(5)
    run(task, with_optim(epochs=1), precision='bf16')
    assert torch.rand(3).equal(expected)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not {'forward', '_original_forward', '_is_accelerate_prepared'} & set(task.__dict__)
    assert not task.training


def test_weights_stay_in_float32():
    class Recorded(SmallTask):
        def forward(self, batch, progress):
            out = super().forward(batch, progress)
            self.dtype_inside = self.stem(torch.ones(1, 48)).dtype
            return out

    task = Recorded()
    losses = run(task, precision='bf16').history.loss
    assert task.dtype_inside == torch.bfloat16 and {p.dtype for p in task.parameters()} == {torch.float32}
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean()


def test_a_task_can_be_trained_again():
    task = SmallTask()
    first = run(task, with_optim(epochs=2), precision='bf16')
    second = run(task, with_optim(epochs=2))
    assert second.history.loss.mean() < first.history.loss.mean()


# -- what it writes and prints -------------------------------------------------------------------------------


def test_files_of_a_training(tmp_path):
    folder = tmp_path / 'deep' / 'run'
    trained = run(out=folder)
    names = {'checkpoint.pt', 'done.json', 'task.safetensors', 'log.csv', 'lock', 'tb'}
    assert {file.name for file in folder.iterdir()} == names
    log = pd.read_csv(folder / 'log.csv')
    assert list(log) == ['step', 'epoch', 'loss', 'std', 'grad_norm', 'lr', 'images_per_second', 'wait']
    assert log.step.tolist() == list(range(1, 51)) and log.epoch.iloc[-1] == 10
    assert log.wait.between(0, 1).all() and (log.images_per_second > 0).all()
    summary = json.loads((folder / 'done.json').read_text())
    assert summary['steps'] == 50 and summary['broken'] == 0
    assert summary['images_per_second'] == pytest.approx(50 * 8 / summary['seconds'])
    assert DownstreamConfig.from_json(read_summary(folder)['config']) == CONFIG
    loaded = SmallTask(1)
    assert load_result(folder, loaded) == summary
    expected = trained.task.state_dict()
    assert all(value.equal(expected[name]) for name, value in loaded.state_dict().items())


def test_tensorboard_has_every_number(tmp_path):
    run(out=tmp_path)
    board = EventAccumulator(str(tmp_path / 'tb')).Reload()
    assert set(board.Tags()['scalars']) == {'loss', 'std', 'grad_norm', 'lr', 'images_per_second', 'wait'}
    assert [event.step for event in board.Scalars('loss')] == list(range(1, 51))


def test_progress_as_lines_json_and_nothing(monkeypatch, capsys):
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'lines')
    run(log_seconds=0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 50 and lines[19].endswith(' images/s') and ' left' in lines[19]
    assert lines[19].startswith('small · 40 % · 20/50 · loss ')
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'json')
    history = run(log_seconds=0).history
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event['step'] for event in events] == list(range(1, 51))
    assert [event['loss'] for event in events] == history.loss.tolist()
    assert {(event['event'], event['name'], event['steps']) for event in events} == {
        ('progress', 'small', 50)
    }
    assert events[-1]['seconds_left'] == 0 and events[0]['images_per_second'] > 0
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'none')
    run(log_seconds=0)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(config=with_optim(batch=64)), '42 images do not fill one batch of 64'),
        (dict(accumulate=3), 'cannot be cut into 3 slices'),
        (dict(device='cuda0'), 'unknown device "cuda0"'),
        (dict(precision='fp16'), 'fp16 needs a GPU'),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = dict(config=CONFIG, device='cpu') | change
    with pytest.raises(StudyError, match=message) as error:
        train(SmallTask(), training_images(), make_batch, **arguments)
    assert '\n' not in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(StudyError, match='cannot be written'):
        run(out=tmp_path / 'file' / 'run')


def test_broken_images_are_counted():
    images = training_images()
    images.broken = 3
    trained = train(SmallTask(), images, make_batch, with_optim(epochs=1), device='cpu')
    assert trained.broken == 3


# -- several processes, torch.compile, GPUs ------------------------------------------------------------------

PROGRAM = '''
import sys
import torch
from torch import distributed
import small_training as s

torch.set_num_threads(1)

def constant_masks(x, labels, generator):
    mask = torch.arange(16).expand(len(x), 16) < 4
    return s.Batch([x.float() / 255], mask, labels)

task = s.without_randomness(s.SmallTask())
task.norm = torch.nn.Identity()
trained = s.train(task, s.training_images(), constant_masks, s.CONFIG, sys.argv[1], seed=3, device='cpu')
assert trained.steps == 50 and len(trained.history) in (0, 50)
if distributed.is_initialized():
    distributed.destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    "Two processes share each batch; without randomness the curve is that of one process."
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    tests = os.path.dirname(small_training.__file__)
    env = os.environ | dict(PYTHONPATH=tests, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    for options, out in (([], 'one'), (launch, 'two')):
        command = [sys.executable, *options, str(program), str(tmp_path / out)]
        subprocess.run(command, env=env, check=True, timeout=300)
    one, two = (pd.read_csv(tmp_path / out / 'log.csv') for out in ('one', 'two'))
    assert two.step.tolist() == one.step.tolist() and is_finished(tmp_path / 'two')
    assert_close(torch.tensor(two.loss.values), torch.tensor(one.loss.values), 1e-4)


@pytest.mark.slow
def test_compiled():
    plain, compiled = (run(config=with_optim(epochs=2), compile=compile) for compile in (False, True))
    assert compiled.history.loss[0] == pytest.approx(plain.history.loss[0], rel=0.2)
    assert compiled.task.state_dict().keys() == plain.task.state_dict().keys()


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16'])
def test_on_a_gpu(tmp_path, precision):
    "The same images, masks and noise as on the CPU; a finished training is found again; memory is counted."

    def on_gpu(task):
        images = training_images().to('cuda')
        options = dict(seed=3, device='cuda', precision=precision)
        return train(task, images, make_batch, CONFIG, tmp_path, **options)

    gpu = on_gpu(without_randomness(SmallTask()))
    cpu = run(without_randomness(SmallTask()), seed=3)
    tolerance = 1e-4 if precision == 'no' else 3e-2
    assert gpu.history.loss[0] == pytest.approx(cpu.history.loss[0], rel=tolerance) and gpu.peak_memory > 0
    assert on_gpu(SmallTask()).resumed_from == 50


def test_bf16_on_a_processor_without_it_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr('mimstudy.engine.hardware.has_native_bf16', lambda: False)
    with pytest.warns(UserWarning, match='this processor has no bfloat16 in hardware'):
        result = run(config=with_optim(epochs=1), precision='bf16')
    assert result.precision == 'bf16' and resolve_precision('auto', torch.device('cpu')) in ('no', 'bf16')

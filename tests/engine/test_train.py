"The loop: what it computes, what it calls, what it leaves alone, and what it says."

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import small_training
import torch
from conftest import assert_close
from small_training import RECIPE, Small, make_batch, images
from torch import nn

from mimstudy.core.errors import StudyError
from mimstudy.core.task import Batch, Task
from mimstudy.engine.checkpoint import is_finished, load_result, read_config
from mimstudy.engine.optimiser import build_optimiser
from mimstudy.engine.sampling import BatchSampler, mix_seeds
from mimstudy.engine.config import OPTIONAL, SCALES, VALUES, Recipe
from mimstudy.engine.schedules import decay_at, learning_rate
from mimstudy.engine.train import train


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize(
    'data',
    [
        '',
        'scenes',
        'cifar10-jpeg',
        'cifar10',
        'cifar100',
        'stl10',
        'imagenette',
        'caltech101-72',
        'my-own-photos',
    ],
)
def test_every_scale_is_valid_for_every_data_set(scale, data):
    recipe = Recipe(prefix=8, unit=2, ratio=0.75, warmup=30.0).at(scale, data)
    assert (recipe.ratio, recipe.unit, recipe.prefix) == (0.75, 2, 8)
    assert recipe.data == (data or SCALES[scale].get('data', 'imagenet'))
    assert recipe.warmup / recipe.epochs == pytest.approx(
        0.1, abs=1e-4
    ) and recipe.min_lr / recipe.lr == pytest.approx(1e-5 / 1.5e-3)
    if scale in ('smoke', 'laptop'):
        assert (recipe.size // recipe.patch) ** 2 <= 64 and recipe.crop[0] >= 0.35


def test_a_recipe_survives_json():
    recipe = Recipe(
        'a',
        'b',
        dict(tau=0.1, momentum=0.996),
        layer_decay=0.65,
        clip=None,
        no_decay=['mask_token'],
        sources=dict(lr='nowhere'),
    ).at('gpu')
    text = json.dumps(recipe.to_json())
    again = Recipe.from_json(json.loads(text))
    assert (
        again == recipe
        and again.key() == recipe.key()
        and json.dumps(again.to_json()) == text
        and list(recipe.to_json()) == [n for n in VALUES if n not in OPTIONAL]
    )
    later = Recipe(clip_each=True)
    assert 'clip_each' in later.to_json() and Recipe.from_json(later.to_json()) == later


def test_the_key_depends_on_every_value():
    other = dict(
        method='x',
        options=dict(a=1),
        data='x',
        size=112,
        per_class=1,
        width=384,
        depth=1,
        heads=1,
        patch=8,
        prefix=2,
        layer_scale=1.0,
        drop_path=0.1,
        init='beit',
        positions='relative',
        mask='block',
        ratio=0.5,
        unit=2,
        predict_ratio=0.5,
        tokenizer='kmeans',
        codes=2,
        crop=(0.5, 1),
        flip=0,
        views='two',
        locals=2,
        local_size=112,
        local_crop=(0.1, 0.4),
        mlp_drops=2,
        kept='teacher',
        weight_decay_end=0.4,
        epochs=301,
        batch=1,
        lr=1.0,
        min_lr=1e-4,
        warmup=1.0,
        warmup_start=1.0,
        betas=(0, 0),
        eps=1.0,
        weight_decay=1.0,
        no_decay=(),
        layer_decay=0.5,
        clip=1.0,
        clip_each=True,
        schedule='linear',
        stair=3.0,
        optimiser='sgd',
    )
    assert set(other) == set(VALUES) - {'name'}
    base = Recipe(views='multicrop')  # small crops need it
    keys = [base.but(**{name: value}).key() for name, value in other.items()]
    assert len({*keys, base.key()}) == len(other) + 1
    assert Recipe().but(name='other').key() == Recipe().key() == Recipe(sources=dict(lr='elsewhere')).key()


def test_a_recipe_is_frozen():
    with pytest.raises(AttributeError):
        Recipe().lr = 1.0


# -- the loop -------------------------------------------------------------------------------------------------------


def by_hand(recipe, seed=3):
    "The same training, written out as anybody would."
    task, generator, losses = Small(), torch.Generator(), []
    optimiser, orders = (
        build_optimiser(task.train(), recipe),
        BatchSampler(42, recipe.batch, recipe.epochs, seed),
    )
    for step, (x, labels) in enumerate(images().batches(orders)):
        for group in optimiser.param_groups:
            group['lr'] = learning_rate(recipe, step, orders.per_epoch)
            if group['weight_decay']:
                group['weight_decay'] = decay_at(recipe, step, orders.per_epoch)
        generator.manual_seed(mix_seeds('feed', seed, step, 0))
        torch.manual_seed(mix_seeds('model', seed, step, 0))
        loss = task(make_batch(x, labels, generator), step / orders.steps)['loss']
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(task.parameters(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad()
        task.after_step(step / orders.steps)
        losses.append(loss.item())
    return task, losses


@pytest.mark.parametrize(
    'recipe',
    [RECIPE, RECIPE.but(clip=None), RECIPE.but(clip=0.01), RECIPE.but(weight_decay_end=0.9)],
    ids=['clip 1', 'no clip', 'clip .01', 'rising decay'],
)
def test_the_loop_computes_what_is_written(recipe):
    task, losses = by_hand(recipe)
    trained = train(Small(), images(), make_batch, recipe, seed=3, device='cpu')
    assert trained.history.loss.tolist() == losses
    assert all(v.equal(task.state_dict()[k]) for k, v in trained.task.state_dict().items())


def test_the_logged_norm_is_the_unclipped_one():
    free, clipped = (
        train(Small(), images(), make_batch, RECIPE.but(clip=clip), seed=3, device='cpu').history.grad_norm
        for clip in (None, 1e-3)
    )
    assert free[0] == clipped[0] > 1e-2


def test_after_step_is_called_once_a_step_with_its_progress():
    task = Small()
    train(task, images(), make_batch, RECIPE, device='cpu', accumulate=2)
    assert task.calls == [step / 50 for step in range(50)]


def test_the_seed_decides():
    one, same, other = (
        train(Small(), images(), make_batch, RECIPE.but(epochs=2), seed=seed, device='cpu').history.loss
        for seed in (0, 0, 1)
    )
    assert one.equals(same) and not one.equals(other)


def test_layer_wise_rates_follow_the_schedule(monkeypatch):
    "Each group's rate is the schedule's times its own share."
    from timm.models.vision_transformer import VisionTransformer

    class Probe(Task):
        def __init__(self):
            super().__init__()
            self.encoder = VisionTransformer(
                img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=1, num_classes=0, global_pool='avg'
            )
            self.line = nn.Linear(8, 3)

        def forward(self, batch, progress):
            return {'loss': nn.functional.cross_entropy(self.line(self.encoder(batch.views[0])), batch.label)}

    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        'step',
        lambda self, *a, **k: (
            seen.append([(g['lr'], g['lr_scale']) for g in self.param_groups]),
            step(self, *a, **k),
        )[1],
    )
    recipe = RECIPE.but(layer_decay=0.5, epochs=2)
    train(Probe(), images(), make_batch, recipe, device='cpu')
    assert [rate for groups in seen for rate, _ in groups] == [
        learning_rate(recipe, i, 5) * share for i, groups in enumerate(seen) for _, share in groups
    ]
    assert {share for groups in seen for _, share in groups} == {1.0, 0.5, 0.25, 0.125}


def test_no_number_is_asked_for_in_a_step(monkeypatch):
    "Between two rows nothing is read from the device: no item, no tolist, no conversion to a Python number."
    import mimstudy.engine.train as engine

    asked, within = [], []

    def watch(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *args):
            asked.append((name, bool(within)))
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in ('item', 'tolist', '__float__', '__int__', '__bool__', 'nonzero', 'cpu', 'numpy'):
        watch(name)
    train_step = engine.train_step

    def marked(*args):
        within.append(1)
        try:
            return train_step(*args)
        finally:
            within.clear()

    monkeypatch.setattr(engine, 'train_step', marked)
    monkeypatch.setattr(engine, 'log_interval', lambda steps: 10)
    history = train(Small(), images(), make_batch, RECIPE, device='cpu').history
    assert len(history) == 5 and not [name for name, inside in asked if inside]
    assert sum(name == 'cpu' for name, _ in asked) == 5


def test_rows_are_means_over_their_steps(monkeypatch):
    single = train(Small(), images(), make_batch, RECIPE, device='cpu').history
    monkeypatch.setattr('mimstudy.engine.train.log_interval', lambda steps: 10)
    tens = train(Small(), images(), make_batch, RECIPE, device='cpu').history
    assert_close(torch.tensor(tens.loss.values), torch.tensor(single.loss.values).view(5, 10).mean(1), 1e-12)
    assert tens.step.tolist() == [10, 20, 30, 40, 50] and tens.lr.tolist() == single.lr[9::10].tolist()


def test_slices_add_up():
    "Without anything random, a batch in two slices gives the same training up to rounding."

    class Plain(Small):
        def __init__(self):
            super().__init__()
            self.drop, self.branch[2], self.norm = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, batch, progress):
            z = self.stem(batch.views[0].flatten(1).unflatten(1, (16, 48)))
            return {'loss': ((self.head(z + self.branch(z)) - 1) ** 2).mean()}

    def plain(x, labels, generator):
        return Batch([x.float() / 255], label=labels)

    one, two = (train(Plain(), images(), plain, RECIPE, device='cpu', accumulate=slices) for slices in (1, 2))
    assert_close(torch.tensor(two.history.loss.values), torch.tensor(one.history.loss.values), 1e-5)
    assert_close(torch.tensor(two.history.grad_norm.values), torch.tensor(one.history.grad_norm.values), 1e-4)


def test_the_callers_world_is_left_alone():
    "Global random numbers, signal handlers, and the task's own forward are what they were."
    import signal

    torch.manual_seed(5)
    expected, handlers = torch.rand(3), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    torch.manual_seed(5)
    task = Small()
    torch.manual_seed(5)
    train(task, images(), make_batch, RECIPE.but(epochs=1), device='cpu', precision='bf16')
    assert (
        torch.rand(3).equal(expected)
        and [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    )
    assert (
        not {'forward', '_original_forward', '_is_accelerate_prepared'} & set(task.__dict__)
        and not task.training
    )


def test_half_precision_keeps_weights_whole():
    class Seen(Small):
        def forward(self, batch, progress):
            out = super().forward(batch, progress)
            self.inside = self.stem(torch.ones(1, 48)).dtype
            return out

    task = Seen()
    history = train(task, images(), make_batch, RECIPE, device='cpu', precision='bf16').history
    assert (
        task.inside == torch.bfloat16
        and {p.dtype for p in task.parameters()} == {torch.float32}
        and history.loss.iloc[-5:].mean() < history.loss.iloc[:5].mean()
    )


def test_a_task_can_be_trained_again():
    task = Small()
    first = train(task, images(), make_batch, RECIPE.but(epochs=2), device='cpu', precision='bf16')
    second = train(task, images(), make_batch, RECIPE.but(epochs=2), device='cpu')
    assert second.history.loss.mean() < first.history.loss.mean()


# -- what it writes and says ----------------------------------------------------------------------------------------


def test_what_a_training_leaves(tmp_path):
    trained = train(Small(), images(), make_batch, RECIPE, tmp_path / 'deep' / 'run', device='cpu')
    folder = tmp_path / 'deep' / 'run'
    assert {f.name for f in folder.iterdir()} == {
        'checkpoint.pt',
        'done.json',
        'task.safetensors',
        'log.csv',
        'lock',
        'tb',
    }
    log = pd.read_csv(folder / 'log.csv')
    assert list(log) == [
        'step',
        'epoch',
        'loss',
        'spread',
        'grad_norm',
        'lr',
        'images_per_second',
        'wait',
    ] and log.step.tolist() == list(range(1, 51))
    assert (
        ((log.wait >= 0) & (log.wait <= 1)).all()
        and (log.images_per_second > 0).all()
        and log.epoch.iloc[-1] == 10
    )
    done = json.loads((folder / 'done.json').read_text())
    assert (
        done['steps'] == 50
        and done['images_per_second'] == pytest.approx(50 * 8 / done['seconds'])
        and done['broken'] == 0
    )
    assert read_config(folder) == RECIPE and load_result(folder, other := Small(1)) == done
    assert all(v.equal(trained.task.state_dict()[k]) for k, v in other.state_dict().items())


def test_tensorboard_has_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Small(), images(), make_batch, RECIPE, tmp_path, device='cpu')
    board = EventAccumulator(str(tmp_path / 'tb')).Reload()
    assert set(board.Tags()['scalars']) == {'loss', 'spread', 'grad_norm', 'lr', 'images_per_second', 'wait'}
    assert [e.step for e in board.Scalars('loss')] == list(range(1, 51))


def test_progress_lines(monkeypatch, capsys):
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'lines')
    train(Small(), images(), make_batch, RECIPE, device='cpu', log_seconds=0)
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 50
        and lines[19].startswith('small · step 20/50 · 40 % · loss ')
        and lines[19].endswith(' left')
    )
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'none')
    train(Small(), images(), make_batch, RECIPE, device='cpu', log_seconds=0)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(recipe=RECIPE.but(batch=64)), '42 images do not fill one batch of 64'),
        (dict(accumulate=3), 'cannot be cut into 3 slices'),
        (dict(device='cuda0'), 'unknown device "cuda0"'),
        (dict(precision='fp16'), 'fp16 needs a GPU'),
    ],
)
def test_what_a_person_can_get_wrong(change, said):
    asked = dict(task=Small(), images=images(), make_batch=make_batch, recipe=RECIPE, device='cpu') | change
    with pytest.raises(StudyError, match=said) as e:
        train(**asked)
    assert '\n' not in str(e.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(StudyError, match='cannot be written'):
        train(Small(), images(), make_batch, RECIPE, tmp_path / 'file' / 'run', device='cpu')


def test_a_broken_image_is_counted():
    broken = images()
    broken.broken = 3
    assert train(Small(), broken, make_batch, RECIPE.but(epochs=1), device='cpu').broken == 3


# -- more than one process, compile, GPUs ---------------------------------------------------------------------------

PROCESSES = '''
import sys, torch, small_training as s
from torch import distributed
torch.set_num_threads(1)
class Plain(s.Small):
    def __init__(self): super().__init__(); self.norm = torch.nn.Identity(); self.drop = torch.nn.Identity(); self.branch[2] = torch.nn.Identity()
def calm(x, labels, generator): return s.Batch([x.float()/255], torch.arange(16).expand(len(x), 16) < 4, labels)
trained = s.train(Plain(), s.images(), calm, s.RECIPE, sys.argv[1] if len(sys.argv) > 1 else None, seed=3, device='cpu')
assert trained.steps == 50 and trained.history.shape[0] in (0, 50)
if distributed.is_initialized(): distributed.destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    "Two processes share each batch; without anything random the curve is that of one process."
    (tmp_path / 'run.py').write_text(PROCESSES)
    env = os.environ | dict(
        PYTHONPATH=os.path.dirname(small_training.__file__), OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'
    )
    two = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node=2',
        str(tmp_path / 'run.py'),
        str(tmp_path / 'two'),
    ]
    one = [sys.executable, str(tmp_path / 'run.py'), str(tmp_path / 'one')]
    for command in (one, two):
        subprocess.run(command, env=env, check=True, timeout=300)
    ours, theirs = (pd.read_csv(tmp_path / name / 'log.csv') for name in ('two', 'one'))
    assert ours.step.tolist() == theirs.step.tolist() and is_finished(tmp_path / 'two')
    assert_close(torch.tensor(ours.loss.values), torch.tensor(theirs.loss.values), 1e-4)


@pytest.mark.slow
def test_compiled():
    plain, fused = (
        train(Small(), images(), make_batch, RECIPE.but(epochs=2), device='cpu', compile=compile)
        for compile in (False, True)
    )
    assert (
        fused.history.loss[0] == pytest.approx(plain.history.loss[0], rel=0.2)
        and fused.task.state_dict().keys() == plain.task.state_dict().keys()
    )


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16'])
def test_on_a_gpu(tmp_path, precision):
    "The same images, masks and noise as on the CPU; a resume that is as good; memory that is counted."
    calm = Small()
    calm.drop, calm.branch[2] = nn.Identity(), nn.Identity()
    cpu = Small()
    cpu.drop, cpu.branch[2] = nn.Identity(), nn.Identity()
    there = train(
        calm, images().to('cuda'), make_batch, RECIPE, tmp_path, seed=3, device='cuda', precision=precision
    )
    here = train(cpu, images(), make_batch, RECIPE, seed=3, device='cpu')
    assert (
        there.history.loss[0] == pytest.approx(here.history.loss[0], rel=1e-4 if precision == 'no' else 3e-2)
        and there.peak_memory > 0
    )
    assert (
        train(
            Small(),
            images().to('cuda'),
            make_batch,
            RECIPE,
            tmp_path,
            seed=3,
            device='cuda',
            precision=precision,
        ).resumed_from
        == 50
    )

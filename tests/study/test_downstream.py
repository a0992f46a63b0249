"What is trained on top of an encoder: crops with their maps, SGD by stairs, fine-tuning, segmentation, and the way from a table to a record."

import os

import pytest
import torch
from conftest import assert_close
from small_training import RECIPE, make_batch, images
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import CLASSES, REGIONS, scenes
from mimstudy.core.task import Batch, Task
from mimstudy.engine.optimiser import build_optimiser
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.schedules import learning_rate
from mimstudy.engine.train import train
from mimstudy.evaluate.finetune import FineTune, top1
from mimstudy.evaluate.segmentation import Segmenter, confusion_matrix, mean_iou, segmentation_scores
from mimstudy.evaluate.upernet import UperNet
from mimstudy.parts.encoder import Encoder, block_features
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.finetuning import prepare_finetuning
from mimstudy.parts.views import crop_images_and_maps, crop_label_maps, sample_crops, normalise, resize_only
from mimstudy.study.build import build_encoder
from mimstudy.cli.commands import app
from mimstudy.study.downstream import build_downstream, downstream, downstream_batch_function
from mimstudy.report.statistics import table_records
from mimstudy.study.row import Pretrained, measure, configs_of
from mimstudy.papers.pretraining import recipe
from mimstudy.report.tables import measured, render
from mimstudy.study.records import RecordStore, record
from mimstudy.study.scheduler import check_parameters, plan
from mimstudy.papers.tables import TABLES, experiment
from mimstudy.papers.downstream import TRANSFERS, transfer, transfer_at

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the children: many threads on busy cores are slow
WORLD = scenes(24, size=32, seed=3)
X = normalise(resize_only(WORLD.images, 32))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(kind=Encoder, **options):
    torch.manual_seed(0)
    made = kind(**dict(size=32, patch=8, width=32, depth=3, heads=4, drop_path=0.3) | options)
    if kind is RelativeEncoder:
        nn.init.normal_(made.rel_pos_bias.relative_position_bias_table)
    return made


KINDS = pytest.mark.parametrize('kind', [Encoder, RelativeEncoder])


# -- crops with their maps --------------------------------------------------------------------------------------------


def test_a_map_is_cut_pixel_by_pixel():
    "Slow twin: for each new pixel, the old one that its centre lies in."
    boxes, flip = sample_crops(WORLD.images, (0.2, 0.9), (3 / 4, 4 / 3), 0.5, seeded(1))
    for size in (9, 32, 50):
        fast, slow = crop_label_maps(WORLD.maps, boxes, flip, size), torch.empty(24, size, size, dtype=torch.uint8)
        for b, ((top, left, height, width), mirror) in enumerate(zip(boxes.tolist(), flip.tolist())):
            for i in range(size):
                for j in range(size):
                    across = size - 1 - j if mirror else j
                    slow[b, i, j] = WORLD.maps[
                        b, top + int((i + 0.5) * height / size), left + int((across + 0.5) * width / size)
                    ]
        assert fast.equal(slow)


def test_image_and_map_go_together():
    "Images that are painted from their maps: each pixel of a crop has the colour of its label, but for the rims, which are mixed."
    maps = (
        (torch.arange(32)[:, None] // 8 + torch.arange(32)[None] // 8 % 2 * 10)
        .expand(6, 32, 32)
        .to(torch.uint8)
    )
    painted = (maps[:, None] * 12).expand(-1, 3, -1, -1)
    x, cut = crop_images_and_maps(painted, maps, 32, (0.5, 1.0), generator=seeded(2))
    assert ((x[:, 0] * 255 / 12 - cut).abs() < 0.2).float().mean() > 0.6 and (
        x[:, 0] * 255 / 12 - cut
    ).abs().median() < 0.01


# -- SGD, stairs and lines ----------------------------------------------------------------------------------------------


class Slope(Task):
    "One weight that slides down a line of slope 1."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch, progress):
        return {'loss': self.weight.sum()}


def test_sgd_with_momentum_on_stairs_has_a_closed_form():
    r = RECIPE.but(
        optimiser='sgd',
        schedule='steps',
        stair=4.0,
        lr=0.1,
        min_lr=0.0,
        warmup=0.0,
        weight_decay=0.0,
        clip=None,
    )
    slid, steps = (
        train(Slope(), images(), make_batch, r, device='cpu').task.weight.item(),
        r.epochs * (42 // 8),
    )
    rates = [0.1 * 0.1 ** (step // 20) for step in range(steps)]
    assert slid == pytest.approx(
        -sum(rate * (1 - 0.9 ** (step + 1)) / 0.1 for step, rate in enumerate(rates)), rel=1e-5
    )


def test_lines_and_stairs():
    r = RECIPE.but(epochs=10, warmup=2.0, lr=1.0, min_lr=0.2)
    line, cosine = (
        [learning_rate(r.but(schedule=s), step, 10) for step in range(100)] for s in ('linear', 'cosine')
    )
    assert (
        line[:20] == cosine[:20]
        and line[20] == 1.0
        and line[60] == pytest.approx(0.6)
        and line[99] == pytest.approx(0.21)
    )
    assert [
        learning_rate(r.but(schedule='steps', stair=3.0, warmup=0.0), step, 10) for step in (29, 30, 60, 99)
    ] == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_adamw_is_the_default():
    t = Slope()
    assert (
        type(build_optimiser(t, RECIPE)).__name__ == 'AdamW'
        and type(build_optimiser(t, RECIPE.but(optimiser='sgd'))).__name__ == 'SGD'
    )


# -- the copy ---------------------------------------------------------------------------------------------------------


@KINDS
def test_the_copy_computes_what_the_encoder_did(kind):
    a = encoder(kind).eval()
    b = prepare_finetuning(a)
    for (p, q), (r, s) in zip(block_features(a, X), block_features(b, X)):
        assert p.equal(r) and q.equal(s)
    state = {k: v.clone() for k, v in a.state_dict().items()}
    with torch.no_grad():
        [p.add_(1.0) for p in b.parameters()]
    assert all(v.equal(state[k]) for k, v in a.state_dict().items()), 'the original has moved'


@KINDS
def test_a_larger_image_keeps_its_places(kind):
    "The middle of a image looks alike at twice the size: positions are stretched with the grid."
    a = encoder(kind).eval()
    b = prepare_finetuning(a, size=64)
    small, large = (
        block_features(e, normalise(resize_only(WORLD.images, s)))[0][1].transpose(1, 2).unflatten(2, e.grid)
        for e, s in ((a, 32), (b, 64))
    )
    near = F.cosine_similarity(F.interpolate(large, (4, 4), mode='area').flatten(1), small.flatten(1)).mean()
    far = F.cosine_similarity(
        F.interpolate(large, (4, 4), mode='area').flatten(1).roll(1, 0), small.flatten(1)
    ).mean()
    assert near > far + 0.1


# -- fine-tuning ------------------------------------------------------------------------------------------------------


@KINDS
def test_every_weight_is_tuned(kind):
    "After a step everything has moved that the head's token depends on, and a patch reader does not ask for more."
    task = FineTune(
        prepare_finetuning(encoder(kind, drop_path=0.0)), len(CLASSES), mixup=0, cutmix=0, smoothing=0.0
    ).train()
    with torch.no_grad():
        task.head.weight.mul_(1000)
    task(Batch([X], label=WORLD.label), 0.0)['loss'].backward()
    assert not [
        n
        for n, p in task.named_parameters()
        if p.grad is None or p.requires_grad and n != 'encoder.mask_token' and p.grad.abs().sum() == 0
    ]


def test_the_score_is_a_share():
    task = FineTune(prepare_finetuning(encoder()), 3, mixup=0, cutmix=0).train()
    images = InMemoryDataset(WORLD.images, torch.arange(24) % 3, list('abc'))
    with torch.no_grad():
        task.head.weight.zero_()
        task.head.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    assert top1(task, images, 'cpu') == pytest.approx(100 / 3) and task.training


# -- segmentation ------------------------------------------------------------------------------------------------------


def test_the_frozen_encoder_stays_as_it_is():
    task, state = Segmenter(prepare_finetuning(encoder()), len(REGIONS), output_size=16), encoder().state_dict()
    assert not task.train().encoder.training
    task(Batch([X], label=WORLD.maps), 0.0)['loss'].backward()
    assert all(p.grad is None for p in task.encoder.parameters()) and all(
        p.grad is not None for p in task.heads.parameters()
    )
    assert all(v.equal(state[k]) for k, v in task.encoder.state_dict().items() if k in state)
    assert task.maps(X)[1].equal(
        task.maps(X)[1]
    )  # stochastic depth is off, whatever the recipe of the pre-training was


def test_scores_of_a_set_are_those_of_all_its_pixels():
    torch.manual_seed(0)
    task, val = (
        Segmenter(prepare_finetuning(encoder()), len(REGIONS)),
        InMemoryDataset(WORLD.images, WORLD.maps, list(REGIONS)),
    )
    for head in task.heads:
        nn.init.normal_(head.weight)
    slow = [mean_iou(confusion_matrix(a, WORLD.maps.long(), len(REGIONS))) for a in task.eval().predict(X, 32)]
    assert (
        segmentation_scores(task, val, 'cpu', batch=7) == pytest.approx(slow)
        and len(slow) == 3
        and len(set(slow)) > 1
    )


def test_undecided_pixels_teach_nothing():
    "The loss is that of the decided pixels alone."
    maps = WORLD.maps.clone()
    maps[:, :16] = 255
    task = UperNet(prepare_finetuning(encoder(width=48)), len(REGIONS), 16, auxiliary=0.0).eval()
    wanted = F.cross_entropy(task.logits(task.maps(X), 32)[:, :, 16:], WORLD.maps[:, 16:].long())
    assert_close(task(Batch([X], label=maps), 0.0)['loss'], wanted)
    heads = Segmenter(prepare_finetuning(encoder()), len(REGIONS), output_size=32)
    wanted = sum(
        F.cross_entropy(F.interpolate(h(m), (32, 32), mode='bilinear')[:, :, 16:], WORLD.maps[:, 16:].long())
        for h, m in zip(heads.heads, heads.maps(X))
    )
    assert_close(heads(Batch([X], label=maps), 0.0)['loss'], wanted)


@KINDS
def test_upernet_learns_and_uses_everything(kind):
    torch.manual_seed(0)
    task, losses = (
        UperNet(prepare_finetuning(encoder(kind, drop_path=0.0, init='xavier')), len(REGIONS), 16),
        [],
    )
    walk = torch.optim.AdamW(task.parameters(), 3e-3)
    for _ in range(12):
        loss = task(Batch([X], label=WORLD.maps), 0.0)['loss']
        walk.zero_grad()
        loss.backward()
        walk.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and not [n for n, p in task.named_parameters() if p.grad is None]
    assert task.eval().predict(X, 20)[0].shape == (24, 20, 20)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TRANSFERS)
@pytest.mark.parametrize('base', ['conmim_b16_300', 'semanticmim_maskfeat', 'mae'])
def test_every_transfer_takes_every_encoder(name, base):
    r = transfer_at(transfer(name), recipe(base).at('smoke'), 'smoke')
    task = build_downstream(r, build_encoder(recipe(base).at('smoke')), 12).train()
    label = WORLD.label if r.method == 'finetune' else WORLD.maps.clamp(max=11)
    batch = downstream_batch_function(r, InMemoryDataset(WORLD.images, label, CLASSES))(
        WORLD.images, label, seeded()
    )
    out = task(batch, 0.0)
    out['loss'].backward()
    assert torch.isfinite(out['loss']) and any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters()
    )


def test_at_paper_scale_only_the_encoder_is_put_in():
    for name, r in TRANSFERS.items():
        ours = transfer_at(r, recipe('semanticmim_beit'), 'paper')
        assert (ours.prefix, ours.epochs, ours.lr, ours.batch, ours.data, ours.size) == (
            8,
            r.epochs,
            r.lr,
            r.batch,
            r.data,
            r.size,
        ), name


# -- from a table to a record -------------------------------------------------------------------------------------------


def test_a_row_is_measured_by_what_is_asked_for():
    assert experiment('semanticmim-t1/beit', 'smoke').protocols == ('linear',)
    asked = check_parameters(
        dict(
            experiment='semanticmim-t1/beit',
            scale='smoke',
            data='',
            seed=0,
            out='',
            protocols='voc linear voc',
        )
    )
    assert asked.protocols == ('voc', 'linear') and asked.id == experiment('semanticmim-t1/beit', 'smoke').id
    assert [r.data for r in configs_of(asked)] == ['scenes'] * 2
    assert [
        r.data
        for r in configs_of(
            experiment('semanticmim-t1/beit', 'paper', 'imagenette', protocols=('voc', 'finetune'))
        )
    ] == ['imagenette', 'voc', 'imagenette']
    conmim = experiment('conmim-t8/tau=0.1', 'smoke', protocols=('finetune', 'finetune-release'))
    assert [r.views for r in configs_of(conmim)[1:]] == ['rand+jitter', 'rand']
    rows = [
        experiment(f'semanticmim-t1/{row}', 'paper').transfer('finetune-release')
        for row in ('beit+semanticmim', 'maskfeat+semanticmim')
    ]
    assert [(r.lr, r.batch, r.options.get('statistics')) for r in rows] == [
        (4e-3, 1024, 'inception'),
        (8e-3, 2048, None),
    ]


def test_a_record_of_another_recipe_is_not_the_one_asked_for(monkeypatch, tmp_path):
    "When a transfer's recipe changes, its records are stale, like those of a pre-training."
    e, table, results = (
        experiment('semanticmim-t1/random', 'smoke', protocols=('voc',)),
        TABLES['semanticmim-t1'],
        RecordStore(tmp_path),
    )
    results.add(record(e, 'voc', {'voc/best/patch': 12.0}, n_val=1024))
    assert results.done(e) and table_records(table, results, 'smoke').stale == 0
    monkeypatch.setitem(TRANSFERS, 'semanticmim_voc', transfer('semanticmim_voc').but(weight_decay=0.5))
    assert not results.done(e) and table_records(table, results, 'smoke').stale == 1


def test_pixels_are_passed_over(tmp_path):
    steps = plan('semanticmim-t1', scale='smoke', results=RecordStore(tmp_path), protocols=('finetune',))
    assert 'pixels' not in {s.experiment.row for s in steps} and len(steps) == 5


@pytest.mark.parametrize(
    'words, said',
    [
        ('--protocols finetoon', 'did you mean finetune'),
        ('--protocols knn', 'unknown protocol of semanticmim-t1 "knn"'),
        ('--protocols', '--protocols needs one value or more'),
        ('--rows pixels --protocols voc', 'pixels have no encoder'),
    ],
)
def test_a_mistake_is_one_line(words, said, tmp_path):
    done = CliRunner().invoke(
        app, ['run', 'semanticmim-t1', '--dry-run', '--results', str(tmp_path), *words.split()]
    )
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count('\n') == 1


def test_a_set_of_maps_that_is_not_here_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_IMAGENET', str(tmp_path))
    monkeypatch.setenv('MIMSTUDY_DATA_VOC', str(tmp_path / 'nowhere'))
    done = CliRunner().invoke(
        app,
        [
            'run',
            'semanticmim-t1',
            '--rows',
            'beit',
            '--scale',
            'paper',
            '--protocols',
            'voc',
            '--results',
            str(tmp_path / 'out'),
        ],
    )
    assert done.exit_code == 2 and 'MIMSTUDY_DATA_VOC' in done.stderr and 'Traceback' not in done.output


def test_records_and_the_page(tmp_path):
    "A random encoder, measured by a frozen probe and by two trainings; the page shows what was run and only that."
    results, asked = (
        RecordStore(tmp_path),
        experiment('semanticmim-t1/random', 'smoke', protocols=('linear', 'voc', 'finetune')),
    )
    table, column = TABLES['semanticmim-t1'], {c.name: c for c in TABLES['semanticmim-t1'].columns}
    records = measure(asked, Pretrained(build_encoder(asked.recipe, 0).eval()), results)
    assert [r['protocol'] for r in records] == ['linear', 'voc', 'finetune'] and results.done(asked)
    voc, tuned = records[1:]
    assert set(tuned['scores']) == {'finetune/last/prefix', 'finetune/last/patch'} and {
        'voc/1/patch',
        'voc/best/patch',
        'voc/best/patch/block',
    } < set(voc['scores'])
    assert (
        voc['evaluation']['optimiser'] == 'sgd'
        and voc['n_val'] == 1024
        and voc['evaluation']['n_train'] == 256
        and 'width' not in tuned['evaluation']
    )
    shown = table_records(table, results, 'smoke')
    assert [c.name for c in measured(table, shown)] == [
        'linear_cls',
        'linear_patch',
        'ft_cls',
        'ft_patch',
        'voc',
    ]
    assert shown.score(table.row('random'), column['ft_patch']).mean == tuned['scores']['finetune/last/patch']
    page = render(table, results, 'smoke')
    assert '--protocols ade20k' in page and f'{voc["scores"]["voc/best/patch"]:.1f} ±' in page


@pytest.mark.slow
def test_a_pretrained_encoder_is_tuned_through_papermill(tmp_path):
    words = ['run', 'semanticmim-t1', '--rows', 'maskfeat', '--scale', 'smoke', '--results', str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    done = CliRunner().invoke(app, [*words, '--protocols', 'finetune', 'voc', 'ade20k'])
    assert done.exit_code == 0, done.stderr
    assert {r['protocol'] for r in RecordStore(tmp_path).find()} == {'linear', 'finetune', 'voc', 'ade20k'}
    assert len(list(tmp_path.glob('runs/*/row.ipynb'))) == 2, 'the page of the pre-training has been kept'


def test_a_transfer_goes_on_where_it_was_stopped(tmp_path):
    "Half of the epochs' folder is opened by the whole training of the same recipe only; a finished one is not trained again."
    r = transfer_at(transfer('semanticmim_voc'), recipe('maskfeat').at('smoke'), 'smoke')
    sets = (
        InMemoryDataset(WORLD.images.repeat(2, 1, 1, 1), WORLD.maps.repeat(2, 1, 1), list(REGIONS)),
        InMemoryDataset(WORLD.images, WORLD.maps, list(REGIONS)),
    )
    first = downstream('voc', r, build_encoder(r), tmp_path, sets=sets)
    again = downstream('voc', r, build_encoder(r), tmp_path, sets=sets)
    assert again.scores == first.scores and again.seconds == pytest.approx(
        first.seconds, abs=0.5
    )  # of all sessions
    with pytest.raises(StudyError, match='another encoder'):
        downstream('voc', r, build_encoder(r, seed=1), tmp_path, sets=sets)
    with pytest.raises(StudyError):
        downstream('voc', r.but(lr=0.5), build_encoder(r), tmp_path, sets=sets)


def test_other_classes_are_told(tmp_path):
    r, some = (
        transfer_at(transfer('semanticmim_finetune'), recipe('maskfeat').at('smoke'), 'smoke'),
        torch.arange(24) % 4,
    )
    for names in ('abc', 'abce'):
        sets = (
            InMemoryDataset(WORLD.images, some, list('abcd')),
            InMemoryDataset(WORLD.images, some % 3, list(names)),
        )
        with pytest.raises(StudyError, match='other classes'):
            downstream('finetune', r, build_encoder(r), sets=sets)


def test_a_run_notebook_is_told_that_pixels_have_no_encoder():
    with pytest.raises(StudyError, match='no encoder'):
        check_parameters(
            dict(
                experiment='semanticmim-t1/pixels',
                scale='smoke',
                data='',
                seed=0,
                out='',
                protocols='finetune',
            )
        )


def test_the_relative_encoder_keeps_a_table_for_each_block():
    tuned = prepare_finetuning(encoder(RelativeEncoder))
    tables = [p for n, p in tuned.named_parameters() if n.endswith('relative_position_bias_table')]
    assert len(tables) == 3 and all(t.equal(tables[0]) for t in tables)
    assert_close(prepare_finetuning(tuned).eval()(X), tuned.eval()(X))

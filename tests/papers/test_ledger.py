"Every difference between paper and release has a switch with the default of the paper, and an effect."

from dataclasses import replace

import pytest
import torch
from small_encoder import SCENES, seeded

from mimstudy.core.scenes import CLASSES
from mimstudy.core.task import Batch, Task
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.optimiser import build_optimiser
from mimstudy.engine.schedules import learning_rate
from mimstudy.engine.train import train
from mimstudy.engine.training_config import DownstreamConfig, value_paths
from mimstudy.evaluate.features import extract_features
from mimstudy.evaluate.segmentation import mean_iou
from mimstudy.papers.downstream import DOWNSTREAM
from mimstudy.papers.ledger import LEDGER, apply_switch, default_value, ledger
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.scales import at_scale, scale_downstream
from mimstudy.papers.tables import SEMANTICMIM_T1
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import random_mask
from mimstudy.parts.pathways import MaskPixels, Substitute
from mimstudy.parts.proxy import Proxy
from mimstudy.study.build import (
    build_batch_function,
    build_encoder,
    build_mask,
    build_task,
    evaluated_encoder,
)
from mimstudy.study.downstream import build_downstream, downstream_batch_function

IMAGES = InMemoryDataset(SCENES.images, SCENES.label, CLASSES)
STEPS_PER_EPOCH = 625  # of ImageNet at a batch of 2048
EFFECTS = {}  # 'ConMIM 1' -> check(paper's configuration, other configuration), or check() for measurements


def effect(name):
    "Register the check of a point of the ledger."

    def register(check):
        EFFECTS[name] = check
        return check

    return register


def task_of(config):
    return build_task(at_scale(config, 'smoke'), IMAGES)


def batch_of(config):
    return build_batch_function(at_scale(config, 'smoke'))(SCENES.images[:8], SCENES.label[:8], seeded())


def hidden(config):
    "Number of hidden patches of one image at paper scale."
    return int(build_mask(config, 1, seeded()).hidden.sum())


def decayed(config):
    "Names of the parameters with weight decay."
    task = task_of(config)
    groups = build_optimiser(task, config.optim).param_groups
    ids = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    return {name for name, p in task.named_parameters() if id(p) in ids}


def downstream_of(config):
    "The task of a downstream training on a small encoder, and the groups of its optimiser."
    base = at_scale(pretraining('semanticmim_beit'), 'smoke')
    task = build_downstream(scale_downstream(config, base, 'smoke'), build_encoder(base), 4)
    return task, build_optimiser(task, config.optim).param_groups


def layer_rates(config):
    "Learning rates of the groups, relative to the last layer."
    _, groups = downstream_of(config)
    return {group.get('lr_scale', 1.0) for group in groups}


def differing(a, b):
    "Paths of the values in which two configurations differ."
    before, after = value_paths(a), value_paths(b)
    return {path for path in before | after if before.get(path) != after.get(path)}


def features(**options):
    torch.manual_seed(0)
    encoder = Encoder(size=32, patch=8, width=32, depth=2, heads=2, drop_path=0.5).eval()
    return extract_features(encoder, IMAGES, 'cpu', **options).table[2, 'patch']


def column(name):
    return next(c for c in SEMANTICMIM_T1.columns if c.name == name)


# -- ConMIM -----------------------------------------------------------------------------------------


@effect('ConMIM 1')
def evaluated_network(a, b):
    ours, other = task_of(a), task_of(b)
    assert evaluated_encoder(a, ours) is ours.encoder
    assert evaluated_encoder(b, other) is other.teacher_encoder is not other.encoder


@effect('ConMIM 2')
def mode_of_the_teacher(a, b):
    modes = [task_of(config).train().teacher_encoder.training for config in (a, b)]
    assert modes == [True, False]


@effect('ConMIM 3')
def projector(a, b):
    weights = [sum(p.numel() for p in task_of(config).head.parameters()) for config in (a, b)]
    assert weights[0] > 0 == weights[1]


@effect('ConMIM 4')
def strong_view(a, b):
    ours, other = batch_of(a).views, batch_of(b).views
    assert ours[0].equal(other[0]) and not ours[1].equal(other[1])


@effect('ConMIM 5')
def side_of_a_mask_unit(a, b):
    assert [hidden(a), hidden(b)] == [147, 148]


@effect('ConMIM 6')
def what_is_masked(a, b):
    assert type(task_of(a).pathway) is Substitute and type(task_of(b).pathway) is MaskPixels


@effect('ConMIM 7')
def position_embedding(a, b):
    assert task_of(a).encoder.pos_embed is None and task_of(b).encoder.pos_embed is not None


class SteepTask(Task):
    "One weight with a gradient far above every clip."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))

    def forward(self, batch, progress):
        return {'loss': 1e3 * ((self.weight - 1) ** 2).sum() * (1 + progress)}


@effect('ConMIM 8')
def gradient_clipping(a, b):
    weights = []
    for config in (a, b):
        optim = config.optim.but(batch=8, epochs=2, warmup=0, optimiser='sgd')
        short = DownstreamConfig(optim=optim)
        result = train(SteepTask(), IMAGES, lambda x, y, g: Batch([x], label=y), short, device='cpu')
        weights.append(result.task.weight)
    assert not weights[0].equal(weights[1])


@effect('ConMIM 9')
def warm_up(a, b):
    step = 5 * STEPS_PER_EPOCH
    rates = [learning_rate(config.optim, step, STEPS_PER_EPOCH) for config in (a, b)]
    assert rates[0] < rates[1] == b.optim.lr


@effect('ConMIM 10')
def peak_learning_rate(a, b):
    step = 10 * STEPS_PER_EPOCH
    assert [learning_rate(config.optim, step, STEPS_PER_EPOCH) for config in (a, b)] == [5e-4, 7.5e-4]


@effect('ConMIM 11')
def parameters_without_decay(a, b):
    only_here = decayed(a) - decayed(b)
    table = 'pathway.encoder.rel_pos_bias.relative_position_bias_table'
    assert only_here == {'pathway.mask_token', table}


@effect('ConMIM 12')
def statistics_of_the_probe():
    assert not features(statistics='imagenet').equal(features(statistics='inception'))


@effect('ConMIM 13')
def momentum(a, b):
    "How far the teacher moves in one update, as a share of the student's step of 1."
    moved = []
    for config in (a, b):
        task = task_of(config)
        student, teacher = (e.blocks[0].mlp.fc1.weight for e in (task.encoder, task.teacher_encoder))
        before = teacher.clone()
        with torch.no_grad():
            student.add_(1.0)
        task.after_step(0.0)
        moved.append((teacher - before).mean().item())
    scaled = at_scale(a, 'smoke').options['momentum']
    assert moved == pytest.approx([1 - scaled, 1.0], abs=1e-5)


@effect('ConMIM 14')
def block_masks(a, b):
    random, block = (build_mask(config, 50, seeded()) for config in (a, b))
    assert random.weight is None and block.hidden.sum(1).float().std() > 0


@effect('ConMIM 15')
def jitter_in_fine_tuning(a, b):
    "Standard deviation of the mean colours of a batch of grey images."
    assert differing(a, b) == {'data.views'}
    grey = torch.full((64, 3, 32, 32), 120, dtype=torch.uint8)
    base = at_scale(pretraining('conmim_b16_300'), 'smoke')
    spread = []
    for config in (a, b):
        small = scale_downstream(config, base, 'smoke').but(data=dict(crop=(1.0, 1.0), flip=0.0))
        batch = downstream_batch_function(small, IMAGES)(grey, torch.zeros(64).long(), seeded())
        spread.append(batch.views[0].mean((2, 3)).std(0).mean().item())
    assert spread[0] > 1.3 * spread[1] > 0


# -- SemanticMIM ------------------------------------------------------------------------------------


@effect('SemanticMIM 1')
def number_of_proxies(a, b):
    assert (task_of(a).encoder.P, task_of(b).encoder.P) == (8, 1)


@effect('SemanticMIM 2')
def mask_ratio(a, b):
    assert [hidden(a), hidden(b)] == [118, 157]


@effect('SemanticMIM 3')
def block_of_the_linear_probe():
    ours = column('linear_cls')
    keys = [replace(ours, block=block).key('paper', 'trained') for block in (ours.block, 12)]
    assert keys == ['linear/7/prefix', 'linear/12/prefix']


@effect('SemanticMIM 4')
def block_of_the_voc_probe():
    ours = column('voc')
    keys = [replace(ours, block=block).key('paper', 'trained') for block in (ours.block, 8)]
    assert keys == ['voc/6/patch', 'voc/8/patch']


@effect('SemanticMIM 5')
def frozen_blocks():
    assert features(frozen='eval').equal(features(frozen='eval'))
    assert not features(frozen='train').equal(features(frozen='eval'))


@effect('SemanticMIM 6')
def stochastic_depth(a, b):
    branches = [build_encoder(at_scale(config, 'smoke')).blocks[-1].drop_path2 for config in (a, b)]
    assert [len(list(branch.modules())) for branch in branches] == [1, 3]


@effect('SemanticMIM 7')
def values_of_fine_tuning(a, b):
    optim = {f'optim.{name}' for name in ('warmup', 'min_lr', 'weight_decay', 'layer_decay')}
    assert differing(a, b) == optim | {'options', 'data.views'}
    assert downstream_of(a)[0].mixup is None and downstream_of(b)[0].mixup is not None
    assert layer_rates(a) == {1.0} < layer_rates(b)


@effect('SemanticMIM 8')
def statistics_after_pretraining():
    assert not features(statistics='imagenet').equal(features(statistics='inception'))


@effect('SemanticMIM 9')
def training_of_the_voc_probe(a, b):
    assert differing(a, b) == {'optim.lr', 'optim.weight_decay', 'options'}
    assert (a.optim.lr, b.optim.lr) == (0.01, 0.02)
    decay = [max(group['weight_decay'] for group in downstream_of(config)[1]) for config in (a, b)]
    assert decay == [0.0, 1e-4]


@effect('SemanticMIM 10')
def absent_classes(a, b):
    "With two of four classes absent and all pixels correct, the release's mean IoU is one half."
    perfect = torch.diag(torch.tensor([5, 7, 0, 0]))
    ours, other = (downstream_of(config)[0].absent for config in (a, b))
    assert (mean_iou(perfect, ours), mean_iou(perfect, other)) == (100, 50)


@effect('SemanticMIM 13')
def layer_scale(a, b):
    names = [' '.join(task_of(config).state_dict()) for config in (a, b)]
    assert 'ls1.gamma' in names[0] and 'ls1.gamma' not in names[1]


@effect('SemanticMIM 14')
def initial_weights(a, b):
    spread = []
    for config in (a, b):
        small = config.but(encoder=dict(width=192, heads=3, depth=1))
        spread.append(build_encoder(small).blocks[0].mlp.fc1.weight.std())
    assert spread[0] > 2 * spread[1]


@effect('SemanticMIM 15')
def two_columns():
    measures = {c.measure for c in SEMANTICMIM_T1.columns}
    assert {'linear/best/prefix', 'linear/best/patch'} < measures


@effect('SemanticMIM 16')
def parameters_without_decay_in_the_releases(a, b):
    assert 'pathway.encoder.cls_token' in decayed(b) - decayed(a)
    assert 'pathway.mask_token' in decayed(a) - decayed(b)


@effect('SemanticMIM 17')
def window_of_hog(a, b):
    ours, other = (task_of(config).target(batch_of(config)) for config in (a, b))
    assert not ours.equal(other)


@effect('SemanticMIM 18')
def values_for_ade20k(a, b):
    names = {f'optim.{name}' for name in ('batch', 'epochs', 'warmup', 'layer_decay')}
    assert differing(a, b) == names
    assert (a.optim.batch, b.optim.batch, b.optim.layer_decay) == (16, 8, 0.9)
    assert min(layer_rates(a)) == 1.0 > min(layer_rates(b))


# -- the ledger -------------------------------------------------------------------------------------


def test_every_point_has_a_line_and_a_switch_or_a_reason():
    assert len({point.name for point in LEDGER}) == len(LEDGER)
    for point in LEDGER:
        assert f'| {point.name} | {point.rank} |' in ledger()
        assert point.switch or point.note


def test_every_switch_has_a_check():
    assert set(EFFECTS) == {point.name for point in LEDGER if point.switch}


@pytest.mark.parametrize('point', [p for p in LEDGER if p.switch], ids=lambda point: point.name)
def test_a_switch_has_an_effect(point):
    measurement = point.switch.startswith(('extract_features.', 'Column.'))
    if measurement:
        EFFECTS[point.name]()
        return
    ours, other = (apply_switch(point, value) for value in point.values)
    assert ours.key() != other.key()
    if point.switch != 'options.pathway':
        assert default_value(point) == point.values[0]
    EFFECTS[point.name](ours, other)


def test_position_embeddings_of_proxies_are_part_of_the_proxies():
    """SemanticMIM 12: adding the embedding of each proxy to the proxy, and setting it to zero, changes
    nothing."""
    torch.manual_seed(0)
    path = Proxy(Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=4)).eval()
    x, mask = torch.randn(2, 3, 32, 32), random_mask(2, (4, 4), 0.5, seeded())
    with torch.no_grad():
        before = path(x, mask)
        encoder = path.encoder
        encoder.cls_token += encoder.pos_embed[:, :1]
        encoder.reg_token += encoder.pos_embed[:, 1:4]
        encoder.pos_embed[:, :4] = 0
        assert path(x, mask).equal(before)


def test_configurations_named_by_switches_exist():
    for point in LEDGER:
        if point.switch == 'configuration':
            assert set(point.values) <= set(DOWNSTREAM)

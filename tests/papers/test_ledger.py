"Every point where paper and release disagree: its switch exists, stands at the default, and changes what it says."

from dataclasses import replace

import pytest
import torch
from small_training import RECIPE, Small, make_batch, images

from mimstudy.core.scenes import scenes
from mimstudy.engine.optimiser import build_optimiser
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.config import VALUES
from mimstudy.engine.schedules import learning_rate
from mimstudy.engine.train import train
from mimstudy.evaluate.features import extract_features
from mimstudy.evaluate.segmentation import mean_iou
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.pathways import MaskPixels, Substitute
from mimstudy.parts.proxy import Proxy
from mimstudy.parts.masks import random_mask
from mimstudy.study.build import (
    build_encoder,
    build_batch_function,
    build_mask,
    build_task,
    evaluated_encoder,
)
from mimstudy.study.downstream import build_downstream
from mimstudy.papers.ledger import LEDGER, default, ledger, apply_switch
from mimstudy.papers.tables import SEMANTICMIM_T1

SCENES = scenes(24, size=32, seed=3)
HALF = torch.diag(torch.tensor([5, 7, 0, 0]))  # pixels of two classes of four, all found
SET = InMemoryDataset(SCENES.images, SCENES.label, ['any'] * 12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(recipe):
    return build_task(recipe.at('smoke'), SET)


def batch(recipe):
    return build_batch_function(recipe.at('smoke'))(SCENES.images[:8], SCENES.label[:8], seeded())


def decayed(recipe):
    "Names of the parameters that are decayed."
    t = task(recipe)
    ids = {id(p) for g in build_optimiser(t, recipe).param_groups if g['weight_decay'] for p in g['params']}
    return {n for n, p in t.named_parameters() if id(p) in ids}


def estimate(recipe):
    return build_encoder(recipe.but(width=192, heads=3, depth=1)).blocks[0].mlp.fc1.weight.std()


class Loud(Small):
    "A task whose gradients are far longer than any clip."

    def forward(self, batch, progress):
        return {'loss': 1e3 * super().forward(batch, progress)['loss'] * (1 + progress)}


def clipped(recipe):
    return train(
        Loud(), images(), make_batch, RECIPE.but(clip=recipe.clip, epochs=2), seed=3, device='cpu'
    ).history.loss.tolist()


def followed(recipe):
    "How far the EMA teacher moves in one step."
    t = task(recipe)
    before = t.target.teacher.encoder.blocks[0].mlp.fc1.weight.clone()
    with torch.no_grad():
        t.encoder.blocks[0].mlp.fc1.weight.add_(1.0)
    t.after_step(0.0)
    return (t.target.teacher.encoder.blocks[0].mlp.fc1.weight - before).mean().item()


def probe(**habit):
    torch.manual_seed(0)
    return extract_features(
        Encoder(size=32, patch=8, width=32, depth=2, heads=2, drop_path=0.5).eval(), SET, 'cpu', **habit
    ).table[2, 'patch']


def small(recipe):
    return recipe.but(size=32, patch=8, width=32, depth=2, heads=2, prefix=1, drop_path=0.0, batch=2)


def tuned(recipe):
    "The task of a transfer on a small encoder of its shape, with the groups of its optimiser."
    r = small(recipe)
    t = build_downstream(r, build_encoder(r), 4)
    return t, build_optimiser(t, r).param_groups


def jittered(recipe):
    "How far the mean colour of a image moves, in a batch whose crops are all of it."
    batch = build_batch_function(recipe.at('smoke').but(crop=(1.0, 1.0), flip=0.0))(
        GREY, torch.zeros(64, dtype=torch.long), seeded()
    )
    return batch.views[0].mean((2, 3)).std(0).mean().item()


def same_but(a, b, *names):
    "Whether two recipes differ in exactly these values."
    return {n for n in VALUES if getattr(a, n) != getattr(b, n)} - {'name'} == set(names)


def column(name):
    return next(c for c in SEMANTICMIM_T1.columns if c.name == name)


GREY = torch.full((64, 3, 32, 32), 120, dtype=torch.uint8)

# what a switch changes: (paper's recipe, other recipe) -> truth
EFFECTS = {
    ('ConMIM', 1): lambda a, b: (
        evaluated_encoder(a, t := task(a)) is t.encoder
        and evaluated_encoder(b, t := task(b)) is t.teacher_encoder
    ),
    ('ConMIM', 2): lambda a, b: (
        (task(a).train().target.training, task(b).train().target.training) == (True, False)
    ),
    ('ConMIM', 3): lambda a, b: (
        sum(p.numel() for p in task(a).head.parameters())
        > 0
        == sum(p.numel() for p in task(b).head.parameters())
    ),
    ('ConMIM', 4): lambda a, b: (
        batch(a).views[0].equal(batch(b).views[0]) and not batch(a).views[1].equal(batch(b).views[1])
    ),
    ('ConMIM', 5): lambda a, b: [int(build_mask(r, 1, seeded()).hidden.sum()) for r in (a, b)] == [147, 148],
    ('ConMIM', 6): lambda a, b: type(task(a).pathway) is Substitute and type(task(b).pathway) is MaskPixels,
    ('ConMIM', 7): lambda a, b: task(a).encoder.pos_embed is None and task(b).encoder.pos_embed is not None,
    ('ConMIM', 8): lambda a, b: clipped(a) != clipped(b),
    ('ConMIM', 9): lambda a, b: learning_rate(a, 5 * 625, 625) < learning_rate(b, 5 * 625, 625) == b.lr,
    ('ConMIM', 10): lambda a, b: (
        learning_rate(a, 10 * 625, 625) == 5e-4 and learning_rate(b, 10 * 625, 625) == 7.5e-4
    ),
    ('ConMIM', 11): lambda a, b: (
        decayed(a) - decayed(b)
        == {'pathway.mask_token', 'pathway.encoder.rel_pos_bias.relative_position_bias_table'}
    ),
    ('ConMIM', 13): lambda a, b: abs(followed(a) - 0.004) < 1e-5 and abs(followed(b) - 1.0) < 1e-5,
    ('ConMIM', 14): lambda a, b: (
        build_mask(a, 50, seeded()).weight is None
        and build_mask(b, 50, seeded()).hidden.sum(1).float().std() > 0
    ),
    ('ConMIM', 15): lambda a, b: same_but(a, b, 'views') and jittered(a) > 1.3 * jittered(b) > 0,
    ('SemanticMIM', 1): lambda a, b: (task(a).encoder.P, task(b).encoder.P) == (8, 1),
    ('SemanticMIM', 2): lambda a, b: (
        [int(build_mask(r, 1, seeded()).hidden.sum()) for r in (a, b)] == [118, 157]
    ),
    ('SemanticMIM', 6): lambda a, b: (
        [len(list(build_encoder(r.at('smoke')).blocks[-1].drop_path2.modules())) for r in (a, b)] == [1, 3]
    ),
    ('SemanticMIM', 7): lambda a, b: (
        same_but(a, b, 'options', 'views', 'warmup', 'min_lr', 'weight_decay', 'layer_decay')
        and tuned(a)[0].mixup is None
        and tuned(b)[0].mixup is not None
        and {g.get('lr_scale', 1.0) for g in tuned(a)[1]} == {1.0} < {g['lr_scale'] for g in tuned(b)[1]}
    ),
    ('SemanticMIM', 9): lambda a, b: (
        same_but(a, b, 'lr', 'weight_decay', 'options')
        and (a.lr, b.lr) == (0.01, 0.02)
        and [max(g['weight_decay'] for g in tuned(r)[1]) for r in (a, b)] == [0.0, 1e-4]
    ),
    ('SemanticMIM', 10): lambda a, b: (
        2 * mean_iou(HALF, tuned(b)[0].absent) == mean_iou(HALF, tuned(a)[0].absent) == mean_iou(HALF) == 100
    ),
    ('SemanticMIM', 13): lambda a, b: (
        any('ls1.gamma' in n for n in task(a).state_dict())
        and not any('ls1.gamma' in n for n in task(b).state_dict())
    ),
    ('SemanticMIM', 14): lambda a, b: estimate(a) > 2 * estimate(b),
    ('SemanticMIM', 16): lambda a, b: (
        'pathway.encoder.cls_token' in decayed(b) - decayed(a)
        and 'pathway.mask_token' in decayed(a) - decayed(b)
    ),
    ('SemanticMIM', 18): lambda a, b: (
        same_but(a, b, 'batch', 'epochs', 'warmup', 'layer_decay')
        and (a.batch, b.batch, b.layer_decay) == (16, 8, 0.9)
        and min(g.get('lr_scale', 1.0) for g in tuned(a)[1]) == 1.0 > min(g['lr_scale'] for g in tuned(b)[1])
    ),
    ('SemanticMIM', 17): lambda a, b: not task(a).target(batch(a)).equal(task(b).target(batch(b))),
}
MEASURES = {
    ('ConMIM', 12): lambda: not probe(statistics='imagenet').equal(probe(statistics='inception')),
    ('SemanticMIM', 3): lambda: (
        [
            c.key('paper', 'trained')
            for c in (SEMANTICMIM_T1.columns[0], replace(SEMANTICMIM_T1.columns[0], block=12))
        ]
        == ['linear/7/prefix', 'linear/12/prefix']
    ),
    ('SemanticMIM', 4): lambda: (
        [replace(column('voc'), block=b).key('paper', 'trained') for b in (column('voc').block, 8)]
        == ['voc/6/patch', 'voc/8/patch']
    ),
    ('SemanticMIM', 5): lambda: (
        probe(frozen='eval').equal(probe(frozen='eval'))
        and not probe(frozen='train').equal(probe(frozen='eval'))
    ),
    ('SemanticMIM', 8): lambda: not probe(statistics='imagenet').equal(probe(statistics='inception')),
    ('SemanticMIM', 15): lambda: (
        {'linear/best/prefix', 'linear/best/patch'} < {c.measure for c in SEMANTICMIM_T1.columns}
    ),
}
IDS = [f'{p.source} {p.number}' for p in LEDGER]


def test_the_ledger_is_complete():
    wanted = {('ConMIM', n, 'A' if n <= 7 else 'B') for n in range(1, 16)} | {
        ('SemanticMIM', n, 'A' if n <= 10 else 'B') for n in range(1, 19)
    }
    assert {(p.source, p.number, p.rank) for p in LEDGER} == wanted and len(LEDGER) == len(wanted)
    assert {(p.source, p.number) for p in LEDGER if p.switch} == set(EFFECTS) | set(MEASURES)
    assert {(p.source, p.number) for p in LEDGER if not p.switch} == {
        ('SemanticMIM', 11),
        ('SemanticMIM', 12),
    }  # and their lines say why
    assert all(f'| {i} |' in ledger() for i in IDS)


@pytest.mark.parametrize('point', LEDGER, ids=IDS)
def test_a_switch_changes_what_it_says(point):
    at = point.source, point.number
    if not point.switch:
        assert point.here
        return
    if at in MEASURES:
        assert MEASURES[at]()
        return
    ours, other = (apply_switch(point, v) for v in point.values)
    assert point.switch.partition('.')[0] in (*VALUES, 'recipe') and ours.key() != other.key()
    if point.switch != 'options.pathway':
        assert default(point) == point.values[0]
    assert EFFECTS[at](ours, other)


def test_positions_of_proxies_are_part_of_the_proxies():
    "SemanticMIM 12: adding each proxy's learned row to the proxy itself, and leaving the rows at zero, is the same function."
    torch.manual_seed(0)
    path = Proxy(Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=4)).eval()
    x, mask = torch.randn(2, 3, 32, 32), random_mask(2, (4, 4), 0.5, seeded())
    with torch.no_grad():
        before, e = path(x, mask), path.encoder
        e.cls_token += e.pos_embed[:, :1]
        e.reg_token += e.pos_embed[:, 1:4]
        e.pos_embed[:, :4] = 0
        assert path(x, mask).equal(before)

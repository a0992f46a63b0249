"Building: every published method is built at smoke scale, and mistakes are found before a training."

import pytest
import torch

from mimstudy.core.errors import StudyError
from mimstudy.engine.datasets import load_dataset
from mimstudy.papers.experiments import experiment
from mimstudy.papers.pretraining import PRETRAININGS, pretraining
from mimstudy.papers.scales import at_scale
from mimstudy.papers.tables import TABLES
from mimstudy.study.build import build_batch_function, build_mask, build_task, evaluated_encoder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def images():
    return load_dataset('scenes', 'train', 32, 8)


@pytest.mark.parametrize('name', PRETRAININGS)
def test_every_published_method_computes_a_loss(name, images):
    config = at_scale(pretraining(name), 'smoke')
    task = build_task(config, images, seed=1)
    pixels, labels = next(iter(images.batches([torch.arange(4)])))
    make_batch = build_batch_function(config, images)
    batch = make_batch(pixels, labels, seeded())
    assert (batch.mask is None) == (config.mask is None)
    assert torch.isfinite(task(batch, 0.0)['loss'])
    assert evaluated_encoder(config, task).P == config.encoder.prefix
    again = make_batch(pixels, labels, seeded())
    assert all(a.equal(b) for a, b in zip(batch.views, again.views, strict=True))


TRAININGS = {}  # identifier -> the first declared row that is this training
for table in TABLES.values():
    for row in table.measured:
        one = experiment(f'{table.name}/{row.name}', 'smoke')
        if row.features == 'trained':
            TRAININGS.setdefault(one.train_id, one)


@pytest.mark.parametrize('one', TRAININGS.values(), ids=lambda one: one.name)
def test_every_declared_row_makes_a_step(one, images):
    task = build_task(one.config, images, seed=1)
    pixels, labels = next(iter(images.batches([torch.arange(4)])))
    batch = build_batch_function(one.config, images)(pixels, labels, seeded())
    loss = task(batch, 0.0)['loss']
    loss.backward()
    gradients = [p.grad for p in task.encoder.parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.slow
def test_a_dvae_of_our_own_depends_on_its_seed_alone(images):
    config = experiment('tokenizers/beit-own-dvae', 'smoke').config
    pixels = next(iter(images.batches([torch.arange(4)])))[0] / 255
    codes = [build_task(config, images, seed).target.tokenizer.codes(pixels) for seed in (1, 1, 2)]
    assert codes[0].shape == (4, 4, 4) and codes[0].unique().numel() > 4
    assert codes[0].equal(codes[1]) and not codes[0].equal(codes[2])


@pytest.mark.parametrize('views', ['two', 'multicrop'])
def test_separate_crops_are_refused_where_patches_are_compared(views):
    small = dict(crops=2, size=16) if views == 'multicrop' else None
    config = at_scale(pretraining('conmim_b16_300'), 'smoke').but(data=dict(views=views, multicrop=small))
    with pytest.raises(StudyError, match='are separate crops'):
        build_task(config)


def test_a_missing_teacher_is_found_before_the_training():
    with pytest.raises(StudyError, match='simmim has no EMA teacher to evaluate'):
        build_task(at_scale(pretraining('simmim'), 'smoke').but(eval_model='teacher'))


def test_block_masks_and_two_sets():
    config = at_scale(pretraining('beit'), 'smoke')
    block = build_mask(config.but(mask=dict(kind='block', ratio=0.5)), 50, seeded())
    assert block.hidden.sum(1).max() <= 8
    two = build_mask(config.but(mask=dict(ratio=0.5, predict_ratio=0.25)), 50, seeded())
    assert set(two.hidden.sum(1).tolist()) == {8} and two.predict.shape == (50, 4)

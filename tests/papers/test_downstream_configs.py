"Downstream configurations: a source for every value, and what a scale changes."

import pytest

from mimstudy.engine.training_config import source_of, value_paths
from mimstudy.evaluate.catalogue import DOWNSTREAM_TASKS
from mimstudy.papers.downstream import DOWNSTREAM, downstream_config
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.scales import at_scale, scale_downstream


@pytest.mark.parametrize('name', DOWNSTREAM)
def test_every_value_has_a_source(name):
    config = DOWNSTREAM[name]
    assert config.name == name and config.task in DOWNSTREAM_TASKS
    for path in value_paths(config):
        assert len(source_of(config, path)) > 3, path


@pytest.mark.parametrize('name', DOWNSTREAM)
def test_paper_scale_changes_only_the_images_of_fine_tuning(name):
    published = DOWNSTREAM[name]
    encoder = at_scale(pretraining('semanticmim_beit'), 'paper', 'imagenette')
    before, after = value_paths(published), value_paths(scale_downstream(published, encoder, 'paper'))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == ({'data.dataset'} if published.task == 'finetune' else set())


def test_the_release_has_values_of_its_own_for_maskfeat():
    beit = downstream_config('semanticmim_finetune_release', 'semanticmim(beit)')
    maskfeat = downstream_config('semanticmim_finetune_release', 'semanticmim(maskfeat)')
    assert (beit.optim.lr, beit.optim.batch, beit.options['statistics']) == (4e-3, 1024, 'inception')
    assert (maskfeat.optim.lr, maskfeat.optim.batch, maskfeat.options['statistics']) == (
        8e-3,
        2048,
        'imagenet',
    )
    ade20k = downstream_config('semanticmim_ade20k_release', 'maskfeat').optim
    assert (ade20k.batch, ade20k.epochs, ade20k.layer_decay) == (8, round(160_000 / (20_210 // 8)), 0.9)


def test_the_published_steps_of_ade20k():
    optim = downstream_config('semanticmim_ade20k').optim
    steps_per_epoch = 20_210 // optim.batch
    assert optim.epochs * steps_per_epoch == pytest.approx(160_000, rel=0.005)
    assert round(optim.warmup * steps_per_epoch) == 1500

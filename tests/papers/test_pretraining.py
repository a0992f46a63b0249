"Pre-training configurations: values of the papers, transcribed a second time, and a source for every value."

import json

import pytest

from mimstudy.engine.training_config import PretrainConfig, source_of, value_paths
from mimstudy.methods.catalogue import METHODS, MIM_METHODS, data_arguments, method_options
from mimstudy.papers.pretraining import PRETRAININGS, pretraining
from mimstudy.papers.scales import SCALES, at_scale, scaled_momentum
from mimstudy.parts.ema import remaining_start

CONMIM_TABLE_10 = {
    'data.size': 224,
    'data.views': 'weak,strong',
    'encoder.depth': 12,
    'encoder.patch': 16,
    'mask.kind': 'random',
    'mask.ratio': 0.75,
    'optim.batch': 2048,
    'optim.lr': 5e-4,
    'optim.min_lr': 1e-5,
    'optim.warmup': 10,
    'optim.betas': (0.9, 0.98),
    'optim.eps': 1e-8,
    'optim.weight_decay': 0.05,
    'optim.clip': 3,
    'options': dict(tau=0.1, momentum=0.996),
}
VIT_B = {'encoder.width': 768, 'encoder.heads': 12, 'encoder.drop_path': 0, 'mask.unit': 2}
VIT_S = {'encoder.width': 384, 'encoder.heads': 6, 'encoder.drop_path': 0.1, 'mask.unit': 1}
SEMANTICMIM_TABLE_2 = {
    'data.size': 224,
    'data.flip': 0.5,
    'encoder.width': 768,
    'encoder.patch': 16,
    'encoder.prefix': 1,
    'encoder.drop_path': 0.1,
    'encoder.position_embedding': 'absolute',
    'mask.kind': 'random',
    'mask.ratio': 0.4,
    'mask.unit': 1,
    'optim.epochs': 300,
    'optim.batch': 2048,
    'optim.betas': (0.9, 0.999),
    'optim.eps': 1e-8,
    'optim.weight_decay': 0.05,
}
BEIT = {
    'data.crop': (0.08, 1),
    'data.views': 'jitter',
    'encoder.layer_scale': 0.1,
    'optim.lr': 1.5e-3,
    'optim.min_lr': 1e-5,
    'optim.warmup': 10,
    'optim.clip': 3,
}
MASKFEAT = {
    'data.crop': (0.5, 1),
    'data.views': 'weak',
    'encoder.layer_scale': None,
    'optim.lr': 1.6e-3,
    'optim.min_lr': 1e-6,
    'optim.warmup': 30,
    'optim.clip': 0.02,
}
PROXIES = {'encoder.prefix': 8, 'mask.ratio': 0.6}
PUBLISHED = {
    'conmim_s16_300': CONMIM_TABLE_10 | VIT_S | {'optim.epochs': 300},
    'conmim_b16_300': CONMIM_TABLE_10 | VIT_B | {'optim.epochs': 300},
    'conmim_b16_800': CONMIM_TABLE_10 | VIT_B | {'optim.epochs': 800},
    'beit': SEMANTICMIM_TABLE_2 | BEIT,
    'maskfeat': SEMANTICMIM_TABLE_2 | MASKFEAT,
    'semanticmim_beit': SEMANTICMIM_TABLE_2 | BEIT | PROXIES,
    'semanticmim_maskfeat': SEMANTICMIM_TABLE_2 | MASKFEAT | PROXIES,
    'dino': {
        'data.crop': (0.4, 1),
        'data.multicrop.crops': 8,
        'data.multicrop.size': 96,
        'data.multicrop.area': (0.05, 0.4),
        'eval_model': 'teacher',
        'mask': None,
        'optim.weight_decay': 0.04,
        'optim.weight_decay_end': 0.4,
    },
    'mae': {'mask.ratio': 0.75, 'optim.lr': 1.5e-4 * 16, 'optim.betas': (0.9, 0.95), 'optim.clip': None},
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_values_are_those_of_the_papers(name):
    values = value_paths(pretraining(name))
    assert {path: values[path] for path in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize('name', PRETRAININGS)
def test_every_value_has_a_source(name):
    config = pretraining(name)
    assert config.name == name
    for path in value_paths(config):
        assert len(source_of(config, path)) > 3, path


@pytest.mark.parametrize('name', PRETRAININGS)
def test_sources_name_existing_values(name):
    config = pretraining(name)
    paths = value_paths(config)
    groups = {path.rpartition('.')[0] for path in paths}
    # a source may also belong to a group that a method does not have, such as a mask that is None
    unknown = [path for path in config.sources if path not in paths and path not in groups]
    assert [path for path in unknown if path.partition('.')[0] not in paths] == []


@pytest.mark.parametrize('name', PRETRAININGS)
def test_methods_and_options_exist(name):
    config = pretraining(name)
    assert config.method in METHODS
    defaults = method_options(config.method)
    assert set(config.options) <= set(defaults)
    assert {option: defaults[option] for option in config.options} == config.options
    assert PretrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize('base', ['beit', 'maskfeat'])
def test_proxies_change_three_values(base):
    before, after = value_paths(pretraining(base)), value_paths(pretraining(f'semanticmim_{base}'))
    assert {path for path in before if before[path] != after[path]} == {
        'method',
        'encoder.prefix',
        'mask.ratio',
    }


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', PRETRAININGS)
def test_a_scale_keeps_what_the_papers_vary(name, scale):
    published = pretraining(name)
    config = at_scale(published, scale)
    unchanged = [name for name in published.options if name != 'momentum']
    assert config.method == published.method and set(config.options) == set(published.options)
    assert all(config.options[name] == published.options[name] for name in unchanged)
    small_conmim = 'conmim' in name and scale != 'paper'
    expected = published.mask.but(unit=1) if small_conmim else published.mask
    assert config.mask == expected, 'ConMIM Table 10: mask units of one patch for a small encoder'
    assert config.encoder.prefix == published.encoder.prefix
    assert config.data.views == published.data.views
    assert (
        config.optim.lr / config.optim.min_lr
        == pytest.approx(published.optim.lr / published.optim.min_lr, rel=1e-4)
        if published.optim.min_lr
        else config.optim.min_lr == 0
    )
    assert config.optim.warmup / config.optim.epochs == pytest.approx(
        published.optim.warmup / published.optim.epochs, abs=1e-4
    )


@pytest.mark.parametrize('steps', [16, 640, 2302, 2304, 50_000])
def test_little_of_the_random_start_is_left_in_a_teacher(steps):
    momentum = scaled_momentum(0.996, steps)
    assert remaining_start(momentum, steps) <= 0.01
    assert (momentum == 0.996) == (steps > 2303)


def test_scaled_momenta_keep_their_order():
    published = (0.0, 0.99, 0.996, 0.999, 0.9996)
    scaled = [scaled_momentum(momentum, 640) for momentum in published]
    assert scaled == sorted(scaled) and scaled[0] == 0.0


def test_absent_groups():
    "A method without codes or small crops has none of these groups; masked image modelling has masks."
    masked = {*MIM_METHODS, *(f'semanticmim({name})' for name in MIM_METHODS)}
    for name, config in PRETRAININGS.items():
        if config.method in masked:
            assert config.mask is not None, name
        assert (config.tokenizer is None) == ('tokenizer' not in data_arguments(config.method)), name
        assert (config.data.multicrop is None) == (config.data.views != 'multicrop'), name

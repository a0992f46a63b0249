"Configurations: JSON in and out, a key that depends on every value, values that are refused."

import json

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.engine.config import (
    DataConfig,
    EncoderConfig,
    MaskConfig,
    MultiCropConfig,
    OptimConfig,
    TokenizerConfig,
)
from mimstudy.engine.training_config import DownstreamConfig, PretrainConfig, value_paths

CHANGES = {  # path of a value -> another value
    'method': 'x',
    'options': dict(a=1),
    'eval_model': 'teacher',
    'encoder.width': 384,
    'encoder.depth': 1,
    'encoder.heads': 1,
    'encoder.patch': 8,
    'encoder.prefix': 2,
    'encoder.layer_scale': 1.0,
    'encoder.drop_path': 0.1,
    'encoder.mlp_drops': 2,
    'encoder.init': 'beit',
    'encoder.position_embedding': 'relative',
    'data.dataset': 'x',
    'data.size': 112,
    'data.per_class': 1,
    'data.crop': (0.5, 1),
    'data.flip': 0,
    'data.multicrop.crops': 2,
    'data.multicrop.size': 112,
    'data.multicrop.area': (0.1, 0.4),
    'mask.kind': 'block',
    'mask.ratio': 0.5,
    'mask.unit': 2,
    'mask.predict_ratio': 0.5,
    'tokenizer.kind': 'kmeans',
    'tokenizer.codes': 2,
    'optim.epochs': 301,
    'optim.batch': 1,
    'optim.lr': 1.0,
    'optim.min_lr': 1e-4,
    'optim.warmup': 1.0,
    'optim.warmup_start': 1.0,
    'optim.schedule': 'linear',
    'optim.optimiser': 'sgd',
    'optim.betas': (0, 0),
    'optim.eps': 1.0,
    'optim.weight_decay': 1.0,
    'optim.weight_decay_end': 0.4,
    'optim.no_decay': (),
    'optim.layer_decay': 0.5,
    'optim.clip': 1.0,
    'optim.clip_per_tensor': True,
}
NOT_ALONE = {'data.views', 'optim.step_epochs'}  # need another value to change with them


def complete():
    "A pre-training in which every group is present."
    data = DataConfig(views='multicrop', multicrop=MultiCropConfig())
    return PretrainConfig(data=data, tokenizer=TokenizerConfig())


def nested(path, value):
    "'optim.lr', 1.0 -> {'optim': {'lr': 1.0}}"
    first, _, rest = path.partition('.')
    return {first: nested(rest, value) if rest else value}


def test_json_round_trip():
    config = PretrainConfig(
        name='a',
        method='b',
        options=dict(tau=0.1, momentum=0.996),
        mask=None,
        optim=OptimConfig(layer_decay=0.65, clip=None, no_decay=['mask_token']),
        sources={'optim.lr': 'nowhere'},
    )
    text = json.dumps(config.to_json())
    again = PretrainConfig.from_json(json.loads(text))
    assert again == config and again.key() == config.key() and json.dumps(again.to_json()) == text
    for made in (complete(), DownstreamConfig(optim=OptimConfig(schedule='steps', step_epochs=2.0))):
        assert type(made).from_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_key_depends_on_every_value():
    base = complete()
    assert set(CHANGES) | NOT_ALONE == set(value_paths(base))
    keys = [base.but(**nested(path, value)).key() for path, value in CHANGES.items()]
    keys.append(base.but(data=dict(views='weak', multicrop=None)).key())
    keys.append(base.but(optim=dict(schedule='steps', step_epochs=3.0)).key())
    assert len({*keys, base.key()}) == len(keys) + 1


def test_the_key_does_not_depend_on_name_and_sources():
    base = PretrainConfig()
    assert base.but(name='other').key() == base.key()
    assert PretrainConfig(sources={'optim.lr': 'elsewhere'}).key() == base.key()


def test_configurations_are_frozen():
    with pytest.raises(AttributeError):
        OptimConfig().lr = 1.0


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: OptimConfig().but(lrr=1.0), 'did you mean lr'),
        (lambda: OptimConfig(optimiser='adam'), 'did you mean adamw'),
        (lambda: OptimConfig(step_epochs=2.0), 'needs step_epochs'),
        (lambda: OptimConfig(clip=None, clip_per_tensor=True), 'clip_per_tensor needs a clip'),
        (lambda: OptimConfig(no_decay=(1,)), 'no_decay must be a list of strings'),
        (lambda: EncoderConfig(drop_path=1.0), 'drop_path must lie in'),
        (lambda: EncoderConfig(width=True), 'width must be a whole number'),
        (lambda: MaskConfig(ratio=1.0), 'ratio must lie strictly between 0 and 1'),
        (lambda: MaskConfig(kind='ibot'), 'set it to None'),
        (lambda: DataConfig(views='multicrop'), 'need each other'),
        (lambda: DataConfig(crop=(0.5, 0.2)), 'ascending order'),
        (lambda: PretrainConfig(data=DataConfig(size=225)), 'patches of 16 px do not tile'),
        (lambda: PretrainConfig.from_json({'optim': {'lrr': 1.0}}), 'did you mean lr'),
    ],
)
def test_refused_values(make, message):
    with pytest.raises(StudyError, match=message) as error:
        make()
    assert '\n' not in str(error.value)

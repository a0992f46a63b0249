"Exported encoders open in plain timm, official checkpoints are imported, and other files are refused."

import argparse
import json
import os
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import timm
import torch
from conftest import assert_close, sub
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mimstudy.core.errors import StudyError
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.cli.commands import app
from mimstudy.study.exchange import export_encoder, import_encoder
from mimstudy.study.encoder_files import save_encoder

SHAPE = dict(size=32, patch=8, width=64, depth=2, heads=1)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomised(encoder):
    "The encoder with random values in all parameters, also in those that start at 0 or 1."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return encoder.eval()


KINDS = {
    'plain': lambda: Encoder(**SHAPE),
    'layer scale': lambda: Encoder(**SHAPE, layer_scale=0.1),
    'proxies': lambda: Encoder(**SHAPE, prefix=8, mlp_ratio=2.0),
    'relative': lambda: RelativeEncoder(**SHAPE),
    'fine-tuned': lambda: RelativeEncoder(**SHAPE, tuned=True),
}

READER = '''
import json, sys, timm, torch
folder = sys.argv[1]
x = torch.load(sys.argv[2], weights_only=True)
config = json.load(open(f'{folder}/config.json'))
hub = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
weights = f'{folder}/model.safetensors'
options = dict(num_classes=0, checkpoint_path=weights, **config['model_args'])
file = timm.create_model(config['architecture'], **options)
models = (hub, file.eval())
assert not any(name.startswith('mimstudy') for name in sys.modules)
with torch.no_grad():
    tokens = [model.forward_features(x) for model in models]
    features = [model(x) for model in models]
torch.save([tokens, features, torch.tensor(hub.default_cfg['mean'])], sys.argv[2])
'''


@pytest.mark.parametrize('kind', KINDS)
def test_plain_timm_opens_it_in_a_fresh_process(kind, tmp_path):
    encoder = randomised(KINDS[kind]())
    save_encoder(encoder, tmp_path / 'run', dict(name='a training'))
    export_encoder(tmp_path / 'run', tmp_path / 'out')
    about = json.loads((tmp_path / 'out' / 'config.json').read_text())['mimstudy']
    assert about['config'] == dict(name='a training') and about['commit'] and about['versions']['torch']
    torch.save(X, tmp_path / 'x.pt')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(
        HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'
    )
    done = subprocess.run(
        [sys.executable, '-c', READER, str(tmp_path / 'out'), str(tmp_path / 'x.pt')],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-500:]
    tokens, features, mean = torch.load(tmp_path / 'x.pt', weights_only=True)
    with torch.no_grad():
        for theirs in tokens:
            assert_close(theirs, encoder.forward_features(X), rel=1e-6)
        for theirs in features:
            assert_close(theirs, encoder(X), rel=1e-6)
    assert_close(mean, torch.tensor([0.485, 0.456, 0.406]))


# official layouts, made from an encoder of known features


def beit_names(encoder):
    "A relative encoder in the names of BEiT and ConMIM: no bias of the keys."
    return {k: v for k, v in encoder.state_dict().items() if not k.endswith('k_bias')}


MMPRETRAIN = (  # in timm's names -> in mmpretrain's
    ('patch_embed.proj.', 'patch_embed.projection.'),
    ('blocks.', 'layers.'),
    ('.norm1.', '.ln1.'),
    ('.norm2.', '.ln2.'),
    ('mlp.fc1.', 'ffn.layers.0.0.'),
    ('mlp.fc2.', 'ffn.layers.1.'),
    ('.ls1.gamma', '.gamma_1'),
    ('.ls2.gamma', '.gamma_2'),
)


def mmpretrain_names(encoder):
    "A plain encoder with layer scale in the names of SemanticMIM's release."
    state = encoder.state_dict()
    state['cls_token'] = torch.cat([state['cls_token'], state.pop('reg_token')], 1)
    out = {}
    for name, value in state.items():
        for ours, theirs in MMPRETRAIN:
            name = name.replace(ours, theirs)
        if name.startswith('norm.'):
            name = name.replace('norm.', 'ln1.')
        if 'attn.qkv.' in name:
            out[name.replace('qkv', 'q')] = value[:64]
            out[name.replace('qkv', 'kv')] = value[64:]
        else:
            out[name] = value
    return out | {'mask_token': torch.zeros(1, 1, 64), 'extra_layers.0.ln1.weight': torch.zeros(64)}


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def zeros(*names):
    "Tensors that are no part of the encoder."
    return {name: torch.zeros(3) for name in names}


BESIDE = dict(
    args=argparse.Namespace(lr=5e-4, output_dir='out'),  # what training scripts store beside the weights
    optimizer=dict(
        state={0: dict(step=3)},
        param_groups=[
            dict(lr=np.float64(5e-4), min_lr=np.float32(1e-5), images=np.int64(3), lrs=np.arange(3.0))
        ],
    ),
)

LAYOUTS = {
    'ConMIM': (
        lambda: RelativeEncoder(**SHAPE),
        lambda e: (
            {
                'model': beit_names(e) | zeros('mask_token', 'lm_head.weight', 'projectors.0.weight'),
                'epoch': 3,
            }
            | BESIDE
        ),
    ),
    'ConMIM, fine-tuned': (
        lambda: RelativeEncoder(**SHAPE, tuned=True),
        lambda e: (
            {'model': beit_names(e) | zeros('head.weight', 'blocks.0.attn.relative_position_index')} | BESIDE
        ),
    ),
    'BEiT': (
        lambda: RelativeEncoder(**SHAPE),
        lambda e: {'model': beit_names(e) | zeros('mask_token', 'lm_head.bias')},
    ),
    'SimMIM': (
        lambda: RelativeEncoder(**SHAPE),
        lambda e: {
            'model': prefixed('encoder.', beit_names(e)) | zeros('encoder.mask_token', 'decoder.0.weight')
        },
    ),
    'SemanticMIM': (
        lambda: Encoder(**SHAPE, prefix=8, layer_scale=0.1),
        lambda e: {
            'state_dict': prefixed('backbone.', mmpretrain_names(e))
            | zeros('head.cls_head.weight', 'target_generator.x')
        },
    ),
    'MAE': (
        lambda: Encoder(**SHAPE),
        lambda e: {
            'model': e.state_dict()
            | zeros(
                'mask_token', 'decoder_embed.weight', 'decoder_pos_embed', 'decoder_blocks.0.norm1.weight'
            )
        },
    ),
    'MoCo v3': (
        lambda: Encoder(**SHAPE),
        lambda e: (
            {
                'state_dict': prefixed('module.base_encoder.', e.state_dict() | zeros('head.0.weight'))
                | prefixed('module.momentum_encoder.', {k: v * 0 for k, v in e.state_dict().items()})
                | zeros('module.predictor.0.weight'),
                'epoch': 3,
            }
            | BESIDE
        ),
    ),
    'DINO': (
        lambda: Encoder(**SHAPE),
        lambda e: (
            {
                'student': prefixed('module.backbone.', {k: v * 0 for k, v in e.state_dict().items()}),
                'teacher': prefixed('backbone.', e.state_dict()) | zeros('head.last_layer.weight_g'),
                'epoch': 3,
            }
            | BESIDE
        ),
    ),
    'iBOT': (
        lambda: Encoder(**SHAPE),
        lambda e: {
            'teacher': prefixed('backbone.', e.state_dict())
            | zeros('backbone.masked_embed', 'head.mlp.0.weight'),
            'student': prefixed('module.backbone.', {k: v * 0 for k, v in e.state_dict().items()}),
        },
    ),
    'timm': (lambda: Encoder(**SHAPE), lambda e: timm_state(e)),
}


def timm_state(encoder):
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5
    )
    model.load_state_dict(encoder.state_dict(), strict=False)
    return model.state_dict()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_official_layouts(layout, tmp_path):
    make, wrap = LAYOUTS[layout]
    encoder = randomised(make())
    torch.save(wrap(encoder), tmp_path / 'checkpoint.pth')
    found = import_encoder(tmp_path / 'checkpoint.pth', heads=1)
    with torch.no_grad():
        assert_close(found.encoder.forward_features(X), encoder.forward_features(X), rel=1e-6)
        assert_close(found.encoder(X), encoder(X), rel=1e-6)
    assert all(found.left_out.values()) and set(found.matched) <= set(found.encoder.state_dict())


@pytest.fixture
def history_buffer():
    "The class of mmengine's log buffers, in modules that exist during the test only."

    class HistoryBuffer:
        def __init__(self):
            self.max_length = 3
            self._log_history = np.arange(3.0)

    HistoryBuffer.__module__ = 'mmengine.logging.history_buffer'
    HistoryBuffer.__qualname__ = 'HistoryBuffer'
    names = ('mmengine', 'mmengine.logging', 'mmengine.logging.history_buffer')
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
    yield HistoryBuffer
    for name in names:
        sys.modules.pop(name, None)


def test_numbers_of_numpy_1_and_buffers_of_mmengine(tmp_path, history_buffer):
    "They do not prevent the weights from being read; mmengine is not installed here."
    encoder = randomised(Encoder(**SHAPE))
    checkpoint = {
        'state_dict': prefixed('backbone.', encoder.state_dict()),
        'message_hub': dict(log_scalars=dict(loss=history_buffer())),
        'lr': np.float64(0.1),
    }
    torch.save(checkpoint, tmp_path / 'new.pth')
    for name in [name for name in sys.modules if name.split('.')[0] == 'mmengine']:
        del sys.modules[name]
    with zipfile.ZipFile(tmp_path / 'new.pth') as new, zipfile.ZipFile(tmp_path / 'old.pth', 'w') as old:
        for item in new.infolist():
            old.writestr(item, new.read(item).replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    for file in ('new.pth', 'old.pth'):
        found = import_encoder(tmp_path / file, heads=1).encoder
        assert all(v.equal(encoder.state_dict()[k]) for k, v in found.state_dict().items())


def test_heads_of_mocov3(tmp_path):
    "ViT-S of MoCo v3 has 12 heads of 32 channels, where the other methods have 6 of 64."
    encoder = randomised(Encoder(size=32, patch=16, width=384, depth=1, heads=12))
    torch.save({'state_dict': prefixed('module.base_encoder.', encoder.state_dict())}, tmp_path / 'small.pth')
    found = import_encoder(tmp_path / 'small.pth').encoder
    with torch.no_grad():
        assert found.forward_features(X).equal(encoder.forward_features(X))


def test_the_other_network(tmp_path):
    encoder = randomised(Encoder(**SHAPE))
    torch.save(LAYOUTS['DINO'][1](encoder), tmp_path / 'both.pth')
    student = import_encoder(tmp_path / 'both.pth', part='student', heads=1).encoder
    assert all(p.abs().max() == 0 for p in student.parameters())


# official weights that the golden files contain


def test_golden_conmim(golden, tmp_path):
    g = golden('conmim_model')
    for part, view in (('student', None), ('teacher', 'samples_aug')):
        torch.save({'model': sub(g, f'{part}.')}, tmp_path / f'{part}.pth')
        found = import_encoder(tmp_path / f'{part}.pth')
        reasons = {'projects features in pre-training', 'replaces hidden patches in pre-training'}
        assert reasons <= set(found.left_out.values())
        if view:
            with torch.no_grad():
                assert_close(found.encoder.forward_features(g[view].float()), g['eval.teacher_tokens'])


@pytest.mark.parametrize('name, heads', [('semanticmim_beit_k8', 4), ('semanticmim_maskfeat_k8', 4)])
def test_golden_semanticmim(golden, tmp_path, name, heads):
    g = golden(name)
    torch.save({'state_dict': prefixed('backbone.', sub(g, 'backbone.'))}, tmp_path / 'official.pth')
    found = import_encoder(tmp_path / 'official.pth', heads=heads)
    if 'images' in g:
        x = g['images'].float()
    else:
        mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        x = (g['images_u8'].float() - mean) / std
    last = g['full.block_2'] if 'full.block_2' in g else g['full.block_1']
    with torch.no_grad():
        assert_close(found.encoder.forward_features(x[: len(last)]), last)
    assert any(k.startswith('extra_layers') for k in found.left_out)


@pytest.mark.parametrize('name, prefix', [('simmim', 'model.'), ('beit', 'model.'), ('mae', 'model.')])
def test_golden_others(golden, tmp_path, name, prefix):
    torch.save({'model': sub(golden(name), prefix)}, tmp_path / 'official.pth')
    found = import_encoder(tmp_path / 'official.pth', heads=4)
    assert len(found.matched) > 25 and found.left_out


# what is refused


class Trap:
    def __reduce__(self):
        return (open, ('trapped', 'w'))


def mimstudy(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def check_refused(done, message=''):
    "The command ended with status 2 and one line of error."
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith('error: ') and message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


REFUSED = {
    'nothing.pth': 'match nothing of a vision transformer',
    'narrow.pth': 'blocks.1.mlp.fc2.weight has the shape (32, 128)',
    'holes.pth': 'lacks 4 of',
    'trap.pth': 'holds more than weights',
    'empty.pth': 'holds no weights',
    'other.safetensors': 'match nothing',
    'text.pth': 'text.pth',
    'text.safetensors': 'text.safetensors',
    'missing.pth': 'there is no file',
}


@pytest.fixture
def refused_files(tmp_path, monkeypatch):
    "The files of `REFUSED` that exist, in the working folder."
    monkeypatch.chdir(tmp_path)
    state = Encoder(**SHAPE).state_dict()
    torch.save({'resnet.conv1.weight': torch.zeros(3)}, 'nothing.pth')
    torch.save(state | {'blocks.1.mlp.fc2.weight': torch.zeros(32, 128)}, 'narrow.pth')
    torch.save({k: v for k, v in state.items() if 'norm1' not in k}, 'holes.pth')
    torch.save({'model': Trap()}, 'trap.pth')
    torch.save({'epoch': 3}, 'empty.pth')
    save_file({'w': torch.zeros(2)}, 'other.safetensors')
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'text.safetensors').write_text('hello')


@pytest.mark.parametrize('file', REFUSED)
def test_refused(file, refused_files, tmp_path):
    check_refused(mimstudy('import', file, '--heads', '1'), REFUSED[file])
    with pytest.raises(StudyError):
        import_encoder(file, heads=1)
    assert not (tmp_path / 'trapped').exists()


@pytest.mark.parametrize(
    'tensor',
    [
        {'cls_token': torch.zeros(64)},
        {'patch_embed.proj.weight': torch.zeros(())},
        {'pos_embed': torch.zeros(17)},
        {'pos_embed': torch.zeros(1, 1, 64)},
        {'patch_embed.proj.weight': torch.zeros(64, 3, 8, 0)},
    ],
)
def test_a_tensor_of_an_impossible_shape(tensor, tmp_path):
    torch.save(Encoder(**SHAPE).state_dict() | tensor, tmp_path / 'odd.pth')
    check_refused(mimstudy('import', tmp_path / 'odd.pth', '--heads', '1'))


def test_unknown_runs_and_parts(tmp_path):
    check_refused(mimstudy('export', tmp_path / 'nowhere', tmp_path / 'out'), 'no encoder in the run nowhere')
    assert not (tmp_path / 'out').exists()
    torch.save(Encoder(**SHAPE).state_dict(), tmp_path / 'fine.pth')
    check_refused(mimstudy('import', tmp_path / 'fine.pth', '--part', 'techer'), 'did you mean teacher')


@pytest.mark.parametrize('damage', ['kind', 'shape', 'json', 'config'])
def test_damaged_encoder_files(tmp_path, damage):
    save_encoder(Encoder(**SHAPE), tmp_path, {})
    header = {'kind': 'Encoder', 'encoder': json.dumps(SHAPE)}
    if damage == 'kind':
        header['kind'] = 'Decoder'
    elif damage == 'shape':
        header['encoder'] = '{"shape": 3}'
    elif damage == 'json':
        header['encoder'] = '{'
    else:
        (tmp_path / 'config.json').write_text('{')
    save_file(Encoder(**SHAPE).state_dict(), tmp_path / 'encoder.safetensors', metadata=header)
    message = 'config.json' if damage == 'config' else 'no encoder of this study'
    check_refused(mimstudy('export', tmp_path, tmp_path / 'out'), message)
    assert not (tmp_path / 'out').exists()


def test_heads_are_read_or_reported_as_a_guess(tmp_path):
    encoder = Encoder(**SHAPE | dict(width=96, heads=3))
    save_encoder(encoder, tmp_path / 'run', {})
    export_encoder(tmp_path / 'run', tmp_path / 'out')
    torch.save(encoder.state_dict(), tmp_path / 'bare.pth')
    for file, heads, guessed in (
        ('run/encoder.safetensors', 3, False),
        ('out/model.safetensors', 3, False),
        ('bare.pth', 1, True),
    ):
        found = import_encoder(tmp_path / file)
        assert (found.encoder.config['heads'], found.guessed) == (heads, guessed)
        assert ('is a guess' in mimstudy('import', tmp_path / file).stdout) == guessed
    assert not import_encoder(tmp_path / 'bare.pth', heads=3).guessed


def test_the_commands_round_trip(tmp_path):
    encoder = randomised(Encoder(**SHAPE))
    torch.save({'model': encoder.state_dict() | zeros('mask_token')}, tmp_path / 'official.pth')
    done = mimstudy('import', tmp_path / 'official.pth', '--heads', '1', '--to', tmp_path / 'out')
    assert done.exit_code == 0
    assert 'left out  mask_token: replaces hidden patches' in done.stdout
    assert 'tensors matched: size 32, patch 8, width 64' in done.stdout
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    assert all(value.equal(encoder.state_dict()[name]) for name, value in weights.items())
    save_encoder(encoder, tmp_path / 'run', {})
    done = mimstudy('export', tmp_path / 'run' / 'encoder.safetensors', tmp_path / 'again')
    assert done.exit_code == 0 and 'local-dir:' in done.stdout
    first, second = (tmp_path / folder / 'model.safetensors' for folder in ('out', 'again'))
    assert first.read_bytes() == second.read_bytes()

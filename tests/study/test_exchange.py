"Encoders out to plain timm in a process of its own, official checkpoints in, and what is refused."

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
from mimstudy.study.records import save_encoder

SHAPE = dict(size=32, patch=8, width=64, depth=2, heads=1)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def lively(encoder):
    "An encoder with nothing at a trivial value."
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
folder, x = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
config = json.load(open(f'{folder}/config.json'))
hub = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
file = timm.create_model(config['architecture'], num_classes=0, checkpoint_path=f'{folder}/model.safetensors', **config['model_args']).eval()
assert not any(name.startswith('mimstudy') for name in sys.modules)
with torch.no_grad(): torch.save([[m.forward_features(x) for m in (hub, file)], [m(x) for m in (hub, file)], torch.tensor(hub.default_cfg['mean'])], sys.argv[2])
'''


@pytest.mark.parametrize('kind', KINDS)
def test_plain_timm_opens_it_in_a_fresh_process(kind, tmp_path):
    encoder = lively(KINDS[kind]())
    save_encoder(encoder, tmp_path / 'run', dict(name='a recipe'))
    export_encoder(tmp_path / 'run', tmp_path / 'out')
    about = json.loads((tmp_path / 'out' / 'config.json').read_text())['mimstudy']
    assert about['recipe'] == dict(name='a recipe') and about['commit'] and about['versions']['torch']
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


def mmpretrain_names(encoder):
    "A plain encoder with layer scale in the names of SemanticMIM's release."
    out = {}
    for k, v in encoder.state_dict().items():
        if k == 'reg_token':
            continue
        if k == 'cls_token':
            v = torch.cat([v, encoder.reg_token], 1)
        k = (
            k.replace('patch_embed.proj.', 'patch_embed.projection.')
            .replace('blocks.', 'layers.')
            .replace('.norm1.', '.ln1.')
            .replace('.norm2.', '.ln2.')
        )
        k = (
            k.replace('mlp.fc1.', 'ffn.layers.0.0.')
            .replace('mlp.fc2.', 'ffn.layers.1.')
            .replace('.ls1.gamma', '.gamma_1')
            .replace('.ls2.gamma', '.gamma_2')
        )
        if k.startswith('norm.'):
            k = k.replace('norm.', 'ln1.')
        if k.endswith('attn.qkv.weight'):
            out |= {k.replace('qkv', 'q'): v[:64], k.replace('qkv', 'kv'): v[64:]}
        elif k.endswith('attn.qkv.bias'):
            out |= {k.replace('qkv', 'q'): v[:64], k.replace('qkv', 'kv'): v[64:]}
        else:
            out[k] = v
    return out | {'mask_token': torch.zeros(1, 1, 64), 'extra_layers.0.ln1.weight': torch.zeros(64)}


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def noise(*names):
    return {name: torch.zeros(3) for name in names}


BESIDE = dict(
    args=argparse.Namespace(lr=5e-4, output_dir='out'),  # what training scripts keep beside the weights
    optimizer=dict(
        state={0: dict(step=3)},
        param_groups=[
            dict(lr=np.float64(5e-4), min_lr=np.float32(1e-5), seen=np.int64(3), lrs=np.arange(3.0))
        ],
    ),
)

LAYOUTS = {
    'ConMIM': (
        lambda: RelativeEncoder(**SHAPE),
        lambda e: (
            {
                'model': beit_names(e) | noise('mask_token', 'lm_head.weight', 'projectors.0.weight'),
                'epoch': 3,
            }
            | BESIDE
        ),
    ),
    'ConMIM, fine-tuned': (
        lambda: RelativeEncoder(**SHAPE, tuned=True),
        lambda e: (
            {'model': beit_names(e) | noise('head.weight', 'blocks.0.attn.relative_position_index')} | BESIDE
        ),
    ),
    'BEiT': (
        lambda: RelativeEncoder(**SHAPE),
        lambda e: {'model': beit_names(e) | noise('mask_token', 'lm_head.bias')},
    ),
    'SimMIM': (
        lambda: RelativeEncoder(**SHAPE),
        lambda e: {
            'model': prefixed('encoder.', beit_names(e)) | noise('encoder.mask_token', 'decoder.0.weight')
        },
    ),
    'SemanticMIM': (
        lambda: Encoder(**SHAPE, prefix=8, layer_scale=0.1),
        lambda e: {
            'state_dict': prefixed('backbone.', mmpretrain_names(e))
            | noise('head.cls_head.weight', 'target_generator.x')
        },
    ),
    'MAE': (
        lambda: Encoder(**SHAPE),
        lambda e: {
            'model': e.state_dict()
            | noise(
                'mask_token', 'decoder_embed.weight', 'decoder_pos_embed', 'decoder_blocks.0.norm1.weight'
            )
        },
    ),
    'MoCo v3': (
        lambda: Encoder(**SHAPE),
        lambda e: (
            {
                'state_dict': prefixed('module.base_encoder.', e.state_dict() | noise('head.0.weight'))
                | prefixed('module.momentum_encoder.', {k: v * 0 for k, v in e.state_dict().items()})
                | noise('module.predictor.0.weight'),
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
                'teacher': prefixed('backbone.', e.state_dict()) | noise('head.last_layer.weight_g'),
                'epoch': 3,
            }
            | BESIDE
        ),
    ),
    'iBOT': (
        lambda: Encoder(**SHAPE),
        lambda e: {
            'teacher': prefixed('backbone.', e.state_dict())
            | noise('backbone.masked_embed', 'head.mlp.0.weight'),
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
    encoder = lively(make())
    torch.save(wrap(encoder), tmp_path / 'checkpoint.pth')
    found = import_encoder(tmp_path / 'checkpoint.pth', heads=1)
    with torch.no_grad():
        for door in ('forward_features', 'forward'):
            assert_close(getattr(found.encoder, door)(X), getattr(encoder, door)(X), rel=1e-6)
    assert all(found.left_out.values()) and set(found.matched) <= set(found.encoder.state_dict())


def test_what_older_numpy_and_mmengine_wrote(tmp_path):
    "Numbers pickled by numpy 1, and the log buffers of mmengine, which is not installed here, do not keep weights from being read."
    encoder, there = lively(Encoder(**SHAPE)), {}

    class HistoryBuffer:
        def __init__(self):
            self.max_length, self._log_history = 3, np.arange(3.0)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = 'mmengine.logging.history_buffer', 'HistoryBuffer'
    for name in ('mmengine', 'mmengine.logging', 'mmengine.logging.history_buffer'):
        there[name] = sys.modules[name] = types.ModuleType(name)
    there['mmengine.logging.history_buffer'].HistoryBuffer = HistoryBuffer
    try:
        torch.save(
            {
                'state_dict': prefixed('backbone.', encoder.state_dict()),
                'message_hub': dict(log_scalars=dict(loss=HistoryBuffer())),
                'lr': np.float64(0.1),
            },
            tmp_path / 'new.pth',
        )
    finally:
        for name in there:
            del sys.modules[name]
    with zipfile.ZipFile(tmp_path / 'new.pth') as new, zipfile.ZipFile(tmp_path / 'old.pth', 'w') as old:
        for item in new.infolist():
            old.writestr(item, new.read(item).replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    for file in ('new.pth', 'old.pth'):
        found = import_encoder(tmp_path / file, heads=1).encoder
        assert all(v.equal(encoder.state_dict()[k]) for k, v in found.state_dict().items())


def test_heads_of_mocov3(tmp_path):
    "ViT-S of MoCo v3 has 12 heads of 32 channels, where everybody else has 6 of 64."
    encoder = lively(Encoder(size=32, patch=16, width=384, depth=1, heads=12))
    torch.save({'state_dict': prefixed('module.base_encoder.', encoder.state_dict())}, tmp_path / 'small.pth')
    found = import_encoder(tmp_path / 'small.pth').encoder
    with torch.no_grad():
        assert found.forward_features(X).equal(encoder.forward_features(X))


def test_the_other_network(tmp_path):
    encoder = lively(Encoder(**SHAPE))
    torch.save(LAYOUTS['DINO'][1](encoder), tmp_path / 'both.pth')
    student = import_encoder(tmp_path / 'both.pth', part='student', heads=1).encoder
    assert all(p.abs().max() == 0 for p in student.parameters())


# official weights, as far as the golden files have them


def test_golden_conmim(golden, tmp_path):
    g = golden('conmim_model')
    for part, view in (('student', None), ('teacher', 'samples_aug')):
        torch.save({'model': {k: v for k, v in sub(g, f'{part}.').items()}}, tmp_path / f'{part}.pth')
        found = import_encoder(tmp_path / f'{part}.pth')
        assert {'projects features in pre-training', 'stands for hidden patches in pre-training'} <= set(
            found.left_out.values()
        )
        if view:
            with torch.no_grad():
                assert_close(found.encoder.forward_features(g[view].float()), g['eval.teacher_tokens'])


@pytest.mark.parametrize('name, heads', [('semanticmim_beit_k8', 4), ('semanticmim_maskfeat_k8', 4)])
def test_golden_semanticmim(golden, tmp_path, name, heads):
    g = golden(name)
    torch.save({'state_dict': prefixed('backbone.', sub(g, 'backbone.'))}, tmp_path / 'official.pth')
    found = import_encoder(tmp_path / 'official.pth', heads=heads)
    x = (
        g['images'].float()
        if 'images' in g
        else (g['images_u8'].float() - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1))
        / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    )
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


def test_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = lively(Encoder(**SHAPE))
    state = encoder.state_dict()
    torch.save({'resnet.conv1.weight': torch.zeros(3)}, 'nothing.pth')
    torch.save(state | {'blocks.1.mlp.fc2.weight': torch.zeros(32, 128)}, 'narrow.pth')
    torch.save({k: v for k, v in state.items() if 'norm1' not in k}, 'holes.pth')
    torch.save({'model': Trap()}, 'trap.pth')
    torch.save({'epoch': 3}, 'empty.pth')
    save_file({'w': torch.zeros(2)}, 'other.safetensors')
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'text.safetensors').write_text('hello')
    for file, said in (
        ('nothing.pth', 'match nothing of a vision transformer'),
        ('narrow.pth', 'blocks.1.mlp.fc2.weight has the shape (32, 128)'),
        ('holes.pth', 'lacks 4 of'),
        ('trap.pth', 'holds more than weights'),
        ('empty.pth', 'holds no weights'),
        ('other.safetensors', 'match nothing'),
        ('text.pth', 'text.pth'),
        ('text.safetensors', 'text.safetensors'),
        ('missing.pth', 'there is no file'),
    ):
        done = CliRunner().invoke(app, ['import', file, '--heads', '1'])
        assert (
            done.exit_code == 2
            and done.stderr.startswith('error: ')
            and said in done.stderr
            and len(done.stderr.splitlines()) == 1
        ), (file, done.stderr)
        with pytest.raises(StudyError):
            import_encoder(file, heads=1)
    for name, odd in (
        ('flat', {'cls_token': torch.zeros(64)}),
        ('point', {'patch_embed.proj.weight': torch.zeros(())}),
        ('thin', {'pos_embed': torch.zeros(17)}),
        ('none', {'pos_embed': torch.zeros(1, 1, 64)}),
        ('wide', {'patch_embed.proj.weight': torch.zeros(64, 3, 8, 0)}),
    ):
        torch.save(state | odd, f'{name}.pth')
        done = CliRunner().invoke(app, ['import', f'{name}.pth', '--heads', '1'])
        assert (
            done.exit_code == 2 and done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1
        ), (name, done.output, done.exception)
    assert not (tmp_path / 'trapped').exists()
    done = CliRunner().invoke(app, ['export', 'nowhere', 'out'])
    assert (
        done.exit_code == 2
        and 'no encoder in the run nowhere' in done.stderr
        and not (tmp_path / 'out').exists()
    )
    torch.save(state, 'fine.pth')
    assert CliRunner().invoke(app, ['import', 'fine.pth', '--part', 'techer']).exit_code == 2


@pytest.mark.parametrize('damage', ['kind', 'shape', 'json', 'recipe'])
def test_an_encoder_that_is_none(tmp_path, damage):
    save_encoder(Encoder(**SHAPE), tmp_path, {})
    header = {'kind': 'Encoder', 'encoder': json.dumps(SHAPE)} | dict(
        kind={'kind': 'Decoder'}, shape={'encoder': '{"shape": 3}'}, json={'encoder': '{'}, recipe={}
    )[damage]
    save_file(Encoder(**SHAPE).state_dict(), tmp_path / 'encoder.safetensors', metadata=header)
    if damage == 'recipe':
        (tmp_path / 'recipe.json').write_text('{')
    done = CliRunner().invoke(app, ['export', str(tmp_path), str(tmp_path / 'out')])
    assert done.exit_code == 2 and done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1, (
        done.output
    )
    assert not (tmp_path / 'out').exists()


def test_heads_are_read_or_said_to_be_a_guess(tmp_path):
    encoder = Encoder(**SHAPE | dict(width=96, heads=3))
    save_encoder(encoder, tmp_path / 'run', {})
    export_encoder(tmp_path / 'run', tmp_path / 'out')
    torch.save(encoder.state_dict(), tmp_path / 'bare.pth')
    for file, heads, guessed in (
        (tmp_path / 'run' / 'encoder.safetensors', 3, False),
        (tmp_path / 'out' / 'model.safetensors', 3, False),
        (tmp_path / 'bare.pth', 1, True),
    ):
        found = import_encoder(file)
        assert (found.encoder.config['heads'], found.guessed) == (heads, guessed)
        assert ('is a guess' in CliRunner().invoke(app, ['import', str(file)]).stdout) == guessed
    assert not import_encoder(tmp_path / 'bare.pth', heads=3).guessed


def test_the_commands_round_trip(tmp_path):
    encoder = lively(Encoder(**SHAPE))
    torch.save({'model': encoder.state_dict() | noise('mask_token')}, tmp_path / 'official.pth')
    done = CliRunner().invoke(
        app, ['import', str(tmp_path / 'official.pth'), '--heads', '1', '--to', str(tmp_path / 'out')]
    )
    assert (
        done.exit_code == 0
        and 'left out  mask_token: stands for hidden patches' in done.stdout
        and 'tensors matched: size 32, patch 8, width 64' in done.stdout
    )
    assert all(
        v.equal(encoder.state_dict()[k]) for k, v in load_file(tmp_path / 'out' / 'model.safetensors').items()
    )
    save_encoder(encoder, tmp_path / 'run', {})
    done = CliRunner().invoke(
        app, ['export', str(tmp_path / 'run' / 'encoder.safetensors'), str(tmp_path / 'again')]
    )
    assert done.exit_code == 0 and 'local-dir:' in done.stdout
    assert (tmp_path / 'again' / 'model.safetensors').read_bytes() == (
        tmp_path / 'out' / 'model.safetensors'
    ).read_bytes()

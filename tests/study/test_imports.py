"Official checkpoints and those of other libraries are imported, and other files are refused."

import argparse
import json
import re
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
from mimstudy.evaluate.features import extract_features
from mimstudy.evaluate.finetune import FineTune
from mimstudy.evaluate.segmentation import Segmenter
from mimstudy.evaluate.upernet import UperNet
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.finetuning import prepare_finetuning
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.views import normalise
from mimstudy.cli.commands import app
from mimstudy.methods.catalogue import build_method
from mimstudy.papers.downstream import downstream_config
from mimstudy.study.downstream import build_downstream
from mimstudy.study.exports import export_encoder, write_timm
from mimstudy.study.imports import import_encoder
from mimstudy.study.timm_models import open_timm
from mimstudy.study.encoder_files import load_encoder, save_encoder

SHAPE = dict(size=32, patch=8, width=64, depth=2, heads=1)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomised(encoder):
    "The encoder with random values in all parameters, also in those that start at 0 or 1."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return encoder.eval()


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


# layouts of other libraries, made from timm's models with random weights

TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)


def timm_model(name, **arguments):
    return randomised(open_timm(name, TINY | arguments))


def dinov2_registers(model):
    "The names of DINOv2's release: positions of the patches and of [CLS] in one tensor."
    state = model.state_dict()
    state['pos_embed'] = torch.cat([state['cls_token'] * 0.5, state['pos_embed']], 1)
    state['cls_token'] = state['cls_token'] * 0.5
    state['register_tokens'] = state.pop('reg_token')
    return state | zeros('mask_token')


def dinov3(model):
    "The names of DINOv3's release."
    names = (('reg_token', 'storage_tokens'), ('gamma_1', 'ls1.gamma'), ('gamma_2', 'ls2.gamma'))
    out = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        out[name] = value
    extras = ('mask_token', 'rope_embed.periods', 'blocks.0.attn.qkv.bias', 'blocks.0.attn.qkv.bias_mask')
    return out | {name: torch.zeros(192) for name in extras}


def deit3(model):
    return {
        name.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): value
        for name, value in model.state_dict().items()
    }


OPENAI = (
    ('patch_embed.proj', 'conv1'),
    ('pos_embed', 'positional_embedding'),
    ('norm_pre', 'ln_pre'),
    ('mlp.fc1', 'mlp.c_fc'),
    ('mlp.fc2', 'mlp.c_proj'),
    ('attn.qkv.', 'attn.in_proj_'),
    ('attn.proj', 'attn.out_proj'),
    ('blocks.', 'transformer.resblocks.'),
    ('.norm', '.ln_'),
    ('cls_token', 'class_embedding'),
)


def openai_clip(model):
    "The names of OpenAI's and OpenCLIP's image tower, beside a text tower."
    out = zeros('token_embedding.weight', 'transformer.resblocks.0.ln_1.weight', 'logit_scale')
    for name, value in model.state_dict().items():
        for ours, theirs in OPENAI:
            name = name.replace(ours, theirs)
        if name.startswith('norm.'):
            name = name.replace('norm.', 'ln_post.')
        if name == 'class_embedding':
            value = value[0, 0]
        out[f'visual.{name}'] = value[0] if name == 'positional_embedding' else value
    return out


def renamed(model, names, prefix=''):
    "The state dict with each name replaced by the patterns, in order."
    out = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        out[prefix + name] = value
    return out


TORCHVISION = (
    ('^cls_token', 'class_token'),
    ('^patch_embed.proj', 'conv_proj'),
    ('^pos_embed', 'encoder.pos_embedding'),
    (r'^blocks\.', 'encoder.layers.encoder_layer_'),
    (r'\.norm', '.ln_'),
    ('^norm', 'encoder.ln'),
    (r'attn\.qkv\.', 'self_attention.in_proj_'),
    (r'attn\.proj', 'self_attention.out_proj'),
    (r'mlp\.fc1', 'mlp.0'),
    (r'mlp\.fc2', 'mlp.3'),
)
TRANSFORMERS = (
    ('^(cls_token)', r'embeddings.\1'),
    ('^dist_token', 'embeddings.distillation_token'),
    ('^patch_embed.proj', 'embeddings.patch_embeddings.projection'),
    ('^norm', 'layernorm'),
    ('^pos_embed', 'embeddings.position_embeddings'),
    (r'^blocks\.', 'encoder.layer.'),
    (r'\.norm1', '.layernorm_before'),
    (r'\.norm2', '.layernorm_after'),
    (r'attn\.qkv', 'qkv'),
    (r'attn\.proj', 'attention.output.dense'),
    (r'mlp\.fc1', 'intermediate.dense'),
    (r'mlp\.fc2', 'output.dense'),
)
TRANSFORMERS_CLIP = (
    ('^cls_token', 'embeddings.class_embedding'),
    ('^patch_embed.proj', 'embeddings.patch_embedding'),
    ('^pos_embed', 'embeddings.position_embedding.weight'),
    (r'^norm_pre\.', 'pre_layrnorm.'),
    (r'^norm\.', 'post_layernorm.'),
    (r'^blocks\.', 'encoder.layers.'),
    (r'\.norm([12])', r'.layer_norm\1'),
    (r'attn\.qkv', 'qkv'),
    (r'attn\.proj', 'self_attn.out_proj'),
)


def split_qkv(state, names):
    "Queries, keys and values as three matrices with these names."
    out = {}
    for name, value in state.items():
        parts = zip(names, value.chunk(3)) if '.qkv.' in name else [('', value)]
        for part, chunk in parts:
            out[name.replace('.qkv.', f'.{part}.')] = chunk
    return out


def transformers_vit(model):
    names = [f'attention.attention.{part}' for part in ('query', 'key', 'value')]
    return split_qkv(renamed(model, TRANSFORMERS, 'vit.'), names) | zeros('classifier.weight')


def transformers_clip(model):
    "With the shapes of transformers: no leading dimensions of 1."
    state = split_qkv(
        renamed(model, TRANSFORMERS_CLIP, 'vision_model.'), [f'self_attn.{p}_proj' for p in 'qkv']
    )
    for name in state:
        if 'class_embedding' in name:
            state[name] = state[name][0, 0]
        if 'position_embedding' in name:
            state[name] = state[name][0]
    return state | zeros('text_model.final_layer_norm.weight', 'logit_scale')


def state(model):
    return model.state_dict()


OTHER_LIBRARIES = {  # label -> timm's name, arguments, the layout, and whether an `Encoder` results
    'timm, plain': ('vit_tiny_patch16_224', {}, state, True),
    'timm, DINOv2 with registers': ('vit_small_patch14_reg4_dinov2', {}, state, False),
    'DINOv2': ('vit_small_patch14_dinov2', {}, lambda m: m.state_dict() | zeros('mask_token'), True),
    'DINOv2 with registers': ('vit_small_patch14_reg4_dinov2', {}, dinov2_registers, False),
    'DINOv2 with SwiGLU': ('vit_giant_patch14_dinov2', dict(mlp_ratio=4.0), state, False),
    'DINOv3': ('vit_small_patch16_dinov3', {}, dinov3, False),
    'timm, DINOv3': ('vit_small_patch16_dinov3', {}, state, False),
    'DINOv3 with biases': ('vit_small_patch16_dinov3_qkvb', {}, state, False),
    'DeiT III': ('deit3_small_patch16_224', {}, deit3, False),
    'distilled DeiT': ('deit_tiny_distilled_patch16_224', {}, lambda m: {'model': m.state_dict()}, False),
    'OpenCLIP': ('vit_base_patch16_clip_224', {}, openai_clip, False),
    'OpenCLIP with a tower of timm': (
        'vit_base_patch16_siglip_224',
        {},
        lambda m: prefixed('visual.trunk.', m.state_dict()),
        False,
    ),
    'timm, SigLIP': ('vit_base_patch16_siglip_224', {}, state, False),
    'fine-tuned MAE': ('vit_base_patch16_224', dict(global_pool='avg'), state, False),
    'without biases': ('vit_base_patch16_224', dict(qkv_bias=False), state, False),
    'normalised queries and keys': ('vit_base_patch16_224', dict(qk_norm=True), state, False),
    'transformers, ViT': ('vit_tiny_patch16_224', {}, transformers_vit, True),
    'transformers, DeiT': ('deit_tiny_distilled_patch16_224', {}, transformers_vit, False),
    'transformers, CLIP': ('vit_base_patch16_clip_224', {}, transformers_clip, False),
    'transformers, SigLIP': ('vit_base_patch16_siglip_gap_224', {}, transformers_clip, False),
    'torchvision': ('vit_tiny_patch16_224', {}, lambda m: renamed(m, TORCHVISION), True),
}


@pytest.mark.parametrize('label', OTHER_LIBRARIES)
def test_layouts_of_other_libraries(label):
    "The features are those of the source; a state dict is accepted as well as a file."
    name, arguments, layout, own = OTHER_LIBRARIES[label]
    model = timm_model(name, **arguments)
    found = import_encoder(layout(model), heads=2)
    with torch.no_grad():
        assert_close(found.encoder.forward_features(X), model.forward_features(X), rel=1e-6)
        if 'DINOv3' not in label:
            assert_close(found.encoder(X), model(X), rel=1e-6)
    assert isinstance(found.encoder, Encoder) == own
    reasons = found.left_out.values()
    assert 'is not a part of the encoder' not in reasons, found.left_out


def test_torchvision_itself():
    import torchvision

    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128)
    randomised(model)
    encoder = import_encoder(model.state_dict(), heads=2).encoder
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(X)], 1)
    with torch.no_grad():
        assert_close(encoder.forward_features(X), model.encoder(tokens), rel=1e-5)


def hub_folder(folder, name, arguments, **pretrained_cfg):
    "A folder of the Hugging Face hub as timm writes it, and its model."
    model = timm_model(name, **arguments)
    folder.mkdir()
    save_file(model.state_dict(), folder / 'model.safetensors')
    config = dict(architecture=name, model_args=TINY | arguments, pretrained_cfg=pretrained_cfg)
    (folder / 'config.json').write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    'name', ['eva02_tiny_patch14_224', 'vit_base_patch16_clip_quickgelu_224', 'beit3_base_patch16_224']
)
def test_a_folder_of_a_hub_needs_no_option(name, tmp_path):
    "What weights do not show, rotary positions and the activation, is in its config.json."
    model = hub_folder(tmp_path / 'hub', name, {}, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])
    found = import_encoder(tmp_path / 'hub')
    with torch.no_grad():
        assert_close(found.encoder.forward_features(X), model.forward_features(X), rel=1e-6)
    assert found.guessed == [] and found.shape['heads'] == 2
    write_timm(found.encoder, tmp_path / 'out', {})
    again = import_encoder(tmp_path / 'out').encoder
    with torch.no_grad():
        assert again.forward_features(X).equal(found.encoder.forward_features(X))
    assert again.pretrained_cfg['mean'] == (0.5, 0.4, 0.3)


def test_a_model_by_its_name():
    rotary = dict(TINY, depth=1, use_abs_pos_emb=False)
    with pytest.raises(StudyError, match='give its name with --model'):
        import_encoder(open_timm('eva02_tiny_patch14_224', rotary).state_dict())
    model = randomised(open_timm('test_vit3'))
    found = import_encoder(model.state_dict(), model='test_vit3.r160_in1k')
    x = torch.rand(1, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        assert found.encoder.forward_features(x).equal(model.forward_features(x))
    assert found.guessed == []
    with pytest.raises(StudyError, match='did you mean'):
        import_encoder(model.state_dict(), model='test_vit33')
    with pytest.raises(StudyError, match='lacks|has the shape'):
        import_encoder(model.state_dict(), model='test_vit')


@pytest.mark.parametrize(
    'config',
    [
        dict(architecture='vit_tiny_patch16_224', model_args=dict(checkpoint_path='/etc/passwd')),
        dict(architecture='vit_tiny_patch16_224', model_args=dict(embed_layer='PatchEmbed', img_size={})),
        dict(architecture='resnet18'),
        dict(pretrained_cfg=dict(mean=['a', 0, 0], std=[1, 1, 1])),
        dict(pretrained_cfg=dict(mean=[0, 0, 0], std=[1, 0, 1])),
        '[' * 10**5,
    ],
)
def test_a_configuration_that_is_not_accepted(config, tmp_path):
    save_file(timm_model('vit_tiny_patch16_224').state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    check_refused(mimstudy('import', tmp_path))


# the statistics of images


class Images:
    "Four images with labels, as a dataset."

    classes = ['a', 'b']
    pixels = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def __len__(self):
        return 4

    def batches(self, index):
        for i in index:
            yield self.pixels[i], torch.tensor([0, 1, 0, 1])[i]


OTHER = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def features_of_timm(model, x):
    "The mean patch token of each block, with images normalised by hand."
    mean, std = (torch.tensor(OTHER[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():
        blocks = model.forward_intermediates(
            (x / 255 - mean) / std, norm=False, output_fmt='NLC', intermediates_only=True
        )
    return [block.mean(1) for block in blocks]


def test_statistics_travel_with_the_encoder(tmp_path):
    "From a hub's folder into the features, through a file of this study, and out again."
    model = hub_folder(tmp_path / 'hub', 'vit_tiny_patch16_224', {}, **OTHER)
    encoder = import_encoder(tmp_path / 'hub').encoder
    expected = features_of_timm(model, Images.pixels.float())
    save_encoder(encoder, tmp_path / 'run', {})
    export_encoder(tmp_path / 'run', tmp_path / 'out')
    for one in (encoder, load_encoder(tmp_path / 'run'), import_encoder(tmp_path / 'out').encoder):
        table = extract_features(one, Images(), 'cpu').table
        for block, value in enumerate(expected, start=1):
            assert_close(table[block, 'patch'], value, rel=1e-5)
    hub = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert tuple(hub.pretrained_cfg['mean']) == OTHER['mean']


@pytest.mark.parametrize('task', [FineTune, Segmenter, UperNet])
def test_tasks_that_train_further_use_them(task):
    "What a task gets is normalised with the statistics of ImageNet."
    encoder = randomised(Encoder(**SHAPE))
    encoder.pretrained_cfg = OTHER
    seen = []
    options = dict(channels=8) if task is UperNet else {}
    ready = task(prepare_finetuning(encoder), 3, **options).eval()
    ready.encoder.patch_embed.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = Images.pixels.float() / 255
    with torch.no_grad():
        ready.predict(normalise(x), *([] if task is FineTune else [32]))
    mean, std = (torch.tensor(OTHER[name]).view(3, 1, 1) for name in ('mean', 'std'))
    assert_close(seen[0], (x - mean) / std, rel=1e-5)


@pytest.mark.parametrize(
    'name, layout, mean',
    [
        ('vit_base_patch16_clip_224', openai_clip, 0.4814),
        ('vit_base_patch16_siglip_224', state, 0.5),
        ('vit_tiny_patch16_224', state, 0.485),
    ],
)
def test_assumed_statistics_are_reported(name, layout, mean):
    found = import_encoder(layout(timm_model(name)))
    assert found.encoder.pretrained_cfg['mean'][0] == pytest.approx(mean, abs=1e-3)
    assert 'the normalisation is a guess; --statistics gives another' in found.lines()
    named = import_encoder(layout(timm_model(name)), statistics='inception')
    assert named.encoder.pretrained_cfg['mean'] == (0.5, 0.5, 0.5) and 'statistics' not in named.guessed


def test_statistics_of_transformers(tmp_path):
    save_file(transformers_vit(timm_model('vit_tiny_patch16_224')), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(dict(hidden_act='gelu', num_attention_heads=2)))
    values = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(values))
    found = import_encoder(tmp_path)
    assert found.encoder.pretrained_cfg['std'] == (0.5, 0.5, 0.5) and found.guessed == []


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


@pytest.mark.parametrize('name', ['vit_base_patch16_siglip_224', 'vit_small_patch14_reg4_dinov2'])
def test_an_encoder_that_stayed_a_model_of_timm_is_not_trained_further(name, tmp_path):
    "Fine-tuning, segmentation, methods and files of encoders refuse it in one line."
    encoder = import_encoder(timm_model(name).state_dict()).encoder
    for use in (
        lambda: prepare_finetuning(encoder),
        lambda: build_downstream(downstream_config('conmim_finetune_b16'), encoder, 3),
        lambda: FineTune(encoder, 3),
        lambda: Segmenter(encoder, 3),
        lambda: UperNet(encoder, 3, channels=8),
        lambda: build_method('conmim', encoder),
        lambda: save_encoder(encoder, tmp_path, {}),
    ):
        with pytest.raises(StudyError, match='needs an encoder of this study, not a .* of timm') as error:
            use()
        assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


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
    'zero.pth': 'zero.pth is not a checkpoint: it is empty',
    'zero.safetensors': 'zero.safetensors is not a checkpoint: it is empty',
    'cut.safetensors': 'cut.safetensors is damaged or incomplete',
    'cut.pth': 'cut.pth is not a checkpoint: it is damaged or incomplete',
    'old.pth': 'old.pth is not a checkpoint: it is damaged or incomplete',
    'folder': 'folder is a folder without model.safetensors',
    'keras.h5': 'it is an HDF5 file',
    'flax.npz': 'it is a NumPy archive',
    'program.pt': 'it is a TorchScript program',
    'archive.zip': 'it is an archive without weights',
    'lfs.bin': 'it is a pointer of Git LFS',
    'noise.bin': 'neither PyTorch nor safetensors wrote it',
    'renamed.pth': 'match nothing',
    'other.safetensors': 'match nothing',
    'text.pth': 'text.pth is not a checkpoint: it is a text file',
    'text.safetensors': 'text.safetensors is not a checkpoint: it is a text file',
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
    for file in ('zero.pth', 'zero.safetensors'):
        (tmp_path / file).touch()
    for file, write in (('cut.safetensors', save_file), ('cut.pth', torch.save)):
        write(state, file)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:2000])
    torch.save(state, 'old.pth', _use_new_zipfile_serialization=False)
    (tmp_path / 'old.pth').write_bytes((tmp_path / 'old.pth').read_bytes()[:2000])
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'keras.h5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))
    np.savez('flax.npz', w=np.zeros(3))
    with zipfile.ZipFile('program.pt', 'w') as archive:
        archive.writestr('program/constants.pkl', '')
        archive.writestr('program/data.pkl', '')
    with zipfile.ZipFile('archive.zip', 'w') as archive:
        archive.writestr('a.txt', 'hello')
    (tmp_path / 'lfs.bin').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
    (tmp_path / 'noise.bin').write_bytes(bytes(range(256)))
    save_file({'w': torch.zeros(2)}, 'renamed.pth')


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
    torch.save(Encoder(**SHAPE).state_dict(), tmp_path / 'fine.pth')
    check_refused(mimstudy('import', tmp_path / 'fine.pth', '--part', 'techer'), 'did you mean teacher')


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
        assert (found.encoder.config['heads'], 'heads' in found.guessed) == (heads, guessed)
        assert ('heads is a guess' in mimstudy('import', tmp_path / file).stdout) == guessed
    assert 'heads' not in import_encoder(tmp_path / 'bare.pth', heads=3).guessed


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

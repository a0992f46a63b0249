"""Official pre-trainings of the golden files are loaded from a file: the loss is theirs, every tensor is
accounted for, and the training goes on."""

import argparse
from math import inf

import pytest
import torch
from conftest import assert_close, sub

from mimstudy.core.errors import StudyError
from mimstudy.core.task import Batch
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.train import train
from mimstudy.methods.beit import beit
from mimstudy.methods.conmim import conmim
from mimstudy.methods.dino import dino
from mimstudy.methods.mae import mae
from mimstudy.methods.maskfeat import maskfeat
from mimstudy.methods.semanticmim import semanticmim
from mimstudy.methods.simmim import simmim
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.scales import at_scale
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import make_mask
from mimstudy.parts.pathways import Substitute
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.study.build import build_batch_function
from mimstudy.study.task_imports import load_official

SMALL = dict(width=32, heads=4)
BESIDE = dict(epoch=3, args=argparse.Namespace(lr=5e-4), optimizer=dict(state={}))  # as training scripts do
PHOTO_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
PHOTO_STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


class StoredCodes(torch.nn.Module):
    "A tokenizer that returns stored codes; it has a weight, as real ones do."

    vocabulary, stride = 24, 8

    def __init__(self, ids):
        super().__init__()
        self.ids = ids.long().view(-1, 8, 8)
        self.weight = torch.nn.Parameter(torch.ones(3))

    def codes(self, x):
        return self.ids


def conmim_case(g):
    task = conmim(RelativeEncoder(size=112, patch=8, depth=2, **SMALL), hidden=64, out=16)
    batch = Batch([g['samples'].float(), g['samples_aug'].float()], make_mask(g['mask'].flatten(1)))
    return task, {'model': sub(g, 'student.')}, batch, g['train.loss']


def beit_case(g):
    encoder = RelativeEncoder(size=64, patch=8, depth=2, mlp_ratio=2, **SMALL)
    batch = Batch([g['images'].float()], make_mask(g['mask'].bool().flatten(1)))
    state = {f'module.{name}': value for name, value in sub(g, 'model.').items()}
    return beit(encoder, StoredCodes(g['ids']), pathway=Substitute), {'model': state}, batch, g['loss']


def mae_case(g):
    task = mae(
        Encoder(size=64, patch=8, depth=2, mlp_ratio=2, **SMALL), norm=False, width=24, depth=1, heads=4
    )
    batch = Batch([g['images'].float()], make_mask(g['mask'].bool()))
    return task, {'model': sub(g, 'model.')}, batch, g['loss.norm_pix_False']


def simmim_case(g):
    task = simmim(RelativeEncoder(size=64, patch=16, depth=2, mlp_ratio=2, **SMALL))
    batch = Batch([g['images'].float()], make_mask(g['mask'].bool().flatten(1)))
    return task, {'model': sub(g, 'model.')}, batch, g['loss']


def mmengine_state(g):
    "Backbone and head in one state dict, with a tensor of the target."
    names = [name for name in g if name.startswith(('backbone.', 'head.', 'neck.'))]
    return {'state_dict': {name: g[name] for name in names} | {'target_generator.weight_x': torch.zeros(2)}}


def semanticmim_beit_case(g):
    encoder = Encoder(size=64, patch=8, depth=3, layer_scale=0.1, prefix=8, mlp_ratio=2, **SMALL)
    mask = make_mask(~g['img_index'].flatten(1), g['mask_index'].flatten(1))
    task = semanticmim(beit)(encoder, tokenizer=StoredCodes(g['target_ids']))
    return task, mmengine_state(g), Batch([g['images'].float()], mask), g['loss']


def semanticmim_maskfeat_case(g):
    encoder = Encoder(size=224, patch=16, depth=2, layer_scale=None, prefix=8, mlp_ratio=2, **SMALL)
    mask = make_mask(~g['img_index'].flatten(1), g['mask_index'].flatten(1))
    batch = Batch([(g['images_u8'].float() - PHOTO_MEAN) / PHOTO_STD], mask)
    return semanticmim(maskfeat)(encoder), mmengine_state(g), batch, g['loss']


CASES = {
    'conmim_model': conmim_case,
    'semanticmim_beit_k8': semanticmim_beit_case,
    'semanticmim_maskfeat_k8': semanticmim_maskfeat_case,
    'beit': beit_case,
    'mae': mae_case,
    'simmim': simmim_case,
}


@pytest.fixture(params=CASES)
def case(request, golden, tmp_path):
    "A task with random weights, the official files (student, EMA teacher or None), a batch, its loss."
    torch.manual_seed(1)
    g = golden(request.param)
    task, content, batch, loss = CASES[request.param](g)
    student, teacher = tmp_path / 'checkpoint-799.pth', None
    torch.save(content | BESIDE, student)
    if request.param == 'conmim_model':
        teacher = tmp_path / 'checkpoint_copy-799.pth'
        torch.save({'model': sub(g, 'teacher.')} | BESIDE, teacher)
    return task, student, teacher, batch, loss


def test_the_loss_is_the_official_one(case):
    task, student, teacher, batch, loss = case
    before = task(batch, 0.0)['loss'].detach()
    assert abs(before - loss) > 1e-3 * loss
    load_official(task, student, teacher)
    assert_close(task(batch, 0.0)['loss'].detach(), loss)


def test_every_tensor_is_accounted_for(case):
    task, student, teacher, _, _ = case
    found = load_official(task, student, teacher)
    assert {*found.matched, *found.kept} == set(task.state_dict())
    assert all(p in found.matched for p, w in task.named_parameters() if w.requires_grad)
    official = torch.load(student, weights_only=False)
    stored = {*official.get('model', official.get('state_dict'))}
    if 'decoder_pos_embed' in stored:
        assert found.left_out == {'decoder_pos_embed': 'is computed, not learned'}
    elif teacher:
        assert found.left_out == {'mask_token (teacher)': 'the EMA teacher has no such tensor'}
    else:
        assert set(found.left_out) == stored & {'target_generator.weight_x'}
    assert all(any(name in line for line in found.lines()) for name in found.left_out | found.kept)


MISSING = {  # an official name -> the name in a task
    'conmim_model': {
        'mask_token': 'pathway.mask_token',
        'projectors.4.running_mean': 'head.4.running_mean',
        'blocks.1.attn.q_bias': 'pathway.encoder.blocks.1.attn.q_bias',
    },
    'semanticmim_beit_k8': {
        'backbone.mask_token': 'pathway.mask_token',
        'backbone.extra_layers.2.attn.kv_proj.weight': 'pathway.blocks.2.attn.kv.weight',
        'backbone.extra_layers.1.gamma_2': 'pathway.blocks.1.ls2.gamma',
        'head.cls_head.bias': 'head.bias',
    },
    'semanticmim_maskfeat_k8': {
        'backbone.extra_layers.0.attn.q.bias': 'pathway.blocks.0.attn.q.bias',
        'neck.fc.weight': 'head.weight',
    },
    'beit': {'module.lm_head.weight': 'head.weight', 'module.norm.bias': 'pathway.encoder.norm.bias'},
    'mae': {
        'decoder_embed.bias': 'pathway.decoder_embed.bias',
        'decoder_blocks.0.attn.qkv.weight': 'pathway.blocks.0.attn.qkv.weight',
        'decoder_norm.weight': 'pathway.norm.weight',
        'decoder_pred.weight': 'head.weight',
    },
    'simmim': {'encoder.mask_token': 'pathway.mask_token', 'decoder.0.bias': 'head.bias'},
}


@pytest.mark.parametrize('name', MISSING)
def test_a_missing_tensor_is_named(golden, name):
    "The task stays as it was."
    task, content, _, _ = CASES[name](golden(name))
    before = {key: w.clone() for key, w in task.state_dict().items()}
    state = next(iter(content.values()))
    for official, expected in MISSING[name].items():
        rest = {key: w for key, w in state.items() if key != official}
        assert len(rest) == len(state) - 1
        with pytest.raises(StudyError, match=rf'lacks 1 of the .* tensors of the task: {expected}$'):
            load_official(task, rest)
    assert all(w.equal(before[key]) for key, w in task.state_dict().items())


def test_a_teacher_without_a_checkpoint_is_a_copy(golden):
    task, content, _, _ = conmim_case(golden('conmim_model'))
    found = load_official(task, content)
    assert found.teacher == 'is a copy of the student' and found.left_out == {}
    for teacher, student in zip(task.target.teacher.values(), task.target.teacher.students):
        for name, w in teacher.state_dict().items():
            assert w.equal(student.state_dict()[name])


def test_shapes_and_teachers_that_do_not_fit(golden):
    task, content, _, _ = conmim_case(golden('conmim_model'))
    for change, message in (
        ({'projectors.0.weight': torch.zeros(8, 32)}, r'head.0.weight has the shape \(8, 32\)'),
        ({'cls_token': torch.zeros(())}, r'pathway.encoder.cls_token has the shape \(\)'),
    ):
        with pytest.raises(StudyError, match=message):
            load_official(task, content['model'] | change)
        with pytest.raises(StudyError, match=message.replace('pathway', 'target.teacher')):
            load_official(task, content, teacher=content['model'] | change)
    other, official, _, _ = beit_case(golden('beit'))
    with pytest.raises(StudyError, match='no EMA teacher'):
        load_official(other, official, teacher=content)
    with pytest.raises(StudyError, match='build it with the configuration of the checkpoint'):
        load_official(other, content)


def test_other_methods_and_layouts_are_refused(golden):
    task, content, _, _ = semanticmim_beit_case(golden('semanticmim_beit_k8'))
    with pytest.raises(StudyError, match='not DINO; import_encoder'):
        load_official(dino(Encoder(size=32, patch=8, depth=1, **SMALL), out=8, hidden=8), content)
    for change in ({'layers.0.attn.q_proj.weight': None}, {'cls_token': torch.zeros(())}):
        state = sub(content['state_dict'], 'backbone.') | change
        with pytest.raises(StudyError, match='the state dict'):
            load_official(task, state)


def test_a_training_goes_on(golden):
    "One step from the official weights: the student moves, and the EMA teacher after it."
    g = golden('conmim_model')
    task, content, _, _ = conmim_case(g)
    load_official(task, content, teacher={'model': sub(g, 'teacher.')})
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    config = at_scale(pretraining('conmim_b16_300'), 'smoke').but(
        data=dict(size=112), optim=dict(epochs=1, batch=4, warmup=0, lr=1e-3)
    )
    pixels = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8)
    images = InMemoryDataset(pixels, torch.zeros(4, dtype=torch.long), ['all'])
    make_batch = build_batch_function(config)
    result = train(task, images, make_batch, config, device='cpu', precision='no', log_seconds=inf)
    assert result.steps == 1 and result.history.loss.notna().all()
    after = dict(task.named_parameters())
    for name in ('pathway.mask_token', 'pathway.encoder.cls_token', 'head.0.weight'):
        assert not after[name].equal(before[name])
    momentum = task.target.teacher.momentum
    name = 'target.teacher.encoder.cls_token'
    expected = momentum * before[name] + (1 - momentum) * after['pathway.encoder.cls_token']
    assert_close(after[name].detach(), expected.detach())

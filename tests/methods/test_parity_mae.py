"MAE against the official code: latent, prediction, both losses and every gradient."

import pytest
import torch
from conftest import assert_close, sub

from mimstudy.core.task import Batch
from mimstudy.methods.mae import mae
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.losses import masked_mse
from mimstudy.parts.masks import gather, make_mask
from mimstudy.parts.targets import Pixels, patchify
from mimstudy.study.task_imports import load_official, task_tensors


@pytest.fixture(scope='module')
def case(golden):
    g = golden('mae')
    encoder = Encoder(size=64, patch=8, width=32, depth=2, heads=4, mlp_ratio=2)
    task = mae(encoder, norm=False, width=24, depth=1, heads=4)
    load_official(task, sub(g, 'model.'))
    return g, task, Batch([g['images'].float()], make_mask(g['mask'].bool()))


def test_latent_and_prediction(case):
    g, task, batch = case
    visible = g['noise'].argsort(1)[:, :16]  # in the official order; ours is raster order
    order = visible.argsort(1)
    latent = torch.cat([g['latent'][:, :1], gather(g['latent'][:, 1:], order)], 1)
    assert_close(task.pathway.latent(batch.views[0], batch.mask), latent)
    assert_close(task.predict(batch), gather(g['pred'], batch.mask.predict))
    assert_close(patchify(batch.views[0][:1], 8)[:, :4], g['patches'])


@pytest.mark.parametrize('norm', [False, True])
def test_losses(case, norm):
    g, task, batch = case
    target = Pixels(8, norm)(batch)
    assert_close(task.criterion(task.predict(batch), target, batch.mask).detach(), g[f'loss.norm_pix_{norm}'])
    pred = g['lossonly.pred'].clone().requires_grad_()
    loss = masked_mse(gather(pred, batch.mask.predict), target, batch.mask)
    loss.backward()
    assert_close(loss.detach(), g[f'lossonly.loss.norm_pix_{norm}'])
    assert_close(pred.grad.norm(), g[f'lossonly.grad_norm.norm_pix_{norm}'])


def test_gradients(case):
    g, task, batch = case
    task.zero_grad()
    task(batch, 0.0)['loss'].backward()
    ours, theirs = dict(task.named_parameters()), task_tensors(sub(g, 'grad.'), task)
    for name, grad in theirs.items():
        assert_close(ours[name].grad, grad, rel=1e-5)
    assert {n for n, p in ours.items() if p.grad is not None} == set(theirs)

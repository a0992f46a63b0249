"Segmentation: the frozen encoder stays the same, ignored pixels do not count, scores cover all pixels."

import pytest
import torch
from conftest import assert_close
from small_encoder import BOTH_ENCODERS, SCENES, X, small_encoder
from torch import nn
from torch.nn import functional as F

from mimstudy.core.scenes import REGIONS
from mimstudy.core.task import Batch
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.segmentation_data import IGNORE_LABEL
from mimstudy.evaluate.features import pixel_loss
from mimstudy.evaluate.segmentation import (
    Segmenter,
    confusion_matrix,
    mean_iou,
    segmentation_scores,
)
from mimstudy.evaluate.upernet import UperNet
from mimstudy.parts.finetuning import prepare_finetuning


def test_the_frozen_encoder_stays_as_it_is():
    task = Segmenter(prepare_finetuning(small_encoder()), len(REGIONS), output_size=16)
    state = small_encoder().state_dict()
    assert not task.train().encoder.training
    task(Batch([X], label=SCENES.maps), 0.0)['loss'].backward()
    assert all(p.grad is None for p in task.encoder.parameters())
    assert all(p.grad is not None for p in task.heads.parameters())
    assert all(w.equal(state[name]) for name, w in task.encoder.state_dict().items() if name in state)
    assert task.maps(X)[1].equal(task.maps(X)[1]), 'stochastic depth is off'


def test_scores_are_those_of_all_pixels():
    torch.manual_seed(0)
    task = Segmenter(prepare_finetuning(small_encoder()), len(REGIONS))
    val = InMemoryDataset(SCENES.images, SCENES.maps, list(REGIONS))
    for head in task.heads:
        nn.init.normal_(head.weight)
    slow = []
    for prediction in task.eval().predict(X, 32):
        slow.append(mean_iou(confusion_matrix(prediction, SCENES.maps.long(), len(REGIONS))))
    assert segmentation_scores(task, val, 'cpu', batch=7) == pytest.approx(slow)
    assert len(slow) == 3 and len(set(slow)) > 1


def test_ignored_pixels_do_not_count():
    "The loss is the mean over the other pixels."
    maps = SCENES.maps.clone()
    maps[:, :16] = 255
    task = UperNet(prepare_finetuning(small_encoder(width=48)), len(REGIONS), 16, auxiliary_weight=0.0).eval()
    logits = task.logits(task.maps(X), 32)
    expected = F.cross_entropy(logits[:, :, 16:], SCENES.maps[:, 16:].long())
    assert_close(task(Batch([X], label=maps), 0.0)['loss'], expected)

    heads = Segmenter(prepare_finetuning(small_encoder()), len(REGIONS), output_size=32)
    expected = 0.0
    for head, features in zip(heads.heads, heads.maps(X), strict=True):
        logits = F.interpolate(head(features), (32, 32), mode='bilinear')
        expected = expected + F.cross_entropy(logits[:, :, 16:], SCENES.maps[:, 16:].long())
    assert_close(heads(Batch([X], label=maps), 0.0)['loss'], expected)


@BOTH_ENCODERS
def test_upernet_learns_and_trains_every_weight(encoder_class):
    torch.manual_seed(0)
    encoder = small_encoder(encoder_class, drop_path=0.0, init='xavier')
    task = UperNet(prepare_finetuning(encoder), len(REGIONS), 16)
    optimiser = torch.optim.AdamW(task.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = task(Batch([X], label=SCENES.maps), 0.0)['loss']
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    assert task.eval().predict(X, 20)[0].shape == (24, 20, 20)


def test_a_batch_without_classes_has_no_loss():
    "Pixels that are ignored do not count; if all are, the loss is 0 and its gradient too, not NaN."
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    labels = torch.randint(5, (2, 8, 8))
    labels[0] = IGNORE_LABEL
    expected = torch.nn.functional.cross_entropy(logits[1:], labels[1:])
    assert torch.isclose(pixel_loss(logits, labels), expected)
    loss = pixel_loss(logits, torch.full_like(labels, IGNORE_LABEL))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()

"Fine-tuning: every weight is trained, and the score is the share of images that are classified correctly."

import pytest
import torch
from small_encoder import BOTH_ENCODERS, SCENES, X, small_encoder

from mimstudy.core.scenes import CLASSES
from mimstudy.core.task import Batch
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.evaluate.finetune import FineTune, top1
from mimstudy.parts.finetuning import prepare_finetuning


@BOTH_ENCODERS
def test_every_weight_gets_a_gradient(encoder_class):
    encoder = prepare_finetuning(small_encoder(encoder_class, drop_path=0.0))
    task = FineTune(encoder, len(CLASSES), mixup=0, cutmix=0, smoothing=0.0).train()
    with torch.no_grad():
        task.head.weight.mul_(1000)
    task(Batch([X], label=SCENES.label), 0.0)['loss'].backward()
    without = []
    for name, p in task.named_parameters():
        unused = name == 'encoder.mask_token' or not p.requires_grad
        if p.grad is None or (not unused and p.grad.abs().sum() == 0):
            without.append(name)
    assert without == []


def test_the_score_is_the_share_of_correct_images():
    task = FineTune(prepare_finetuning(small_encoder()), 3, mixup=0, cutmix=0).train()
    images = InMemoryDataset(SCENES.images, torch.arange(24) % 3, list('abc'))
    with torch.no_grad():
        task.head.weight.zero_()
        task.head.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    assert top1(task, images, 'cpu') == pytest.approx(100 / 3) and task.training

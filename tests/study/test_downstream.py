"Downstream trainings: every one takes every encoder, resumes, and refuses what does not fit."

import pytest
import torch
from small_encoder import SCENES, seeded

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import CLASSES, REGIONS
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.papers.downstream import DOWNSTREAM, downstream_config
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.scales import at_scale, scale_downstream
from mimstudy.study.build import build_encoder
from mimstudy.study.downstream import build_downstream, downstream_batch_function, train_downstream


def smoke(name, base='maskfeat'):
    "A pre-training and a downstream training at smoke scale."
    pretrained = at_scale(pretraining(base), 'smoke')
    return pretrained, scale_downstream(downstream_config(name), pretrained, 'smoke')


@pytest.mark.parametrize('name', DOWNSTREAM)
@pytest.mark.parametrize('base', ['conmim_b16_300', 'semanticmim_maskfeat', 'mae'])
def test_every_downstream_training_takes_every_encoder(name, base):
    pretrained, config = smoke(name, base)
    task = build_downstream(config, build_encoder(pretrained), 12).train()
    labels = SCENES.label if config.task == 'finetune' else SCENES.maps.clamp(max=11)
    images = InMemoryDataset(SCENES.images, labels, CLASSES)
    batch = downstream_batch_function(config, images)(SCENES.images, labels, seeded())
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())


def test_a_finished_training_is_opened_and_another_is_refused(tmp_path):
    pretrained, config = smoke('semanticmim_voc')
    val = InMemoryDataset(SCENES.images, SCENES.maps, list(REGIONS))
    images = InMemoryDataset(SCENES.images.repeat(2, 1, 1, 1), SCENES.maps.repeat(2, 1, 1), list(REGIONS))
    encoder = build_encoder(pretrained)
    first = train_downstream('voc', config, encoder, tmp_path, splits=(images, val))
    again = train_downstream('voc', config, encoder, tmp_path, splits=(images, val))
    assert again.scores == first.scores
    assert again.seconds == pytest.approx(first.seconds, abs=0.5)
    with pytest.raises(StudyError, match='another encoder'):
        train_downstream('voc', config, build_encoder(pretrained, seed=1), tmp_path, splits=(images, val))
    with pytest.raises(StudyError):
        train_downstream('voc', config.but(optim=dict(lr=0.5)), encoder, tmp_path, splits=(images, val))


@pytest.mark.parametrize('names', ['abc', 'abce'])
def test_other_classes_are_refused(names):
    pretrained, config = smoke('semanticmim_finetune')
    labels = torch.arange(24) % 4
    images = InMemoryDataset(SCENES.images, labels, list('abcd'))
    val = InMemoryDataset(SCENES.images, labels % 3, list(names))
    with pytest.raises(StudyError, match='other classes'):
        train_downstream('finetune', config, build_encoder(pretrained), splits=(images, val))

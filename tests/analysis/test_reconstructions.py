"Reconstructions: the drawing of a true target is known, only hidden patches change, bad input."

import pytest
import torch
from conftest import assert_close

from mimstudy.analysis.reconstructions import reconstruct, reconstruction_figure, target_image
from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.methods.beit import beit
from mimstudy.methods.conmim import conmim
from mimstudy.methods.mae import mae
from mimstudy.methods.maskfeat import maskfeat
from mimstudy.methods.semanticmim import semanticmim
from mimstudy.methods.simmim import simmim
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.hog import HOG, glyphs, hog
from mimstudy.parts.masks import block_mask, independent_masks, random_mask
from mimstudy.parts.pathways import Substitute
from mimstudy.parts.targets import Codes, Pixels, patchify
from mimstudy.parts.tokenizers import DallE, KMeansCodes
from mimstudy.parts.views import normalise

IMAGES = scenes(3, 32).images
X = normalise(IMAGES.float() / 255)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokenizer():
    return KMeansCodes(16, 8).fit(scenes(16, 32, seed=1).images, seeded())


def encoder():
    torch.manual_seed(0)
    return Encoder(size=32, patch=8, width=32, depth=2, heads=4, prefix=2)


def test_true_targets_are_drawn_as_what_they_are():
    for target in (Pixels(8), Pixels(8, norm=True)):
        assert_close(target_image(target, target(Batch([X])), X), IMAGES / 255, 1e-4)
    for cell in (4, 8, 2):
        target = HOG(8, cell)
        assert_close(target_image(target, target(Batch([X])), X), glyphs(hog(X, cell)))
    codes = Codes(tokenizer(), 8)
    values = codes(Batch([X]))
    mean_patches = codes.tokenizer.mean_patches[values].view(3, 4, 4, 8, 8, 3)
    slow = torch.stack([torch.cat([torch.cat(list(row), 1) for row in image]) for image in mean_patches])
    assert_close(target_image(codes, values, X), slow.permute(0, 3, 1, 2))


@pytest.mark.parametrize('method', [simmim, mae, semanticmim(simmim), semanticmim(mae)])
def test_only_hidden_patches_are_predicted(method):
    task = method(encoder()).eval()
    mask = random_mask(3, (4, 4), 0.5, seeded(1))
    drawn = patchify(reconstruct(task, X, mask), 8)
    true = patchify(IMAGES / 255, 8)
    same = (drawn - true).abs().amax(2) < 1e-4
    assert torch.equal(same, ~mask.hidden)
    unhidden = patchify(X, 8)
    unhidden[mask.hidden] = 0.0  # the prediction is the same whatever is hidden
    prediction = task.predict(Batch([X], mask))
    if not task.target.norm:
        unhidden[mask.hidden] = prediction.flatten(0, 1)
        expected = target_image(task.target, unhidden, X)
        assert_close(reconstruct(task, X, mask), expected, 1e-4)


def test_codes_are_decoded_and_hog_is_drawn():
    mask = random_mask(3, (4, 4), 0.5, seeded(1))
    task = beit(encoder(), tokenizer()).eval()
    values = task.target(Batch([X]))
    values[mask.hidden] = task.predict(Batch([X], mask)).argmax(-1).flatten()
    assert_close(reconstruct(task, X, mask), target_image(task.target, values, X))
    assert reconstruct(maskfeat(encoder()).eval(), X, mask).shape == (3, 3, 128, 128)


def test_padding_of_block_masks_is_not_drawn():
    mask = block_mask(3, (4, 4), torch.tensor([2, 5, 8]), seeded(2), smallest=1)
    assert mask.weight is not None
    drawn = patchify(reconstruct(simmim(encoder(), Substitute).eval(), X, mask), 8)
    same = (drawn - patchify(IMAGES / 255, 8)).abs().amax(2) < 1e-4
    assert torch.equal(same, ~mask.hidden)


def test_figures_have_a_panel_for_each_column():
    mask = random_mask(3, (4, 4), 0.5, seeded(1))
    tasks = {'SimMIM': simmim(encoder()).eval(), 'MaskFeat': maskfeat(encoder()).eval()}
    figure = reconstruction_figure(tasks, X, mask)
    titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
    assert titles[:5] == ['image', 'visible', 'SimMIM', 'target of\nMaskFeat', 'MaskFeat']


def test_what_cannot_be_drawn_is_one_line():
    mask = random_mask(3, (4, 4), 0.5, seeded(1))
    with pytest.raises(StudyError, match='TeacherFeatures cannot be drawn'):
        reconstruct(conmim(encoder()).eval(), X, mask)
    with pytest.raises(StudyError, match='DallE cannot decode'):
        target_image(Codes(DallE(width=8, vocabulary=16), 8), torch.zeros(3, 16, dtype=torch.long), X)
    apart = independent_masks(3, (4, 4), 0.5, 0.25, seeded(1))
    with pytest.raises(StudyError, match='hidden patches are not predicted'):
        reconstruct(semanticmim(simmim)(encoder()).eval(), X, apart)

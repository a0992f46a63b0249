"CIM has no golden file: closed forms, slow twins in loops, and what must not happen."

import math

import pytest
import torch
from conftest import assert_close

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.methods.cim import cim, sample_codes, local_norm
from mimstudy.parts.dvae import DVAE
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import block_mask, random_mask
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.targets import patchify
from mimstudy.parts.tokenizers import DallE, KMeansCodes
from mimstudy.parts.views import normalise

IMAGES = scenes(24, size=32, seed=9).images
X = normalise(IMAGES.float() / 255)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def words():
    return KMeansCodes(16, 8).fit(IMAGES, seeded(), rounds=3)


MASKS = {
    'random': lambda n: random_mask(n, (4, 4), 0.5, seeded()),
    'ragged': lambda n: block_mask(n, (4, 4), 8, seeded(2), smallest=2),
}


def made(words, n=8, kind='random', encoder=Encoder, **options):
    torch.manual_seed(0)
    task = cim(encoder(size=32, patch=8, width=32, depth=3, heads=4), words, **options)
    return task, Batch([X[:n]], MASKS[kind](n))


def test_local_norm_by_loops():
    x = torch.randn(1, 3, 12, 12, generator=seeded())
    found = local_norm(x, 8)
    for c in range(3):
        for i in range(12):
            for j in range(12):
                near = torch.stack(
                    [
                        x[0, c, min(max(a, 0), 11), min(max(b, 0), 11)]
                        for a in range(i - 3, i + 5)
                        for b in range(j - 3, j + 5)
                    ]
                ).double()
                want = (x[0, c, i, j] - near.mean()) / (near.var(unbiased=False) + 0.01).sqrt()
                assert abs(found[0, c, i, j] - want) < 1e-4
    assert local_norm(torch.full((1, 3, 9, 9), 5.0)).abs().max() == 0
    assert_close(local_norm(x + 7.0), found, rel=1e-4)


@pytest.mark.parametrize('kind', MASKS)
def test_drawn_words(kind):
    mask, codes = MASKS[kind](8), torch.randint(16, (8, 16), generator=seeded())
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = sample_codes(torch.randn(*mask.predict.shape, 16), codes, mask)
        assert drawn[~mask.hidden].equal(codes[~mask.hidden]) and drawn.min() >= 0 and drawn.max() < 16
    certain = torch.full((*mask.predict.shape, 16), -1e4)
    certain[..., 3] = 0
    assert (sample_codes(certain, codes, mask)[mask.hidden] == 3).all()


def test_drawn_words_follow_the_softmax():
    torch.manual_seed(0)
    logits, mask = torch.randn(5), random_mask(20_000, (2, 1), 0.5, seeded())
    drawn = sample_codes(logits.expand(20_000, 1, 5), torch.zeros(20_000, 2, dtype=torch.long), mask)[
        mask.hidden
    ]
    assert (drawn.bincount(minlength=5) / 20_000 - logits.softmax(0)).abs().max() < 0.012


@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('restore', ['pixels', 'replaced'])
def test_the_losses_by_loops(words, kind, restore):
    task, batch = made(words, kind=kind, restore=restore)
    codes, logits = task.codes(batch), task.predict(batch)
    torch.manual_seed(5)
    drawn = sample_codes(logits, codes, batch.mask)
    torch.manual_seed(5)
    told = task(batch, 0.0)
    with torch.no_grad():
        said = task.enhance(task.decode(drawn))
    each = []
    for b in range(8):
        for m, j in enumerate(batch.mask.predict[b].tolist()):
            if batch.mask.weight is None or batch.mask.weight[b, m]:
                each.append(-logits[b, m].log_softmax(0)[codes[b, j]])
    assert_close(told['generator'], torch.stack(each).mean(), rel=1e-5)
    if restore == 'pixels':
        want = ((said - patchify(local_norm(X[:8]), 8)) ** 2).mean()
    else:
        p, gone = said[..., 0].sigmoid(), drawn != codes
        assert not gone[~batch.mask.hidden].any() and gone.any()
        want = -torch.where(gone, p.log(), (1 - p).log()).mean()
    assert_close(told['enhancer'], want, rel=1e-5)
    assert_close(told['loss'], told['generator'] + told['enhancer'], rel=1e-6)


def test_uniform_generator_pays_log_k(words):
    task, batch = made(words)
    torch.nn.init.zeros_(task.code_head.weight)
    assert_close(task(batch, 0.0)['generator'], math.log(16), rel=1e-6)


@pytest.mark.parametrize('restore', ['pixels', 'replaced'])
def test_each_network_learns_from_its_own_loss(words, restore):
    grads = {}
    for weight in (0.0, 1.0, 2.0):
        task, batch = made(words, restore=restore, weight=weight)
        torch.manual_seed(1)
        task(batch, 0.0)['loss'].backward()
        grads[weight] = {n: p.grad.clone() for n, p in task.named_parameters() if p.requires_grad}
    for name in grads[0.0]:
        if name.startswith(('generator.', 'words.')):
            assert grads[0.0][name].equal(grads[2.0][name])
        else:
            assert grads[0.0][name].abs().max() == 0 and torch.allclose(
                2 * grads[1.0][name], grads[2.0][name], rtol=1e-4, atol=1e-7
            )
    assert all(p.grad is None for p in task.codes.parameters())


def test_a_hidden_pixel_cannot_reach_the_generator(words):
    task, batch = made(words)
    holes = batch.mask.hidden.view(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn_like(batch.views[0])
    with torch.no_grad():
        plain = task.predict(batch)
        assert task.predict(batch._replace(views=[torch.where(holes, noise, batch.views[0])])).equal(plain)
        assert not task.predict(batch._replace(views=[torch.where(holes, batch.views[0], noise)])).equal(
            plain
        )


def test_the_enhancer_sees_only_what_was_redrawn(words):
    "Two images with the same words look the same to it."
    task, batch = made(words)
    codes = task.codes(batch)
    again = normalise(task.codes.tokenizer.decode(codes.view(-1, 4, 4)))
    assert task.decode(codes).equal(again) and task.decode(codes).shape == X[:8].shape


@pytest.mark.parametrize(
    'tokenizer', [lambda: DVAE(16, 8, width=16), lambda: KMeansCodes(16, 4).fit(IMAGES, seeded(), rounds=1)]
)
def test_other_tokenizers(tokenizer):
    "A dVAE of one's own, and codes of another stride than the encoder's patches."
    task, batch = made(tokenizer())
    assert task(batch, 0.0)['loss'].isfinite() and task.decode(task.codes(batch)).shape == X[:8].shape


def test_relative_positions_and_small_batches(words):
    for options in (dict(encoder=RelativeEncoder), dict(n=1)):
        task, batch = made(words, **options)
        assert task(batch, 0.0)['loss'].isfinite()


def test_autocast(words):
    task, batch = made(words)
    with torch.autocast('cpu', torch.bfloat16):
        told = task(batch, 0.0)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in told.values())


def test_what_a_user_can_get_wrong(words):
    for wrong, said in (
        (lambda: made(DallE(4, 16)), 'DallE cannot; take k-means codes or a DVAE'),
        (lambda: made(words, restore='pixel'), 'did you mean pixels'),
    ):
        with pytest.raises(StudyError, match=said) as e:
            wrong()
        assert '\n' not in str(e.value)

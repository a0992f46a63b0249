"CIM has no golden file: closed forms, reference implementations in loops, and invariances."

import math

import pytest
import torch
from conftest import assert_close

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.methods.cim import cim, local_norm, sample_codes
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
def tokenizer():
    return KMeansCodes(16, 8).fit(IMAGES, seeded(), rounds=3)


MASKS = {
    'random': lambda n: random_mask(n, (4, 4), 0.5, seeded()),
    'unequal': lambda n: block_mask(n, (4, 4), 8, seeded(2), smallest=2),  # counts differ between images
}


def build(tokenizer, n=8, kind='random', encoder_class=Encoder, **options):
    "A task and a batch of n images."
    torch.manual_seed(0)
    encoder = encoder_class(size=32, patch=8, width=32, depth=3, heads=4)
    return cim(encoder, tokenizer, **options), Batch([X[:n]], MASKS[kind](n))


def test_local_norm_by_loops():
    x = torch.randn(1, 3, 12, 12, generator=seeded())
    normalised = local_norm(x, 8)
    padded = torch.nn.functional.pad(x.double(), (3, 4, 3, 4), mode='replicate')
    for c in range(3):
        for i in range(12):
            for j in range(12):
                window = padded[0, c, i : i + 8, j : j + 8]
                expected = (x[0, c, i, j] - window.mean()) / (window.var(unbiased=False) + 0.01).sqrt()
                assert abs(normalised[0, c, i, j] - expected) < 1e-4
    assert local_norm(torch.full((1, 3, 9, 9), 5.0)).abs().max() == 0
    assert_close(local_norm(x + 7.0), normalised, rel=1e-4)


@pytest.mark.parametrize('kind', MASKS)
def test_only_hidden_codes_are_sampled(kind):
    mask = MASKS[kind](8)
    codes = torch.randint(16, (8, 16), generator=seeded())
    for seed in range(20):
        torch.manual_seed(seed)
        sampled = sample_codes(torch.randn(*mask.predict.shape, 16), codes, mask)
        assert sampled[~mask.hidden].equal(codes[~mask.hidden])
        assert sampled.min() >= 0 and sampled.max() < 16
    one_hot = torch.full((*mask.predict.shape, 16), -1e4)
    one_hot[..., 3] = 0
    assert (sample_codes(one_hot, codes, mask)[mask.hidden] == 3).all()


def test_sampled_codes_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(5)
    mask = random_mask(20_000, (2, 1), 0.5, seeded())
    codes = torch.zeros(20_000, 2, dtype=torch.long)
    sampled = sample_codes(logits.expand(20_000, 1, 5), codes, mask)[mask.hidden]
    shares = sampled.bincount(minlength=5) / 20_000
    assert (shares - logits.softmax(0)).abs().max() < 0.012


def generator_loss(logits, codes, mask):
    "Mean cross-entropy of the hidden patches, patch by patch."
    losses = []
    for b, row in enumerate(mask.predict.tolist()):
        for m, j in enumerate(row):
            if mask.weight is None or mask.weight[b, m]:
                losses.append(-logits[b, m].log_softmax(0)[codes[b, j]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('restore', ['pixels', 'replaced'])
def test_losses_by_loops(tokenizer, kind, restore):
    task, batch = build(tokenizer, kind=kind, restore=restore)
    codes, logits = task.codes(batch), task.predict(batch)
    torch.manual_seed(5)
    sampled = sample_codes(logits, codes, batch.mask)
    torch.manual_seed(5)
    losses = task(batch, 0.0)
    with torch.no_grad():
        predictions = task.enhance(task.decode(sampled))
    if restore == 'pixels':
        expected = ((predictions - patchify(local_norm(X[:8]), 8)) ** 2).mean()
    else:
        p, replaced = predictions[..., 0].sigmoid(), sampled != codes
        assert not replaced[~batch.mask.hidden].any() and replaced.any()
        expected = -torch.where(replaced, p.log(), (1 - p).log()).mean()
    assert_close(losses['generator'], generator_loss(logits, codes, batch.mask), rel=1e-5)
    assert_close(losses['enhancer'], expected, rel=1e-5)
    assert_close(losses['loss'], losses['generator'] + losses['enhancer'], rel=1e-6)


def test_loss_of_a_uniform_generator_is_log_k(tokenizer):
    task, batch = build(tokenizer)
    torch.nn.init.zeros_(task.code_head.weight)
    assert_close(task(batch, 0.0)['generator'], math.log(16), rel=1e-6)


@pytest.mark.parametrize('restore', ['pixels', 'replaced'])
def test_each_network_learns_from_its_own_loss(tokenizer, restore):
    "The weight λ of the encoder's loss scales the encoder's gradients and leaves the generator's."
    grads = {}
    for weight in (0.0, 1.0, 2.0):
        task, batch = build(tokenizer, restore=restore, weight=weight)
        torch.manual_seed(1)
        task(batch, 0.0)['loss'].backward()
        grads[weight] = {n: p.grad.clone() for n, p in task.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in task.codes.parameters())
    for name in grads[0.0]:
        if name.startswith(('generator.', 'code_head.')):
            assert grads[0.0][name].any() and grads[0.0][name].equal(grads[2.0][name]), name
        else:
            assert not grads[0.0][name].any(), name
            torch.testing.assert_close(2 * grads[1.0][name], grads[2.0][name], rtol=1e-4, atol=1e-7)


def test_the_encoder_sees_only_the_decoded_codes(tokenizer):
    "Two images with the same codes are the same input to it."
    task, batch = build(tokenizer)
    codes = task.codes(batch)
    decoded = normalise(task.codes.tokenizer.decode(codes.view(-1, 4, 4)))
    assert decoded.shape == X[:8].shape
    assert task.decode(codes).equal(decoded)


@pytest.mark.parametrize(
    'make_tokenizer',
    [lambda: DVAE(16, 8, width=16), lambda: KMeansCodes(16, 4).fit(IMAGES, seeded(), rounds=1)],
    ids=['dvae', 'kmeans of stride 4'],
)
def test_other_tokenizers(make_tokenizer):
    "A dVAE, and codes of another stride than the encoder's patches."
    task, batch = build(make_tokenizer())
    assert task(batch, 0.0)['loss'].isfinite()
    assert task.decode(task.codes(batch)).shape == X[:8].shape


def test_relative_positions(tokenizer):
    task, batch = build(tokenizer, encoder_class=RelativeEncoder)
    assert task(batch, 0.0)['loss'].isfinite()


def test_bfloat16_keeps_all_losses_in_float32(tokenizer):
    task, batch = build(tokenizer)
    with torch.autocast('cpu', torch.bfloat16):
        losses = task(batch, 0.0)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


def test_wrong_arguments(tokenizer):
    wrong = (
        (lambda: build(DallE(4, 16)), 'DallE cannot; take k-means codes or a DVAE'),
        (lambda: build(tokenizer, restore='pixel'), 'did you mean pixels'),
    )
    for call, message in wrong:
        with pytest.raises(StudyError, match=message) as e:
            call()
        assert '\n' not in str(e.value)

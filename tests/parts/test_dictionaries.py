"ConMIM's dictionaries against loops, their limits, their errors, and every option of the method."

import math

import pytest
import torch
from conftest import assert_close

from mimstudy.core.errors import StudyError
from mimstudy.core.task import Batch
from mimstudy.methods.catalogue import build_method
from mimstudy.methods.conmim import conmim
from mimstudy.parts.dictionaries import DICTIONARIES, device_contrast, filtered_contrast, instance_contrast
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.losses import patch_contrast
from mimstudy.parts.masks import block_mask, make_mask, random_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def predictions_and_keys(mask, D=12, seed=1):
    g = seeded(seed)
    return torch.randn(*mask.predict.shape, D, generator=g), torch.randn(*mask.hidden.shape, D, generator=g)


MASKS = {
    'random': random_mask(3, (4, 4), 0.5, seeded()),
    'ragged': block_mask(3, (4, 4), 7, seeded(3), smallest=2),
}


def cosine(a, b):
    return (a / a.norm()).double() @ (b / b.norm()).double()


def by_loops(pred, keys, mask, tau, negatives):
    "Mean over the predicted patches; `negatives(b, j, q)` lists the (image, patch) pairs of the negatives."
    losses = []
    for b in range(len(pred)):
        for m, j in enumerate(mask.predict[b].tolist()):
            if mask.weight is not None and not mask.weight[b, m]:
                continue
            own = cosine(pred[b, m], keys[b, j]) / tau
            rest = [cosine(pred[b, m], keys[c, i]) / tau for c, i in negatives(b, j, pred[b, m])]
            losses.append(-own + torch.logsumexp(torch.stack([own, *rest]), 0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize('kind', MASKS)
def test_device_by_loops(kind):
    mask = MASKS[kind]
    pred, keys = predictions_and_keys(mask)
    all_patches = [(c, i) for c in range(3) for i in range(16)]
    assert_close(
        device_contrast(pred, keys, mask, 0.2),
        by_loops(pred, keys, mask, 0.2, lambda b, j, q: [p for p in all_patches if p != (b, j)]),
    )


@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('similar', [0.2, 0.5, 1.0])
def test_filtered_by_loops(kind, similar):
    mask = MASKS[kind]
    pred, keys = predictions_and_keys(mask)

    def dissimilar(b, j, q):
        return [(b, i) for i in range(16) if i != j and cosine(q, keys[b, i]) <= similar]

    assert_close(
        filtered_contrast(pred, keys, mask, 0.2, similar), by_loops(pred, keys, mask, 0.2, dissimilar)
    )


def test_instance_by_loops():
    mask = make_mask(torch.zeros(5, 16).bool(), torch.ones(5, 16).bool())
    pred, keys = predictions_and_keys(mask)
    q, k = pred.mean(1), keys.mean(1)
    each = [
        -cosine(q[b], k[b]) / 0.2
        + torch.logsumexp(torch.stack([cosine(q[b], k[c]) / 0.2 for c in range(5)]), 0)
        for b in range(5)
    ]
    assert_close(instance_contrast(pred, keys, mask, 0.2), torch.stack(each).mean())


def test_dictionaries_agree_in_their_limits():
    mask = MASKS['random']
    pred, keys = predictions_and_keys(mask)
    assert_close(filtered_contrast(pred, keys, mask, similar=1.0), patch_contrast(pred, keys, mask), rel=1e-6)
    assert (
        device_contrast(pred, keys, mask)
        > patch_contrast(pred, keys, mask)
        > filtered_contrast(pred, keys, mask, similar=0.3)
    )


@pytest.mark.parametrize('name', DICTIONARIES)
def test_keys_get_no_gradient_and_losses_are_float32(name):
    mask = MASKS['random']
    pred, keys = (t.requires_grad_() for t in predictions_and_keys(mask))
    with torch.autocast('cpu', torch.bfloat16):
        loss = DICTIONARIES[name](pred, keys, mask)
    loss.backward()
    assert loss.dtype == torch.float32 and keys.grad is None and pred.grad.abs().sum() > 0
    assert_close(loss, DICTIONARIES[name](pred, keys, mask), rel=1e-6)


@pytest.mark.parametrize('name', DICTIONARIES)
def test_lengths_of_features_have_no_effect(name):
    mask = MASKS['random']
    pred, keys = predictions_and_keys(mask)
    scale = (
        1.0 if name == 'instance' else 0.1 + torch.rand(3, 16, 1, generator=seeded(5))
    )  # a mean of keys depends on their lengths
    assert_close(
        DICTIONARIES[name](3 * pred, scale * keys, mask), DICTIONARIES[name](pred, keys, mask), rel=1e-5
    )


def test_errors_name_the_threshold_and_the_batch():
    mask = MASKS['random']
    pred, keys = predictions_and_keys(mask)
    with pytest.raises(StudyError, match='without any negative key') as e:
        filtered_contrast(pred, keys, mask, similar=-0.99)
    assert '\n' not in str(e.value)
    with pytest.raises(StudyError, match='at least 2'):
        instance_contrast(pred[:1], keys[:1], random_mask(1, (4, 4), 0.5, seeded()))


@pytest.mark.parametrize(
    'options',
    [dict(dictionary=name) for name in DICTIONARIES]
    + [dict(momentum=0.0), dict(teacher_mode='eval'), dict(pathway='mask_pixels')],
)
def test_every_option_trains_the_encoder(options):
    torch.manual_seed(0)
    task = build_method(
        'conmim', Encoder(size=32, patch=8, width=32, depth=2, heads=2), hidden=32, out=16, **options
    )
    hidden = torch.zeros(4, 16).bool()
    mask = (
        make_mask(hidden, ~hidden)
        if options.get('dictionary') == 'instance'
        else random_mask(4, (4, 4), 0.75, seeded(), unit=2)
    )
    batch = Batch([torch.randn(4, 3, 32, 32, generator=seeded(s)) for s in (1, 2)], mask)
    loss = task(batch, 0.0)['loss']
    loss.backward()
    assert loss.isfinite() and all(p.grad.abs().sum() > 0 for p in task.encoder.blocks.parameters())
    assert all(p.grad is None for p in task.target.parameters())


def test_momentum_zero_copies_the_student():
    task = conmim(Encoder(size=32, patch=8, width=32, depth=1, heads=2), hidden=32, out=16, momentum=0.0)
    with torch.no_grad():
        for p in task.encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    task.after_step(0.7)
    assert all(
        a.equal(b) for a, b in zip(task.target.teacher.encoder.parameters(), task.encoder.parameters())
    )


def test_masked_pixels_have_no_effect():
    task = build_method(
        'conmim',
        Encoder(size=32, patch=8, width=32, depth=2, heads=2),
        hidden=32,
        out=16,
        pathway='mask_pixels',
    ).eval()
    mask, x = random_mask(3, (4, 4), 0.5, seeded()), torch.randn(3, 3, 32, 32, generator=seeded(1))
    holes = mask.hidden.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        plain = task.predict(Batch([x, x], mask))
        assert task.predict(Batch([torch.where(holes, torch.rand_like(x), x), x], mask)).equal(plain)
        assert not task.predict(Batch([torch.where(holes, x, torch.rand_like(x)), x], mask)).equal(plain)


def test_orthogonal_keys_have_closed_forms():
    "Predictions equal to their own, orthogonal keys: log(1 + (n - 1) exp(-1/tau)) for n keys."
    mask = random_mask(2, (4, 4), 0.5, seeded())
    keys = torch.eye(32).view(2, 16, 32)
    pred = torch.gather(keys, 1, mask.predict[..., None].expand(-1, -1, 32))
    for name, n in (('image', 16), ('device', 32)):
        assert_close(DICTIONARIES[name](pred, keys, mask, 0.5), math.log1p((n - 1) * math.exp(-2)), rel=1e-6)

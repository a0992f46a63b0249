"iBOT has no golden file: closed forms, a reference implementation of the loss in loops, and invariances."

import math

import pytest
import torch
from conftest import assert_close
from self_distillation import check_gradients, check_teacher_update
from torch.nn import functional as F

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.engine.hardware import make_accelerator
from mimstudy.engine.session import start_session
from mimstudy.engine.train import micro_batches, train_step
from mimstudy.methods.dino import dino
from mimstudy.methods.ibot import ibot, patch_ce
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.scales import at_scale
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import ibot_mask, make_mask
from mimstudy.study.build import build_batch_function, build_task

SMALL = dict(out=24, hidden=32, bottleneck=8)
BOTH_HEADS = pytest.mark.parametrize('shared', [True, False])  # one last layer for [CLS] and patches, or two


def small_encoder(prefix=1):
    return Encoder(size=32, patch=8, width=32, depth=2, heads=2, prefix=prefix)


def small_ibot(prefix=1, **options):
    torch.manual_seed(0)
    return ibot(small_encoder(prefix), **(SMALL | options))


def random_views(batch=3, small=2, seed=0):
    "Two large crops and `small` small ones."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, s, s, generator=g) for s in [32, 32] + [16] * small]


def mask_of(batch=3, seed=0, **options):
    return ibot_mask(2 * batch, (4, 4), torch.Generator().manual_seed(seed), **options)


def empty_mask(rows):
    return make_mask(torch.zeros(rows, 16, dtype=torch.bool))


def train_once(task, batch):
    "Move the student, then the teacher and both centres, so that none of them is at its initial value."
    with torch.no_grad():
        for p in task.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    task(batch, 0.0)
    task.after_step(0.0)
    return task


@pytest.mark.parametrize('name, options', [('dino', {}), ('ibot', {}), ('ibot', dict(shared=False))])
def test_frozen_last_layers_are_neither_moved_nor_decayed(name, options):
    """As in the release their gradient is removed; with a gradient of zero AdamW would decay them and count
    the step."""
    config = at_scale(pretraining(name), 'smoke').but(
        options=SMALL | dict(frozen=0.5) | options,
        optim=dict(batch=8, warmup=0, lr=1e-2),
    )
    images = scenes(8, size=32, seed=0)
    data = InMemoryDataset(images.images, images.label, ['any'] * 12)
    task = build_task(config, data)
    lasts = [w for n, w in task.named_parameters() if w.requires_grad and n.endswith('last.weight')]
    before = [w.detach().clone() for w in lasts]
    assert len(lasts) == 1 + ('shared' in options)
    make_batch = build_batch_function(config)
    session = start_session(task, data, make_batch, config, None, 0, make_accelerator('cpu'))
    batches = data.batches(session.sampler)
    train_step(session, micro_batches(session, batches))  # progress 0
    assert all(w.equal(b) for w, b in zip(lasts, before))
    assert not any(w in session.optimiser.state for w in lasts)
    train_step(session, micro_batches(session, batches))  # progress 0.5
    assert not any(w.equal(b) for w, b in zip(lasts, before))
    assert all(session.optimiser.state[w]['step'] == 1 for w in lasts)


def small_crop_features(encoder, x):
    "Hidden states of a (B,3,16,16) crop: the position embeddings are resized to its 2 x 2 patches."
    positions = encoder.pos_embed[:, 1:].float().reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (2, 2), mode='bicubic').double()
    patches = encoder.patch_embed.proj(x) + positions
    tokens = [encoder.prefix_tokens(len(x)), patches.flatten(2).transpose(1, 2)]
    return encoder.encode(torch.cat(tokens, 1))


@torch.no_grad()
def student_logits(task, views, mask):
    "Logits of [CLS], one tensor a crop, and of all patches of both large crops."
    net = task.net
    last = net.patch_last or net.head.last
    hidden = net.pathway(torch.cat(views[:2]), mask)
    cls = list(net.head(hidden[:, 0]).chunk(2))
    for x in views[2:]:
        cls.append(net.head(small_crop_features(task.encoder, x)[:, 0]))
    return cls, last(net.head.bottleneck_features(hidden[:, 1:])).chunk(2)


@torch.no_grad()
def teacher_logits(task, views):
    "Logits of [CLS] and of all patches of both large crops, which the teacher sees without a mask."
    net = task.teacher.net
    last = net.patch_last or net.head.last
    hidden = net.pathway.encoder.forward_features(torch.cat(views[:2]))
    return net.head(hidden[:, 0]), last(net.head.bottleneck_features(hidden[:, 1:]))


def reference_losses(cls, patches, cls_target, patch_target, hidden):
    "The losses of [CLS] and of patches, in loops over the teacher's crops, the student's crops and images."
    cls_loss, patch_loss, pairs = 0.0, 0.0, 0
    B = len(cls[0])
    for q in range(2):
        for i in range(B):
            losses = []
            for j in hidden[q][i].nonzero()[:, 0].tolist():
                log_p = (patches[q][i, j] / 0.1).log_softmax(-1)
                losses.append(-(patch_target[q][i, j] * log_p).sum())
            patch_loss += sum(losses) / max(1, len(losses)) / B / 2
        for v, logits in enumerate(cls):
            if v == q:
                continue
            pairs += 1
            for i in range(B):
                cls_loss -= (cls_target[q][i] * (logits[i] / 0.1).log_softmax(-1)).sum() / B
    return cls_loss / pairs, patch_loss


@BOTH_HEADS
def test_losses_and_centres_by_loops(shared):
    torch.manual_seed(3)
    mask = mask_of(3, 5)
    views = [x.double() for x in random_views()]
    task = train_once(small_ibot(shared=shared).double(), Batch(views, mask))
    cls, patches = student_logits(task, views, mask)
    teacher_cls, teacher_patches = teacher_logits(task, views)
    tau = 0.04 + 0.03 * 0.05 / 0.1  # at progress 0.05, half-way through the warm-up
    cls_target = ((teacher_cls - task.centre.value) / tau).softmax(-1).chunk(2)
    patch_target = ((teacher_patches - task.patch_centre.value) / tau).softmax(-1).chunk(2)
    cls_loss, patch_loss = reference_losses(cls, patches, cls_target, patch_target, mask.hidden.chunk(2))
    cls_centre = 0.9 * task.centre.value + 0.1 * teacher_cls.mean(0)
    patch_centre = 0.9 * task.patch_centre.value + 0.1 * teacher_patches.mean((0, 1))

    losses = task(Batch(views, mask), 0.05)
    assert_close(losses['cls'], cls_loss, rel=1e-5)
    assert_close(losses['patch'], patch_loss, rel=1e-5)
    assert_close(losses['loss'].detach(), cls_loss + patch_loss, rel=1e-5)
    task.centre.after_step()
    task.patch_centre.after_step()
    assert_close(task.centre.value, cls_centre, rel=1e-5)
    assert_close(task.patch_centre.value, patch_centre, rel=1e-5)


def test_closed_forms_of_the_patch_loss():
    mask = mask_of(3, chance=1.0)
    M = mask.predict.shape[1]
    equal_logits = torch.randn(6, 1, 1).expand(6, M, 7)
    uniform = torch.full((6, M, 7), 1 / 7)
    assert_close(patch_ce(equal_logits, uniform, mask), math.log(7), rel=1e-5)
    one_hot = torch.eye(7)[torch.randint(7, (6, M))]
    assert patch_ce(100 * one_hot, one_hot, mask) == 0
    nothing = torch.zeros(6, 0, 7)
    assert patch_ce(nothing, nothing, empty_mask(6)) == 0


def test_padding_does_not_count():
    torch.manual_seed(0)
    mask = mask_of(4, 2)
    assert mask.weight is not None and not mask.weight.all()
    M = mask.predict.shape[1]
    student = torch.randn(8, M, 7)
    target = torch.randn(8, M, 7).softmax(-1)
    other = torch.where(mask.weight[..., None] > 0, student, torch.randn(8, M, 7))
    assert patch_ce(student, target, mask).equal(patch_ce(other, target, mask))


def test_a_hidden_pixel_cannot_reach_the_students_logits():
    task, mask = small_ibot().eval(), mask_of(3, 1)
    x = torch.cat(random_views(3, 0))
    hidden = mask.hidden.view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn_like(x)

    def predict(x):
        return task.net(list(x.chunk(2)), mask)

    with torch.no_grad():
        unchanged = predict(x)
        other_hidden = predict(torch.where(hidden, noise, x))
        other_visible = predict(torch.where(hidden, x, noise))
    assert all(a.equal(b) for a, b in zip(unchanged, other_hidden))
    assert not any(a.allclose(b) for a, b in zip(unchanged, other_visible))


def test_without_hidden_patches_it_is_dino():
    "The loss of patches is zero, and the rest is DINO's loss with the same weights."
    ours, views = small_ibot(), random_views()
    theirs = dino(small_encoder(), **SMALL)
    state = {}
    for name, value in ours.state_dict().items():
        if 'mask_token' not in name and not name.startswith('patch_centre'):
            state[name.replace('net.pathway.', '').replace('net.', '')] = value
    theirs.load_state_dict(state)
    losses = ours(Batch(views, empty_mask(6)), 0.05)
    assert losses['patch'] == 0
    assert_close(losses['loss'].detach(), theirs(Batch(views), 0.05)['loss'].detach())


def test_the_order_of_the_crops_does_not_matter():
    task, mask = small_ibot(), mask_of(3, 4)
    a, b, c, d = random_views()
    swapped_mask = make_mask(torch.cat([mask.hidden[3:], mask.hidden[:3]]))
    loss = task(Batch([a, b, c, d], mask), 0.2)['loss'].detach()
    assert_close(task(Batch([b, a, d, c], swapped_mask), 0.2)['loss'].detach(), loss)


def test_mask_statistics():
    mask = ibot_mask(4000, (14, 14), torch.Generator().manual_seed(0))
    share = mask.hidden.float().mean(1)
    assert abs((share == 0).float().mean() - 0.5) < 0.03 and share.max() <= 0.5
    assert 0.22 < share[share > 0].mean() < 0.30  # at most the drawn share, which is 0.3 on average
    assert mask.weight is not None and mask.weight.sum(1).equal(mask.hidden.sum(1).float())
    frequency = mask.hidden.float().mean(0)  # of each patch; the corners are hidden least
    assert frequency.min() > 0.01 and frequency.max() < 0.3
    same = [ibot_mask(50, (14, 14), torch.Generator().manual_seed(7)).hidden for _ in range(2)]
    assert same[0].equal(same[1])


@BOTH_HEADS
def test_gradients_and_the_teacher(shared):
    task = small_ibot(shared=shared, momentum=0.9)
    check_gradients(task, Batch(random_views(), mask_of(chance=1.0)))
    check_teacher_update(task)


@BOTH_HEADS
def test_frozen_last_layers_get_a_gradient_of_zero(shared):
    task = small_ibot(shared=shared, frozen=0.1)
    task(Batch(random_views(), mask_of(chance=1.0)), 0.05)['loss'].backward()
    lasts = [p for name, p in task.named_parameters() if 'last' in name and p.requires_grad]
    assert len(lasts) == 2 - shared
    assert all(p.grad is not None and not p.grad.any() for p in lasts)


def test_the_centres_move_after_the_step_only():
    task, batch = small_ibot(), Batch(random_views(), mask_of())
    assert task(batch, 0.1)['loss'].equal(task(batch, 0.1)['loss'])
    assert not task.centre.value.any() and not task.patch_centre.value.any()
    task.after_step(0.1)
    assert task.centre.value.any() and task.patch_centre.value.any()


@pytest.mark.parametrize('prefix', [1, 4])
def test_bfloat16_keeps_all_losses_in_float32(prefix):
    task = small_ibot(prefix)
    with torch.autocast('cpu', torch.bfloat16):
        losses = task(Batch(random_views(), mask_of()), 0.0)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


@pytest.mark.parametrize('seed', range(4))
def test_a_batch_of_one_image(seed):
    loss = small_ibot()(Batch(random_views(1), mask_of(1, seed)), 0.0)['loss']
    assert loss.isfinite()
    loss.backward()


def test_one_image_without_small_crops_and_hidden_patches():
    assert small_ibot()(Batch(random_views(1, 0), empty_mask(2)), 0.0)['loss'].isfinite()


def test_a_mask_for_both_large_crops_is_required():
    task, views = small_ibot(), random_views()
    half = make_mask(mask_of(3).hidden[:3])
    for wrong in (Batch(views, None), Batch(views, half), Batch(views[:1], half)):
        with pytest.raises(StudyError, match='a mask for both'):
            task(wrong, 0.0)


def test_state_round_trip():
    task, batch = small_ibot(shared=False), Batch(random_views(), mask_of())
    task(batch, 0.0)
    task.after_step(0.0)
    torch.manual_seed(9)
    other = ibot(small_encoder(), shared=False, **SMALL)
    other.load_state_dict(task.state_dict())
    assert other(batch, 0.3)['loss'].equal(task(batch, 0.3)['loss'])

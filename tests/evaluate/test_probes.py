"Probes: deterministic features, and protocols compared with simple implementations and scikit-learn."

import time

import numpy as np
import pytest
import timm
import torch
from conftest import assert_close
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import CLASSES, scenes
from mimstudy.engine.datasets import InMemoryDataset
from mimstudy.evaluate.catalogue import PROTOCOLS, evaluate
from mimstudy.evaluate.features import (
    Features,
    held_out,
    extract_features,
    evaluation_mode,
    flat_scores,
    raw_pixels,
)
from mimstudy.evaluate.knn import knn, knn_votes
from mimstudy.evaluate.linear import (
    PENALTIES,
    choose_penalty,
    fit_logistic_regression,
    linear,
    objective,
    standardise,
)
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.views import normalise


def make_set(n, size=32, seed=0):
    world = scenes(n, size, seed=seed)
    return InMemoryDataset(world.images, world.label, CLASSES)


def make_encoder(**options):
    torch.manual_seed(0)
    return Encoder(
        **dict(size=32, patch=8, width=32, depth=3, heads=4, prefix=2, drop_path=0.5, layer_scale=0.1)
        | options
    )


def make_features(n, classes, width, g, signal=1.0):
    "Correlated features of very different scales, with `signal` of the class in them."
    y = torch.randint(classes, (n,), generator=g)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(1, -2, width)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(2))
    return Features(
        {(1, 'patch'): (signal * centres[y] + torch.randn(n, width, generator=g)) @ mix},
        y,
        [str(k) for k in range(classes)],
    )


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


# features


def test_features_are_the_means_of_every_block():
    "Compared with a loop over the blocks."
    encoder, images = make_encoder().eval(), make_set(20)
    table = extract_features(encoder, images, 'cpu', batch=7).table
    assert list(table) == [(l, token) for l in (1, 2, 3) for token in ('prefix', 'patch')]
    with torch.no_grad():
        x = normalise(images.images.float() / 255)
        z = torch.cat([encoder.prefix_tokens(20), encoder.patch_tokens(x)], 1)
        for l, block in enumerate(encoder.blocks, start=1):
            z = block(z)
            assert_close(table[l, 'prefix'], z[:, :2].mean(1))
            assert_close(table[l, 'patch'], z[:, 2:].mean(1))


def test_extracting_twice_is_bit_equal_and_changes_no_state():
    encoder, images = make_encoder(), make_set(20)
    encoder.train()
    encoder.blocks[1].eval()  # a module that is kept in evaluation mode
    modes, state = [m.training for m in encoder.modules()], torch.get_rng_state()
    a, b = (extract_features(encoder, images, 'cpu') for _ in range(2))
    assert (
        all(a.table[k].equal(b.table[k]) for k in a.table)
        and a.labels.equal(images.labels)
        and a.classes == list(CLASSES)
    )
    assert [m.training for m in encoder.modules()] == modes and torch.get_rng_state().equal(state)
    assert not any(t.requires_grad for t in a.table.values()) and all(
        t.dtype == torch.float32 for t in a.table.values()
    )


def test_modes_are_restored_after_an_error():
    encoder = make_encoder().train()
    with pytest.raises(ZeroDivisionError), evaluation_mode(encoder):
        1 / 0
    assert encoder.blocks[0].training and torch.is_grad_enabled()


def test_features_do_not_depend_on_the_batch():
    encoder, images = make_encoder(), make_set(20)
    a, b = (extract_features(encoder, images, 'cpu', batch=batch) for batch in (20, 3))
    for k in a.table:
        assert_close(a.table[k], b.table[k])


def test_batch_norm_uses_its_running_statistics_and_does_not_change_them():
    encoder, images = make_encoder(), make_set(12)
    encoder.patch_embed.proj = nn.Sequential(encoder.patch_embed.proj, nn.BatchNorm2d(32))
    encoder.train()
    extract_features(encoder, images, 'cpu', batch=4)
    assert encoder.patch_embed.proj[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    'name, tokens',
    [
        ('vit_tiny_patch16_224', {'prefix', 'patch'}),
        ('vit_small_patch16_dinov3', {'prefix', 'patch'}),
        ('beit_base_patch16_224', {'prefix', 'patch'}),
        ('deit_tiny_distilled_patch16_224', {'prefix', 'patch'}),
        ('vit_base_patch16_siglip_224', {'patch'}),
        ('vit_relpos_small_patch16_224', {'patch'}),
        ('cait_xxs24_224', {'patch'}),
    ],
)
def test_other_encoders_of_timm_have_features_and_scores(name, tokens):
    encoder = timm.create_model(name, img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    images = make_set(24)
    table = extract_features(encoder, images, 'cpu').table
    assert set(table) == {(l, t) for l in (1, 2) for t in tokens}
    assert all(t.shape == (24, 48) and t.isfinite().all() for t in table.values())
    assert {f'knn/best/{t}' for t in tokens} <= evaluate(['knn'], encoder, images, images, 'cpu').keys()


def test_images_of_another_side_are_resized():
    large, small = make_set(8, size=64), make_set(8, size=32)
    encoder = make_encoder()
    a, b = (extract_features(encoder, p, 'cpu').table[3, 'patch'] for p in (large, small))
    assert a.shape == b.shape and F.cosine_similarity(a, b).min() > 0.9


def test_raw_pixels_are_block_averages():
    images = make_set(5, size=64)
    x = raw_pixels(images, 'cpu', batch=2).table[0, 'pixels'].numpy()
    expected = np.array(
        [
            [
                p[c, i : i + 4, j : j + 4].mean() / 255
                for c in range(3)
                for i in range(0, 64, 4)
                for j in range(0, 64, 4)
            ]
            for p in images.images.numpy()
        ]
    )
    assert_close(x, expected)


def test_the_best_block_of_each_token_is_the_first_of_equal_ones():
    flat = flat_scores('p', {(1, 'prefix'): 3.0, (2, 'prefix'): 3.0, (1, 'patch'): 1.0, (2, 'patch'): 2.0})
    assert (
        flat['p/best/prefix/block'] == 1
        and flat['p/best/patch/block'] == 2
        and flat['p/best/patch'] == 2.0 == flat['p/2/patch']
    )


# nearest neighbours


def numpy_knn(train, val, entry, k, temperature):
    "One query at a time, in numpy."
    bank, right = train.table[entry].double().numpy(), 0
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for q, label in zip(val.table[entry].double().numpy(), val.labels.tolist()):
        similarity = bank @ (q / np.linalg.norm(q))
        score = np.zeros(len(train.classes))
        for i in np.argsort(-similarity)[:k]:
            score[train.labels[i]] += np.exp(similarity[i] / temperature)
        right += score.argmax() == label
    return 100 * right / len(val.labels)


@pytest.mark.parametrize('k, temperature', [(20, 0.07), (1, 0.07), (5, 1.0)])
def test_knn_agrees_with_a_loop_in_numpy(g, k, temperature):
    train, val = make_features(300, 7, 12, g), make_features(150, 7, 12, g)
    assert knn(train, val, k, temperature, chunk=64)['knn/1/patch'] == numpy_knn(
        train, val, (1, 'patch'), k, temperature
    )


def test_knn_does_not_depend_on_the_order_of_the_bank_or_on_rotations(g):
    train, val = make_features(300, 7, 12, g), make_features(150, 7, 12, g)
    order, turn = torch.randperm(300, generator=g), torch.linalg.qr(torch.randn(12, 12, generator=g))[0]
    mixed = Features({e: x[order] for e, x in train.table.items()}, train.labels[order], train.classes)
    turned = [f._replace(table={e: x @ turn for e, x in f.table.items()}) for f in (train, val)]
    assert knn(mixed, val) == knn(train, val) == knn(*turned)


class LargestTensor(TorchDispatchMode):
    "Notes the number of elements of the largest tensor that is made."

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_knn_with_many_classes_makes_no_tensor_of_neighbours_times_classes():
    classes, queries, k = 20_000, 64, 20
    bank = F.normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(500) * 40
    with LargestTensor() as largest:
        votes = knn_votes(bank[:queries], bank, labels, classes, k, 0.07)
    assert votes.argmax(1).equal(labels[:queries])
    assert largest.elements == queries * classes


def test_knn_of_all_images_at_equal_weight_is_the_largest_class(g):
    train, val = make_features(60, 3, 4, g), make_features(30, 3, 4, g)
    unit = [F.normalize(f.table[1, 'patch'], dim=1) for f in (train, val)]
    votes = knn_votes(unit[1], unit[0], train.labels, 3, k=60, temperature=1e9)
    assert_close(votes, train.labels.bincount(minlength=3).expand(30, 3), 1e-5)


# linear probe


def sklearn_fit(x, y, penalty):
    "The same objective elsewhere: sum of losses + 1/(2C)·‖W‖², so C = 1/(n λ)."
    return LogisticRegression(C=1 / (len(y) * penalty), tol=1e-8, max_iter=5000).fit(
        x.double().numpy(), y.numpy()
    )


@pytest.mark.parametrize('penalty', [1e-1, 1e-3, 1e-5])
def test_fit_agrees_with_sklearn(g, penalty):
    train, val = make_features(1000, 6, 20, g, 0.7), make_features(500, 6, 20, g, 0.7)
    x, x_val = standardise(train.table[1, 'patch'], val.table[1, 'patch'])
    weight, bias = fit_logistic_regression(x, train.labels, 6, penalty)
    expected = sklearn_fit(x, train.labels, penalty)
    ours, theirs = (
        objective(torch.as_tensor(w).double(), torch.as_tensor(b).double(), x.double(), train.labels, penalty)
        for w, b in ((weight, bias), (expected.coef_, expected.intercept_))
    )
    assert theirs - 1e-9 <= ours <= theirs + 2e-4
    predictions = F.linear(x_val, weight, bias).argmax(1).numpy()
    assert (predictions == expected.predict(x_val.double().numpy())).mean() >= 0.99
    assert (
        abs(
            (predictions == val.labels.numpy()).mean()
            - expected.score(x_val.double().numpy(), val.labels.numpy())
        )
        <= 0.004
    )


def test_standardising_is_sklearns(g):
    x, x_val = (
        torch.randn(50, 4, generator=g) * torch.tensor([1.0, 100, 1e-3, 0]) + 5,
        torch.randn(20, 4, generator=g),
    )
    scaler = StandardScaler().fit(x.double().numpy())
    for a, b in zip(standardise(x, x_val), (x, x_val)):
        assert_close(a[:, :3], scaler.transform(b.double().numpy())[:, :3], 1e-3)
    assert standardise(x, x_val)[1][:, 3].equal(torch.zeros(20))


def test_the_gradient_is_zero_at_the_minimum(g):
    train = make_features(800, 5, 16, g)
    x, _ = standardise(train.table[1, 'patch'], train.table[1, 'patch'])
    weight, bias = (
        t.double().requires_grad_() for t in fit_logistic_regression(x, train.labels, 5, 1e-2, tolerance=1e-9)
    )
    objective(weight, bias, x.double(), train.labels, 1e-2).backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4
    assert (
        weight.detach().sum(0).abs().max() < 1e-4
    )  # adding the same to all classes only increases the penalty


def test_permuted_classes_permute_the_weights(g):
    train, names = make_features(600, 5, 16, g), torch.tensor([3, 0, 4, 1, 2])
    x, _ = standardise(train.table[1, 'patch'], train.table[1, 'patch'])
    weight, _ = fit_logistic_regression(x, train.labels, 5, 1e-2, tolerance=1e-9)
    renamed, _ = fit_logistic_regression(x, names[train.labels], 5, 1e-2, tolerance=1e-9)
    assert_close(renamed[names], weight, 1e-2)


def test_units_of_features_do_not_matter(g):
    train, val = make_features(600, 5, 16, g), make_features(300, 5, 16, g)
    scale, shift = torch.logspace(-3, 3, 16)[torch.randperm(16, generator=g)], torch.randn(16, generator=g)
    other = [
        f._replace(table={e: x * scale + scale * shift for e, x in f.table.items()}) for f in (train, val)
    ]
    assert abs(linear(*other)['linear/1/patch'] - linear(train, val)['linear/1/patch']) < 0.7


def test_the_held_out_images_are_a_fifth_of_every_class(g):
    y = torch.randint(6, (997,), generator=g)
    held = held_out(y)
    assert held.sum() == 199 and (y[held].bincount() / y.bincount() - 0.2).abs().max() < 0.01


def test_the_penalty_is_chosen_without_the_validation_images(g):
    "Compared with scikit-learn on the same held-out images."
    train, val = make_features(700, 5, 20, g, 0.5), make_features(500, 5, 20, g, 0.5)
    x, x_val = standardise(train.table[1, 'patch'], val.table[1, 'patch'])
    held = held_out(train.labels)
    scores = [
        sklearn_fit(x[~held], train.labels[~held], p).score(
            x[held].double().numpy(), train.labels[held].numpy()
        )
        for p in PENALTIES
    ]
    penalty, _, _ = choose_penalty(x, train.labels, 5)
    assert max(scores) - scores[PENALTIES.index(penalty)] <= 1.5 / held.sum()
    expected = sklearn_fit(x, train.labels, penalty).score(x_val.double().numpy(), val.labels.numpy())
    assert abs(linear(train, val)['linear/1/patch'] - 100 * expected) <= 0.4


def test_a_weak_signal_is_found_and_noise_is_ignored(g):
    "Three informative features 300 times smaller than a common one; and three among 300 of noise."

    def made(n):
        y = torch.arange(n) % 3
        signal = torch.eye(3)[y] + 0.3 * torch.randn(n, 3, generator=g)
        small = 300 * torch.randn(n, 1, generator=g) + torch.cat([signal, torch.randn(n, 5, generator=g)], 1)
        return Features(
            {(1, 'prefix'): small, (1, 'patch'): torch.cat([signal, torch.randn(n, 297, generator=g)], 1)},
            y,
            list('abc'),
        )

    scores = linear(made(450), made(300))
    assert scores['linear/1/prefix'] > 80 and scores['linear/1/patch'] > 75


@pytest.mark.slow
def test_a_laptop_table_takes_seconds(g):
    "9,600 images, 64 classes, 4 blocks of width 96 and both tokens: less than 15 s of one processor."
    train, val = (
        {(l, t): make_features(n, 64, 96, g, 0.05) for l in range(1, 5) for t in ('prefix', 'patch')}
        for n in (9600, 3200)
    )
    start = time.process_time()
    for e in train:
        linear(train[e], val[e])
    assert time.process_time() - start < 15


# all together


def test_the_same_encoder_has_the_same_scores():
    encoder, train, val = make_encoder().train(), make_set(120), make_set(60, seed=1)
    first, second = (evaluate(PROTOCOLS, encoder, train, val, 'cpu', batch=50) for _ in range(2))
    assert first == second and encoder.training
    assert {k.split('/')[0] for k in first} == set(PROTOCOLS) and all(0 <= v <= 100 for v in first.values())
    assert {f'linear/{b}/{t}' for b in (1, 2, 3, 'best') for t in ('prefix', 'patch')} < set(first)


def test_pixels_are_scored_without_an_encoder():
    train, val = make_set(120), make_set(60, seed=1)
    assert set(evaluate(PROTOCOLS, None, train, val, 'cpu')) == {'knn/0/pixels', 'linear/0/pixels'}


def test_a_wrong_name_is_reported_before_any_image_is_read():
    class UnreadableDataset(InMemoryDataset):
        def batches(self, orders, workers=None):
            raise AssertionError('images were read')

    unread = UnreadableDataset(
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), ['a']
    )
    with pytest.raises(StudyError, match='did you mean linear'):
        evaluate(['liner'], None, unread, unread, 'cpu')


@pytest.mark.cuda
def test_scores_on_a_gpu_are_those_on_the_cpu():
    train, val = make_set(400), make_set(200, seed=1)
    here, there = (evaluate(PROTOCOLS, make_encoder(), train, val, device) for device in ('cpu', 'cuda'))
    again = evaluate(PROTOCOLS, make_encoder(), train, val, 'cuda')
    assert again == there and all(abs(here[k] - there[k]) <= 2 for k in here if not k.endswith('block'))


@pytest.mark.parametrize('protocol', [linear, knn])
def test_the_best_block_is_chosen_without_the_validation_images(protocol, g):
    "Block 2 has the signal in training; validation images whose block 1 is better do not change the choice."
    y = torch.arange(400) % 4
    signal = torch.eye(4)[y] + 0.3 * torch.randn(400, 4, generator=g)
    noise = torch.randn(400, 4, generator=g)
    train = Features({(1, 'patch'): noise, (2, 'patch'): signal}, y, list('abcd'))
    val = Features({(1, 'patch'): signal, (2, 'patch'): noise}, y, list('abcd'))
    scores = protocol(train, val)
    name = protocol.__name__
    assert scores[f'{name}/best/patch/block'] == 2
    assert scores[f'{name}/best/patch'] == scores[f'{name}/2/patch']

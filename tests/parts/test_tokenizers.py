"Tokenizers: vectors of OpenAI's code, k-means against loops, the common interface, refused files."

import pickle

import pytest
import torch
from conftest import assert_close, sub
from safetensors.torch import save_file

from mimstudy.core.errors import StudyError
from mimstudy.core.scenes import scenes
from mimstudy.core.task import Batch
from mimstudy.parts.dvae import DVAE, conv_stacks, gumbel_softmax, prime_factors, temperature
from mimstudy.parts.tokenizers import (
    DallE,
    KMeansCodes,
    kmeans_step,
    nearest_centre,
    patch_descriptor,
    read_tensors,
    sample_patches,
)
from mimstudy.parts.views import normalise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def images():
    return scenes(40, size=32, seed=70).images


@pytest.fixture(scope='module')
def vectors(golden):
    return golden('dvae')


@pytest.fixture
def dalle(vectors, tmp_path):
    save_file(
        {k: v for k, v in vectors.items() if k.startswith('encoder.')}, tmp_path / 'encoder.safetensors'
    )
    return DallE.load(tmp_path / 'encoder.safetensors')


# k-means


def test_nearest_by_loops():
    x, centres = torch.rand(50, 12, generator=seeded()), torch.rand(7, 12, generator=seeded(1))
    ids, distance = nearest_centre(x, centres)
    for i, row in enumerate(x):
        squares = [((row - c) ** 2).sum().item() for c in centres]
        assert ids[i] == min(range(7), key=squares.__getitem__)
        assert abs(distance[i].item() - min(squares)) < 1e-5


def test_nearest_centre_is_float32_under_autocast():
    x, centres = torch.rand(200, 48, generator=seeded()), 0.5 + 1e-3 * torch.rand(9, 48, generator=seeded(1))
    with torch.autocast('cpu', torch.bfloat16):
        inside = nearest_centre(x, centres)[0]
    assert inside.equal(nearest_centre(x, centres)[0])


def test_one_kmeans_step_by_loops():
    x = torch.randint(0, 256, (60, 6), generator=seeded(), dtype=torch.uint8)
    centres = x[:5].float() / 255
    moved, error = kmeans_step(x, centres, seeded())
    joined, total = [[] for _ in range(5)], 0.0
    for row in x.double() / 255:
        squares = [((row - c) ** 2).sum().item() for c in centres.double()]
        joined[min(range(5), key=squares.__getitem__)].append(row)
        total += min(squares)
    assert_close(moved, torch.stack([torch.stack(rows).mean(0) for rows in joined]), rel=1e-6)
    assert_close(error, total / x.numel(), rel=1e-5)


def test_empty_centres_are_moved():
    x = torch.randint(0, 256, (200, 6), generator=seeded(), dtype=torch.uint8)
    centres = torch.full((8, 6), 0.5)
    for _ in range(3):
        centres, _ = kmeans_step(x, centres, seeded())
    assert len(nearest_centre(x.float() / 255, centres)[0].unique()) == 8


def test_sampled_patches_are_patches(images):
    found = sample_patches(images[:1], 4, 20, seeded()).view(20, 4, 4, 3).permute(0, 3, 1, 2)
    windows = images[0].unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    assert all((windows == one).flatten(1).all(1).any() for one in found)


def test_fit_is_a_function_of_the_generator_and_the_images(images):
    fits = [KMeansCodes(12, 4).fit(images, seeded(s), rounds=3).centres for s in (0, 0, 1)]
    assert fits[0].equal(fits[1]) and not fits[0].equal(fits[2])


def test_kmeans_codes_by_loops(images):
    tokenizer, x = KMeansCodes(12, 8).fit(images, seeded(), rounds=2), images[:2] / 255
    ids = tokenizer.codes(x)
    for b in range(2):
        for i in range(4):
            for j in range(4):
                patch = (
                    patch_descriptor(
                        x[b, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].permute(1, 2, 0).flatten()
                    ).float()
                    / 255
                )
                assert ids[b, i, j] == (tokenizer.centres - patch).square().sum(1).argmin()


def test_descriptor_by_loops():
    x = torch.rand(3, 48, generator=seeded()).double()
    for patch, descriptor in zip(x, patch_descriptor(x)):
        pixels = patch.view(16, 3).tolist()
        mean = [sum(p[c] for p in pixels) / 16 for c in range(3)]
        rest = [[p[c] - mean[c] for c in range(3)] for p in pixels]
        contrast = (sum(v * v for p in rest for v in p) / 48 + 0.01) ** 0.5
        expected = [128 + 24 * v / contrast for p in rest for v in p] + [48 * m for m in mean]
        assert max(abs(a - b) for a, b in zip(descriptor.tolist(), expected)) <= 0.5 + 1e-9


def test_contrast_changes_a_descriptor_less_than_structure():
    edges = (torch.arange(8) < 4).float()[:, None, None].expand(8, 8, 3)
    upright, lying = 0.3 + 0.4 * edges, 0.3 + 0.4 * edges.transpose(0, 1)
    a, fainter, b = (patch_descriptor(p.flatten()).float() for p in (upright, 0.4 + 0.2 * edges, lying))
    assert (a - fainter).norm() < 0.3 * (a - b).norm()


def test_mean_patches_by_loops(images):
    tokenizer = KMeansCodes(6, 8).fit(images, seeded(), per_code=30, rounds=2)
    patches = sample_patches(images, 8, 180, seeded())
    ids = nearest_centre(patch_descriptor(patches.float() / 255).float() / 255, tokenizer.centres)[0]
    for k in ids.unique():
        assert_close(tokenizer.mean_patches[k], patches[ids == k].double().mean(0) / 255, rel=1e-6)


def test_state_dict_restores_the_codes(images):
    tokenizer, other = KMeansCodes(12, 8).fit(images, seeded(), rounds=2), KMeansCodes(12, 8)
    other.load_state_dict(tokenizer.state_dict())
    assert other.codes(images / 255).equal(tokenizer.codes(images / 255))


# OpenAI's encoder


def test_dalle_parity(dalle, vectors):
    x = vectors['images_u8'].float() / 255
    assert_close(dalle.logits(x), vectors['logits'])
    assert dalle.codes(x).equal(vectors['tokens'].long())
    with torch.autocast('cpu', torch.bfloat16):
        assert dalle.codes(x).equal(vectors['tokens'].long())


def test_the_same_weights_from_other_files(vectors, tmp_path):
    weights, x = sub(vectors, 'encoder.'), vectors['images_u8'].float() / 255
    torch.save(weights, tmp_path / 'plain.pt')
    torch.save(
        {'state_dict': {f'encoder.{k}': v for k, v in weights.items()} | {'decoder.x': torch.zeros(1)}},
        tmp_path / 'wrapped.pkl',
    )
    for name in ('plain.pt', 'wrapped.pkl'):
        assert DallE.load(tmp_path / name).codes(x).equal(vectors['tokens'].long())


class Trap:
    def __reduce__(self):
        return (open, ('trapped', 'w'))


def test_files_that_are_not_weights(vectors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = sub(vectors, 'encoder.')
    torch.save(torch.nn.Linear(2, 2), 'module.pkl')
    torch.save({'w': Trap()}, 'trap.pt')
    (tmp_path / 'raw.pkl').write_bytes(pickle.dumps(Trap()))
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'text.safetensors').write_text('hello')
    (tmp_path / 'empty.pt').write_bytes(b'')
    torch.save([torch.zeros(1)], 'list.pt')
    torch.save({'epoch': 3}, 'numbers.pt')
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(StudyError, match=f'{file.name} is no state dict') as e:
            read_tensors(file)
        assert '\n' not in str(e.value)
    assert not (tmp_path / 'trapped').exists()
    with pytest.raises(StudyError, match='there is no tokenizer file'):
        DallE.load('nowhere.pt')
    for wrong, first in (
        ({'a': torch.zeros(1)}, 'a'),
        (weights | {'extra': torch.zeros(1)}, 'extra'),
        ({k: v for k, v in weights.items() if 'group_3' not in k}, 'blocks.group_3.block_1.id_path.b'),
        (
            weights | {'blocks.group_2.block_1.id_path.w': torch.zeros(16, 8, 3, 3)},
            'blocks.group_2.block_1.id_path.w',
        ),
        (weights | {'blocks.input.w': torch.zeros(())}, 'blocks.input.w'),
    ):
        torch.save(wrong, 'wrong.pt')
        with pytest.raises(StudyError, match=f'wrong.pt is not the encoder of a dVAE .see "{first}"') as e:
            DallE.load('wrong.pt')
        assert '\n' not in str(e.value) and 'blocks.group_1.block_1.res_path.conv_1.w' in str(e.value)


def test_dalle_has_openais_size():
    assert sum(p.numel() for p in DallE().parameters()) == 53_786_240


# the small autoencoder


def test_prime_factors():
    assert [prime_factors(n) for n in (2, 8, 12, 14, 15)] == [[2], [2] * 3, [2, 2, 3], [2, 7], [3, 5]]


@pytest.mark.parametrize('patch', [2, 4, 6, 8, 14, 16])
def test_conv_stacks_give_one_vector_per_patch(patch):
    down, up = conv_stacks(patch, 32)
    x = torch.zeros(1, 3, 3 * patch, 3 * patch)
    assert down(x).shape == (1, 32, 3, 3)
    assert up(down(x)).shape == x.shape


def test_temperature_and_gumbel_softmax():
    assert (
        temperature(0.0) == 1
        and temperature(1.0) == 1 / 16
        and abs(temperature(0.5) - (1 + 1 / 16) / 2) < 1e-12
    )
    logits = torch.randn(4, 9, 2, 2, generator=seeded(), requires_grad=True)
    soft = gumbel_softmax(logits, 0.5, seeded())
    assert torch.allclose(soft.sum(1), torch.ones(4, 2, 2)) and soft.equal(
        gumbel_softmax(logits, 0.5, seeded())
    )
    soft.square().sum().backward()
    assert logits.grad.abs().sum() > 0


def test_uniform_logits_have_no_divergence():
    task = DVAE(16, 4, 16)
    torch.nn.init.zeros_(task.logit.weight)
    torch.nn.init.zeros_(task.logit.bias)
    assert task(Batch([torch.randn(2, 3, 8, 8)]), 0.0)['kl'].abs() < 1e-6


def test_noise_is_a_function_of_progress(images):
    torch.manual_seed(0)
    task, batch = DVAE(16, 4, 16), Batch([normalise(images[:4] / 255)])
    first = task(batch, 0.25)['loss']
    torch.randn(5)
    assert task(batch, 0.25)['loss'].equal(first) and not task(batch, 0.26)['loss'].equal(first)
    assert not DVAE(16, 4, 16, seed=1)(batch, 0.25)['loss'].equal(first)


def test_dvae_learns_and_every_parameter_has_a_gradient(images):
    torch.manual_seed(0)
    task, batch = DVAE(32, 4, 16), Batch([normalise(images[:4] / 255)])
    optimiser = torch.optim.AdamW(task.parameters(), 3e-3)
    errors = []
    for step in range(40):
        out = task(batch, step / 40)
        optimiser.zero_grad()
        out['loss'].backward()
        optimiser.step()
        errors.append(out['error'].item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5]) and out['loss'].ndim == out['kl'].ndim == 0


# the common interface


@pytest.mark.parametrize('kind', ['kmeans', 'dalle', 'dvae'])
def test_interface(kind, dalle, images):
    torch.manual_seed(0)
    means = KMeansCodes(12, 8).fit(images, seeded(), rounds=2)
    tokenizer = {'kmeans': means, 'dalle': dalle, 'dvae': DVAE(20, 8, 16)}[kind]
    x = (images[:4] / 255).requires_grad_()
    ids, stride = tokenizer.codes(x), tokenizer.stride
    assert ids.shape == (4, 32 // stride, 32 // stride) and ids.dtype == torch.long and not ids.requires_grad
    assert 0 <= ids.min() and ids.max() < tokenizer.vocabulary and len(ids.unique()) > 1
    one_by_one = torch.cat([tokenizer.train().codes(one[None]) for one in x])
    assert one_by_one.equal(tokenizer.eval().codes(x))  # neither the other images nor the mode have an effect
    with torch.autocast('cpu', torch.bfloat16):
        assert tokenizer.codes(x).equal(ids)

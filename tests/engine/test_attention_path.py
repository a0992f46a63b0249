"Attention in training: the faster of two equal ways is chosen, used inside, and undone afterwards."

import pytest
import torch
from small_encoder import seeded

from mimstudy.core import settings as settings_module
from mimstudy.engine import hardware
from mimstudy.engine.hardware import (
    WRITTEN_OUT_TOKENS,
    fastest_attention,
    make_accelerator,
    use_fused_attention,
)
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.masks import random_mask
from mimstudy.parts.pathways import Joint
from mimstudy.parts.proxy import Proxy
from mimstudy.parts.relative_encoder import RelativeEncoder

CPU = torch.device('cpu')


def switches(module):
    return {part.fused_attn for part in module.modules() if hasattr(part, 'fused_attn')}


@pytest.mark.parametrize(
    'device, precision, tokens, fused',
    [
        ('cpu', 'no', 65, True),
        ('cpu', 'bf16', 65, False),
        ('cpu', 'bf16', WRITTEN_OUT_TOKENS, False),
        ('cpu', 'bf16', WRITTEN_OUT_TOKENS + 1, True),
        ('cuda', 'bf16', 65, True),
        ('mps', 'no', 65, True),
    ],
)
def test_the_rule(device, precision, tokens, fused):
    assert use_fused_attention(torch.device(device), precision, tokens) == fused


def proxies():
    return Proxy(Encoder(size=32, patch=8, width=48, depth=2, heads=3, prefix=4))


def joint():
    return Joint(Encoder(size=32, patch=8, width=48, depth=2, heads=3))


@pytest.mark.parametrize('make', [proxies, joint])
def test_both_ways_give_the_same_output_and_gradient(make):
    torch.manual_seed(0)
    pathway = make()
    x, mask = torch.randn(4, 3, 32, 32), random_mask(4, (4, 4), 0.5, seeded())
    results = {}
    for precision in ('no', 'bf16'):  # only the way is switched; everything is computed in float32
        pathway.zero_grad()
        with fastest_attention(pathway, CPU, precision):
            out = pathway(x, mask)
        out.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in pathway.parameters() if p.grad is not None])
        results[precision] = out.detach(), gradient
    for a, b in zip(*results.values(), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_relative_biases_are_kept():
    torch.manual_seed(0)
    encoder = RelativeEncoder(size=32, patch=8, width=48, depth=2, heads=3).eval()
    torch.nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    x = torch.randn(2, 3, 32, 32)
    fused = encoder.forward_features(x)
    with fastest_attention(encoder, CPU, 'bf16'):
        written_out = encoder.forward_features(x)
    assert torch.allclose(fused, written_out, atol=1e-5)


def test_the_switch_is_undone_also_after_an_error():
    pathway = proxies()
    assert switches(pathway) == {True}
    with pytest.raises(KeyError), fastest_attention(pathway, CPU, 'bf16'):
        assert switches(pathway) == {False}
        raise KeyError
    assert switches(pathway) == {True}


def test_bf16_without_hardware_is_a_warning(monkeypatch):
    monkeypatch.setattr(hardware, 'has_native_bf16', lambda: False)
    with pytest.warns(UserWarning, match='set the precision to auto or no'):
        accelerator = make_accelerator('cpu', 'bf16')
    assert accelerator.mixed_precision == 'bf16'


@pytest.mark.parametrize('native', [True, False])
def test_auto_takes_what_the_processor_has(monkeypatch, native):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'amx_bf16': native}, raising=False)
    assert settings_module.has_native_bf16() == native
    assert settings_module.resolve_precision('auto', CPU) == ('bf16' if native else 'no')

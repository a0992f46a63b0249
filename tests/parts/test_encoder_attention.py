"`attention` returns the weights of the fused attention: with the values they give its output in each block."

import pytest
import torch
from mimstudy.parts.attention import attention, attention_weights
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.relative_encoder import RelativeEncoder

SHAPE = dict(size=64, patch=8, width=48, depth=4, heads=3)
ENCODERS = {
    'class token': lambda: Encoder(**SHAPE),
    'eight prefix tokens': lambda: Encoder(**SHAPE, prefix=8, layer_scale=0.1),
    'relative positions': lambda: RelativeEncoder(**SHAPE),
}


def call_of(attn, forward):
    "Input, shared bias and output of an attention module during `forward()`."
    call = {}

    def hook(module, args, kwargs, out):
        call.update(x=args[0], bias=kwargs.get('shared_rel_pos_bias'), out=out)

    handle = attn.register_forward_hook(hook, with_kwargs=True)
    forward()
    handle.remove()
    return call


@pytest.mark.parametrize('name', ENCODERS)
@torch.no_grad()
def test_weights_times_values_are_the_fused_output(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    x = torch.randn(2, 3, 64, 64)
    for p in encoder.parameters():
        p.add_(0.1 * torch.randn_like(p))
    for i, block in enumerate(encoder.blocks):
        call = call_of(block.attn, lambda: encoder.forward_features(x))
        weights, values = attention_weights(block.attn, call['x'], call['bias'])
        output = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, call['out'], rtol=1e-5, atol=1e-5)
        from_encoder = attention(encoder, x, i)
        assert from_encoder.shape == (2, 3, encoder.P + 64, encoder.P + 64)
        assert from_encoder.equal(weights)
        torch.testing.assert_close(from_encoder.sum(-1), torch.ones(2, 3, encoder.P + 64))

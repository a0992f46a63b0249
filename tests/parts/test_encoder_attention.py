"A captured attention map is what the fused kernel used: multiplied with the values it gives the same output, at every block."

import pytest
import torch
from mimstudy.parts.encoder import Encoder, attention, attention_weights
from mimstudy.parts.relative_encoder import RelativeEncoder

SHAPE = dict(size=64, patch=8, width=48, depth=4, heads=3)


@pytest.mark.parametrize(
    'made',
    [
        lambda: Encoder(**SHAPE),
        lambda: Encoder(**SHAPE, prefix=8, layer_scale=0.1),
        lambda: RelativeEncoder(**SHAPE),
    ],
)
@torch.no_grad()
def test_weights_times_values_are_the_fused_output(made):
    torch.manual_seed(0)
    encoder, x = made().eval(), torch.randn(2, 3, 64, 64)
    for p in encoder.parameters():
        p.add_(0.1 * torch.randn_like(p))
    for i, block in enumerate(encoder.blocks):
        seen = {}
        hook = block.attn.register_forward_hook(
            lambda m, args, kwargs, out: seen.update(
                x=args[0], bias=kwargs.get('shared_rel_pos_bias'), out=out
            ),
            with_kwargs=True,
        )
        encoder.forward_features(x)
        hook.remove()
        weights, values = attention_weights(block.attn, seen['x'], seen['bias'])
        again = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, seen['out'], rtol=1e-5, atol=1e-5)
        captured = attention(encoder, x, i)
        assert captured.shape == (2, 3, encoder.P + 64, encoder.P + 64) and captured.equal(weights)
        torch.testing.assert_close(captured.sum(-1), torch.ones(2, 3, encoder.P + 64))

"Twenty-four scenes and a small encoder, for tests of evaluation and downstream trainings."

import pytest
import torch
from torch import nn

from mimstudy.core.scenes import scenes
from mimstudy.parts.encoder import Encoder
from mimstudy.parts.relative_encoder import RelativeEncoder
from mimstudy.parts.views import normalise, resize_only

SCENES = scenes(24, size=32, seed=3)
X = normalise(resize_only(SCENES.images, 32))  # (24,3,32,32)
BOTH_ENCODERS = pytest.mark.parametrize('encoder_class', [Encoder, RelativeEncoder])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_encoder(encoder_class=Encoder, **options):
    "An encoder of 3 blocks for 32 px; tables of relative positions are random, not zero."
    torch.manual_seed(0)
    defaults = dict(size=32, patch=8, width=32, depth=3, heads=4, drop_path=0.3)
    encoder = encoder_class(**defaults | options)
    if encoder_class is RelativeEncoder:
        nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    return encoder

"All measures of an encoder: attention on objects in closed form, and which measures there are."

import pytest
import torch

from mimstudy.analysis import measures
from mimstudy.analysis.measures import measure_encoder, object_attention
from mimstudy.parts.encoder import Encoder


def test_attention_on_objects_in_closed_form():
    objects = torch.tensor([[1.0, 0.5, 0.0, 0.0]])  # 3/8 of the image
    even = torch.full((1, 2, 2, 2), 0.25)
    assert object_attention(even, objects).item() == pytest.approx(0)
    only = torch.tensor([[[[0.3, 0.0], [0.0, 0.0]]]])  # the scale of a map does not matter
    assert object_attention(only, objects).item() == pytest.approx(8 / 3 - 1)
    none = torch.tensor([[[[0.0, 0.0], [0.5, 0.5]]]])
    assert object_attention(none, objects).item() == pytest.approx(-1)
    assert object_attention(even, torch.ones(1, 4)).isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize('prefix', [1, 2])
def test_measures_of_an_encoder(monkeypatch, prefix):
    monkeypatch.setattr(measures, 'CHUNKS', 2)
    torch.manual_seed(0)
    found = measure_encoder(Encoder(32, 8, 24, 2, 3, prefix=prefix).eval())
    assert ('overlap of prefix tokens' in found) == (prefix > 1)
    assert all(error >= 0 and value == value for value, error in found.values())
    by_block = [found[f'attention distance, block {block}'][0] for block in (0, 1)]
    assert found['attention distance'][0] == pytest.approx(sum(by_block) / 2)

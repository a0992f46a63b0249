"Estimates and their intervals cover the truth as often as they say."

import math
from statistics import mean

import pytest
import torch

from mimstudy.report.statistics import binomial, estimate


def test_spread_covers_the_truth():
    draws, n = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)).tolist(), 3
    assert abs(mean(not estimate(d, [0.0] * n).noise for d in draws) - 0.05) < 0.01, (
        'an interval of three seeds leaves out the truth one time in twenty'
    )
    assert estimate([40.0], [binomial(40.0, 100)]).half == pytest.approx(1.96 * math.sqrt(0.24 / 100) * 100)


def test_binomial_is_the_spread_of_scores():
    scores = 100 * torch.rand(4000, 500, generator=torch.Generator().manual_seed(0)).lt(0.3).double().mean(1)
    assert scores.std().item() == pytest.approx(binomial(30.0, 500), rel=0.05)

"Estimates, their intervals, and the records that a table counts."

import math
from statistics import mean

import pytest
import torch
from invented_records import invented_record

from mimstudy.papers.tables import TABLES
from mimstudy.report.statistics import Estimate, binomial_error, estimate, holm_levels, table_records
from mimstudy.study.records import RecordStore

TABLE = TABLES['semanticmim-t1']
BEIT = TABLE.row('beit')
PROXIED = TABLE.row('beit+semanticmim')
PREFIX = TABLE.columns[0]


def test_an_interval_of_three_seeds_leaves_out_the_truth_one_time_in_twenty():
    draws = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    missed = mean(not estimate(values, [0.0] * 3).contains_zero for values in draws)
    assert abs(missed - 0.05) < 0.01


def test_one_seed_has_the_error_of_its_validation_images():
    one = estimate([40.0], [binomial_error(40.0, 100)])
    standard_error = 100 * math.sqrt(0.4 * 0.6 / 100)
    assert one.sd == pytest.approx(standard_error)
    assert one.half_width == pytest.approx(1.959964 * standard_error)
    assert (one.mean, one.n) == (40.0, 1)


def test_an_interval_contains_zero():
    assert Estimate(mean=1.0, sd=1.0, error=0.8, n=1).contains_zero
    assert not Estimate(mean=2.0, sd=1.0, error=0.8, n=1).contains_zero
    assert not Estimate(mean=-2.0, sd=1.0, error=0.8, n=1).contains_zero


def test_p_values_of_known_noise():
    one_seed = Estimate(mean=2.0, sd=1.0, error=1.0, n=1)
    assert one_seed.p_value == pytest.approx(math.erfc(2 / math.sqrt(2)))
    three_seeds = Estimate(mean=4.302653, sd=math.sqrt(3), error=0.0, n=3)  # quantile .975 of Student's t
    assert three_seeds.p_value == pytest.approx(0.05, rel=1e-5)
    assert Estimate(mean=0.0, sd=1.0, error=1.0, n=3).p_value == 1.0
    assert Estimate(mean=1.0, sd=0.0, error=0.0, n=3).p_value == 0.0


def test_p_values_without_an_effect_are_uniform():
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    p_values = sorted(estimate(values, [0.0] * 3).p_value for values in draws)
    assert max(abs(p - (i + 0.5) / len(p_values)) for i, p in enumerate(p_values)) < 0.03


@pytest.mark.parametrize(
    'p_values, told_apart',
    [
        ([0.01, 0.02, 0.04], [True, True, True]),  # .05/3, .05/2, .05
        ([0.04, 0.01, 0.03], [False, True, False]),  # .03 fails at .05/2, so .04 is not tried
        ([0.02, 0.02, 0.02], [False, False, False]),
        ([0.001, 0.2, 0.012, 0.026], [True, False, True, False]),
        ([0.05], [True]),
        ([], []),
    ],
)
def test_holm(p_values, told_apart):
    assert [p <= level for p, level in zip(p_values, holm_levels(p_values), strict=True)] == told_apart


def test_holm_errs_in_one_family_of_twenty():
    draws = torch.rand(5000, 8, generator=torch.Generator().manual_seed(1)).tolist()
    wrong = mean(any(p <= level for p, level in zip(ps, holm_levels(ps), strict=True)) for ps in draws)
    assert abs(wrong - 0.05) < 0.01


def test_the_binomial_error_is_the_deviation_of_scores():
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(4000, 500, generator=generator) < 0.3
    scores = 100 * correct.double().mean(1)
    assert scores.std().item() == pytest.approx(binomial_error(30.0, 500), rel=0.05)


@pytest.fixture
def store(tmp_path):
    "Seeds 0 and 1 of BEiT, seeds 1 and 2 of BEiT with proxies."
    store = RecordStore(tmp_path)
    for seed, score in ((0, 10.0), (1, 12.0)):
        store.add(invented_record('semanticmim-t1/beit', seed, linear_best_prefix=score))
    for seed, score in ((1, 20.0), (2, 30.0)):
        store.add(invented_record('semanticmim-t1/beit+semanticmim', seed, linear_best_prefix=score))
    return store


def test_scores_of_a_cell_are_means_over_seeds(store):
    records = table_records(TABLE, store, 'laptop')
    assert records.score(PROXIED, PREFIX).mean == 25.0
    assert records.score(PROXIED, PREFIX).n == 2
    assert records.score(TABLE.row('maskfeat'), PREFIX) is None
    assert records.seeds() == [0, 1, 2]
    assert records.seeds('linear') == [0, 1, 2]
    assert records.seeds('finetune') == []


def test_differences_are_paired_by_seed(store):
    records = table_records(TABLE, store, 'laptop')
    difference = records.difference(PROXIED, BEIT, PREFIX)
    assert (difference.mean, difference.n) == (8.0, 1)
    assert records.difference(PROXIED, TABLE.row('maskfeat'), PREFIX) is None


def test_records_of_other_configurations_are_left_out_and_counted(store):
    stale = invented_record('semanticmim-t1/beit', 7, linear_best_prefix=99.0)
    store.add(stale | dict(id='stale'))
    store.add(stale | dict(id='another', row='a-row-of-the-past'))
    records = table_records(TABLE, store, 'laptop')
    assert records.stale == 2
    assert len(records.records) == 4
    assert records.score(BEIT, PREFIX).mean == 11.0


def test_other_scales_and_datasets_are_not_counted(store):
    store.add(invented_record('semanticmim-t1/beit', 5, 'smoke', linear_best_prefix=99.0))
    records = table_records(TABLE, store, 'laptop')
    assert (len(records.records), records.stale) == (4, 0)
    assert not table_records(TABLE, store, 'laptop', 'scenes').records

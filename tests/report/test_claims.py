"Claims: the data hold together, and verdicts follow the rule that the page states."

import re

import pytest
from invented_records import invented_record

from mimstudy.papers.claim_classes import Claim, Measurement, between
from mimstudy.papers.tables import TABLES
from mimstudy.report.claims import claims_page
from mimstudy.report.statistics import Estimate
from mimstudy.report.verdicts import (
    CANNOT_TELL,
    CLAIMS,
    NOT_SEEN,
    RULE,
    SEEN,
    findings,
    relevant_size,
    verdict,
)
from mimstudy.study.records import RecordStore

MEASUREMENTS = [(claim, measurement) for claim in CLAIMS for measurement in claim.measurements]


def test_claims_are_numbered_and_each_is_measured_or_says_why_not():
    for paper in ('SemanticMIM', 'ConMIM'):
        numbers = [claim.number for claim in CLAIMS if claim.paper == paper]
        assert numbers == [*range(1, len(numbers) + 1)] and len(numbers) > 20
    assert all(claim.measurements or claim.note for claim in CLAIMS)
    assert all(claim.place and claim.text.endswith(('.', ').')) for claim in CLAIMS)


def test_measurements_name_declared_rows_that_can_be_run():
    for _, measurement in MEASUREMENTS:
        table = TABLES[measurement.table]
        assert measurement.column in [column.name for column in table.columns]
        rows = [table.row(row) for _, row in measurement.terms]
        assert all(row in table.measured for row in rows) and len(set(measurement.terms)) == len(rows)


def test_the_papers_own_numbers_agree_with_each_claim():
    known = [(claim, one) for claim, one in MEASUREMENTS if one.paper is not None and one.sign]
    assert len(known) > 80
    assert [one for _, one in known if one.paper * one.sign <= 0] == []


def test_claims_speak_of_every_difference_that_semanticmim_table_1_prints():
    printed = {
        (row, column)
        for row in ('beit+semanticmim', 'maskfeat+semanticmim')
        for column in ('linear_cls', 'linear_patch', 'ft_cls', 'ft_patch', 'voc', 'ade20k')
    }
    spoken = {(m.row, m.column) for _, m in MEASUREMENTS if m.table == 'semanticmim-t1' and m.paper}
    assert printed <= spoken


def test_claims_speak_of_every_ablation_of_conmim():
    for number in range(4, 10):
        table = TABLES[f'conmim-t{number}']
        spoken = {row for _, m in MEASUREMENTS if m.table == table.name for row in (m.row, m.against)}
        assert spoken == {row.name for row in table.measured}


UP = Measurement('semanticmim-t1', 'beit+semanticmim', 'beit', 'linear_cls')  # the paper has +17.7
SMALL = Measurement('conmim-t6', 'conmim', 'strong-both', 'ft')  # the paper has +.10
EQUAL = Measurement('conmim-t9', 'alpha=0.99', 'alpha=0.996', 'knn_patch', sign=0)
DOWN = Measurement('conmim-t8', 'tau=0.05', 'tau=0.1', 'ft', sign=-1)


def seeds(mean, half, n=3):
    "A difference whose 95 % interval has this half width."
    return Estimate(mean, 0.0, half / 1.959964, n)


@pytest.mark.parametrize(
    'measurement, ours, expected',
    [
        (UP, seeds(5, 4), SEEN),
        (UP, seeds(5, 6), CANNOT_TELL),
        (UP, seeds(-5, 4), NOT_SEEN),
        (UP, seeds(0.5, 1), NOT_SEEN),  # 2 points are excluded
        (UP, seeds(0.5, 2), CANNOT_TELL),
        (UP, seeds(5, 4, n=2), CANNOT_TELL),
        (SMALL, seeds(0.0, 1.0), CANNOT_TELL),  # the paper's own .1 is not excluded
        (SMALL, seeds(-1.0, 1.05), NOT_SEEN),
        (DOWN, seeds(-5, 4), SEEN),
        (DOWN, seeds(5, 4), NOT_SEEN),
        (EQUAL, seeds(0.1, 0.2), SEEN),
        (EQUAL, seeds(0.1, 1.0), CANNOT_TELL),
        (EQUAL, seeds(3.0, 1.0), NOT_SEEN),
    ],
)
def test_a_verdict_follows_the_rule(measurement, ours, expected):
    assert verdict(measurement, ours, 0.05) == expected


def test_a_correction_can_take_a_verdict_away():
    assert verdict(UP, seeds(5, 4), 0.05) == SEEN
    assert verdict(UP, seeds(5, 4), 0.001) == CANNOT_TELL


def test_the_relevant_size_is_the_papers_if_that_is_smaller():
    assert relevant_size(UP) == 2.0
    assert relevant_size(SMALL) == pytest.approx(0.1)
    assert relevant_size(Measurement('all-methods', 'conmim', 'beit', 'knn_patch')) == 2.0


def store_of(folder, rows, seeds=3, scale='laptop'):
    "Records of SemanticMIM Table 1: row -> prefix score of seed 0; others are .1 higher each."
    store = RecordStore(folder)
    for row, score in rows.items():
        for seed in range(seeds):
            scores = dict(linear_best_prefix=score + seed / 10)
            store.add(invented_record(f'semanticmim-t1/{row}', seed, scale, **scores))
    return store


GAINS = {'beit': 20.0, 'beit+semanticmim': 40.0, 'maskfeat': 20.0, 'maskfeat+semanticmim': 30.0}


def test_findings_are_paired_differences_and_second_differences(tmp_path):
    found = findings(store_of(tmp_path, GAINS))
    shown = {(one.measurement.row, bool(one.measurement.beyond)): one for one in found}
    assert len(found) == len(shown) == 3
    assert shown['beit+semanticmim', False].ours.mean == pytest.approx(20.0)
    assert shown['maskfeat+semanticmim', False].ours.mean == pytest.approx(10.0)
    second = shown['maskfeat+semanticmim', True]
    assert second.ours.mean == pytest.approx(-10.0) and second.verdict == NOT_SEEN
    errors = [one.ours.error for one in shown.values() if not one.measurement.beyond]
    assert second.ours.error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5, rel=1e-3)
    assert sorted(one.level for one in found) == pytest.approx([0.05 / 3, 0.05 / 2, 0.05])


def test_each_paper_scale_and_dataset_is_corrected_for_itself(tmp_path):
    store = store_of(tmp_path, GAINS)
    before = findings(store)
    for seed in range(3):
        for row, score in (('conmim', 80.0), ('instance', 50.0)):
            store.add(invented_record(f'conmim-t4/{row}', seed, linear_best_patch=score))
    after = findings(store)
    assert len(after) == len(before) + 1 and after[-1].level == 0.05
    assert [one.level for one in after[:-1]] == [one.level for one in before]


def test_smoke_scale_and_too_few_seeds_show_nothing(tmp_path):
    assert findings(store_of(tmp_path / 'smoke', GAINS, scale='smoke')) == []
    assert {one.verdict for one in findings(store_of(tmp_path / 'two', GAINS, seeds=2))} == {CANNOT_TELL}


def test_the_page_has_every_claim_its_rule_and_each_finding(tmp_path):
    store = store_of(tmp_path, GAINS)
    text = claims_page(store)
    assert RULE in text
    for claim in CLAIMS:
        assert f'### {claim.paper} {claim.number}\n' in text and claim.text in text
    lines = [line for line in text.splitlines() if line.startswith('| [laptop, ')]
    assert len(lines) == len(findings(store))
    for line, one in zip(lines, findings(store), strict=True):
        assert f'| {one.ours.mean:+.1f} [{one.ours.low:+.1f}, {one.ours.high:+.1f}] |' in line
        assert line.endswith(f'**{one.verdict}** |')
        assert re.search(r'\]\(semanticmim-t1-laptop-tiny-imagenet-64c\.md\)', line)
    empty = claims_page(RecordStore(tmp_path / 'empty'))
    assert '0 of 45 claims' in empty and empty.count('**no record**') == len(CLAIMS)


def test_claims_of_ones_own_use_the_same_rule(tmp_path):
    store = store_of(tmp_path, GAINS)
    own = Claim('own', 1, '', 'a.', between('semanticmim-t1', 'maskfeat', 'beit', 'linear_cls', sign=0))
    (one,) = findings(store, (own,))
    assert one.ours.mean == 0.0 and one.level == 0.05

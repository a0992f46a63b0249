"Measures of encoders: the files, the verdicts on what the papers claim, the page."

import json
from pathlib import Path

import pytest

import mimstudy.analysis.measures
from mimstudy.report.measure_pages import GROUPS, measures_csv, measures_page
from mimstudy.report.measures import (
    MEASURE_CLAIMS,
    METHODS,
    Measured,
    MeasureClaim,
    find_measures,
    measure_findings,
    publish_measures,
    read_measures,
    save_measures,
)
from mimstudy.study.records import RecordStore

ROOT = Path(__file__).resolve().parents[2]
STORE = RecordStore(ROOT / 'results')
PLACE = ('laptop', 'scenes')
HIGHER = MeasureClaim('attention distance', 'beit+semanticmim', 'beit', 1, 'a figure')


def measured(row, value, seed=0, error=0.1):
    return Measured(row, seed, {'attention distance': (value, error)})


def pair(difference, seeds=3):
    "Both encoders of `HIGHER` with a difference, for each seed."
    rows = (('beit', 30.0), ('beit+semanticmim', 30.0 + difference))
    return [measured(row, value + seed / 10, seed) for row, value in rows for seed in range(seeds)]


@pytest.mark.parametrize(
    'difference, sign, seeds, verdict',
    [
        (2.0, 1, 3, 'agrees'),
        (-2.0, 1, 3, 'disagrees'),
        (-2.0, -1, 3, 'agrees'),
        (0.1, 1, 3, 'cannot tell'),
        (2.0, 1, 1, 'agrees, a hint'),
        (-2.0, 1, 2, 'disagrees, a hint'),
    ],
)
def test_verdicts(difference, sign, seeds, verdict):
    (finding,) = measure_findings(pair(difference, seeds), (HIGHER._replace(sign=sign),))
    assert finding.verdict == verdict
    assert finding.ours.mean == pytest.approx(difference)
    assert finding.ours.n == seeds


def test_a_measure_is_compared_with_its_bound():
    claim = MeasureClaim('attention distance', 'beit', '', -1, '', bound=31.0)
    (finding,) = measure_findings([measured('beit', 30.0)], (claim,))
    assert finding.ours.mean == pytest.approx(-1.0)
    assert finding.verdict == 'agrees, a hint'


def test_seeds_are_paired_and_a_claim_without_both_encoders_has_no_finding():
    only = [measured('beit', 30.0, 0), measured('beit+semanticmim', 32.0, 1)]
    assert measure_findings(only[:1], (HIGHER,)) == []
    assert measure_findings(only, (HIGHER,)) == []


def test_the_level_is_corrected_for_the_number_of_claims():
    barely = pair(0.3, 1)  # 2.1 standard errors
    assert measure_findings(barely, (HIGHER,))[0].verdict == 'agrees, a hint'
    verdicts = {one.verdict for one in measure_findings(barely, (HIGHER,) * 5)}
    assert verdicts == {'cannot tell'}


def test_measures_are_kept_found_and_published(tmp_path, monkeypatch):
    monkeypatch.setattr(mimstudy.analysis.measures, 'measure_encoder', lambda encoder: {'a': (1.0, 0.5)})
    store, target = RecordStore(tmp_path / 'own'), RecordStore(tmp_path / 'target')
    file = save_measures(None, store, 'beit', *PLACE, seed=2)
    assert file.name == 'beit-laptop-scenes-s2-509a69dc.json'
    assert read_measures(store, *PLACE) == [Measured('beit', 2, {'a': (1.0, 0.5)})]
    assert find_measures(target, 'beit', 2, *PLACE) is None
    assert [one.name for one in publish_measures(store, target)] == [file.name]
    assert read_measures(target, *PLACE) == read_measures(store, *PLACE)
    empty = RecordStore(tmp_path / 'empty')
    empty.published = target
    assert read_measures(empty, *PLACE) == read_measures(store, *PLACE)


def test_the_page_has_every_claim_and_a_line_for_each_method():
    both = pair(-2.0)
    page = measures_page(both, *PLACE)
    assert '**disagrees**' in page
    assert '| BEiT | 30.1 ± 0.1 (3) |' in page
    assert measures_csv(both).splitlines()[1] == 'beit,0,"attention distance",30,0.1'


def test_committed_measures_have_every_measure_of_the_page_and_of_the_claims():
    found = read_measures(STORE, *PLACE)
    assert len(found) == len(list((STORE.root / 'measures').glob('*.json'))), 'measures of other trainings'
    names = {name for one in found for name in one.values}
    assert {name for group in GROUPS.values() for name in group} <= names
    assert len(measure_findings(found)) == len(MEASURE_CLAIMS)
    assert {claim.row for claim in MEASURE_CLAIMS} <= {row.name for row in METHODS.rows}


def test_committed_measures_were_made_by_committed_code():
    for file in (STORE.root / 'measures').glob('*.json'):
        assert not json.loads(file.read_text())['commit'].endswith('+changes'), file.name

"Ranges of scores: derived by their rule, read from a file, and told when a record lies outside."

import json
import math
from pathlib import Path
from statistics import mean, stdev

import pytest
from invented_records import invented_record

from mimstudy.core.errors import StudyError
from mimstudy.papers.tables import TABLES
from mimstudy.report.expectations import (
    EXPECTATIONS_FILE,
    FACTOR,
    RANGE_RULE,
    check_ranges,
    derived_ranges,
    read_ranges,
    write_ranges,
)
from mimstudy.study.records import RecordStore

RESULTS = Path(__file__).resolve().parents[2] / 'results'


@pytest.fixture
def store(tmp_path):
    "Three seeds of BEiT, two of MaskFeat."
    store = RecordStore(tmp_path)
    for row, scores in (('beit', (30.0, 32.0, 31.0)), ('maskfeat', (40.0, 41.0))):
        for seed, score in enumerate(scores):
            store.add(invented_record(f'semanticmim-t1/{row}', seed, linear_best_prefix=score))
    return store


def test_a_range_follows_its_rule(store):
    (one,) = derived_ranges(store)
    scores = (30.0, 32.0, 31.0)
    errors = [math.sqrt(score * (100 - score) / 3200) for score in scores]
    half = 4 * math.sqrt(stdev(scores) ** 2 + mean(errors) ** 2)
    assert (one.low, one.high) == (round(31 - half, 2), round(31 + half, 2))
    assert one.place == ('semanticmim-t1', 'beit', 'laptop', 'tiny-imagenet-64c', 'linear_cls')
    assert one.records == [record['id'] for record in store.find(row='beit')]
    assert f'{FACTOR:g}' in RANGE_RULE


def test_a_score_outside_is_told_and_rows_without_a_range_too(store):
    ranges = derived_ranges(store)
    assert check_ranges(store, ranges).outside == []
    store.add(invented_record('semanticmim-t1/beit', 3, linear_best_prefix=55.0))
    checked = check_ranges(store, ranges)
    assert checked.inside == 3 and len(checked.outside) == 1
    assert checked.outside[0].startswith(
        'semanticmim-t1/beit at laptop scale on tiny-imagenet-64c, seed 3: Linear, prefix is 55.0, expected '
    )
    assert checked.without == ['semanticmim-t1/maskfeat at laptop scale on tiny-imagenet-64c']


def test_smoke_scale_has_no_ranges(tmp_path):
    store = RecordStore(tmp_path)
    for seed in range(3):
        store.add(invented_record('semanticmim-t1/beit', seed, 'smoke', linear_best_prefix=9.0))
    assert derived_ranges(store) == [] and check_ranges(store, []).without == []


def test_an_update_keeps_the_ranges_of_scores_that_have_no_records_here(store, tmp_path):
    file = tmp_path / 'file.json'
    first = write_ranges(store, file)
    other = RecordStore(tmp_path / 'other')
    for seed in range(3):
        other.add(invented_record('conmim-t8/tau=0.1', seed, linear_best_patch=50.0 + seed))
    both = write_ranges(other, file)
    assert read_ranges(file) == both and first[0] in both and len(both) == 2
    assert json.loads(file.read_text('utf-8'))['rule'] == RANGE_RULE


@pytest.mark.parametrize(
    'text', ['', '{}', '[]', '{"ranges": [{"table": 1}]}', '{"ranges": [3]}', '{"ranges": 3}']
)
def test_a_file_of_another_kind_is_one_line(tmp_path, text):
    (tmp_path / 'file.json').write_text(text)
    with pytest.raises(StudyError, match='file.json does not hold ranges of scores'):
        read_ranges(tmp_path / 'file.json')


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(StudyError, match='mimstudy check --update writes it'):
        read_ranges(tmp_path / 'file.json')


def test_committed_ranges_name_declared_rows_and_hold_their_own_records():
    ranges = read_ranges(RESULTS / EXPECTATIONS_FILE)
    store = RecordStore(RESULTS)
    known = {record['id']: record for record in store.find()}
    assert len(ranges) >= 34
    for one in ranges:
        table = TABLES[one.table]
        assert table.row(one.row) in table.measured and len(one.records) >= 3
        (column,) = [column for column in table.columns if column.name == one.column]
        key = column.key(one.scale, table.row(one.row).features)
        scores = [known[id]['scores'][key] for id in one.records]
        assert all(one.low <= score <= one.high for score in scores)
        middle = mean(scores)
        assert one.low == 0 or one.high == 100 or (one.low + one.high) / 2 == pytest.approx(middle, abs=0.02)


def test_every_committed_record_lies_in_its_range():
    assert check_ranges(RecordStore(RESULTS), read_ranges(RESULTS / EXPECTATIONS_FILE)).outside == []

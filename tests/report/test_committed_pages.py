"What is committed: the pages and the results in the README come from the committed records."

from collections import Counter
from pathlib import Path

import pytest

from mimstudy.report.pages import MARKERS, pages, readme_block, write_tables
from mimstudy.study.records import RecordStore

ROOT = Path(__file__).resolve().parents[2]
STORE = RecordStore(ROOT / 'results')


def texts(files):
    "File name -> text."
    return {file.name: file.read_text('utf-8') for file in files}


def test_pages_come_from_the_records(tmp_path):
    committed = texts((ROOT / 'results' / 'tables').iterdir())
    assert texts(write_tables(STORE, tmp_path)) == committed, 'run mimstudy report --results results'


def test_pages_say_how_the_best_block_is_chosen():
    for file in (ROOT / 'results' / 'tables').glob('*-*.md'):
        assert 'the best block, which is chosen on held-out training images' in file.read_text('utf-8')


def test_each_measurement_is_committed_once():
    found = Counter((record['experiment'], record['protocol']) for record in STORE.find())
    assert [names for names, number in found.items() if number > 1] == []


def test_the_readme_shows_the_records():
    readme = ROOT / 'README.md'
    if not readme.exists() or not pages(STORE):
        pytest.skip('no records are committed yet')
    start, end = MARKERS
    text = readme.read_text('utf-8')
    results = text.partition(start)[2].partition(end)[0].strip()
    assert results == readme_block(STORE), 'run mimstudy report --results results'

"What is committed: records are measured, and pages and README come from them."

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mimstudy.papers.tables import TABLES
from mimstudy.report.pages import MARKERS, pages, readme_block, write_tables
from mimstudy.study.records import RecordStore

ROOT = Path(__file__).resolve().parents[2]


def test_committed_records_are_measured_and_whole(capsys):
    found = RecordStore(ROOT / 'results').find()
    assert not capsys.readouterr().err, 'a broken record'
    for r in found:
        assert 'made' not in r['commit'] and r['commit'] != 'unknown' and r['table'] in TABLES
        assert not re.search(r'/(root|home|tmp|Users)/', json.dumps(r)), r['id']
        assert all(0 <= v <= 100 for k, v in r['scores'].items() if not k.endswith('/block'))


def test_committed_pages_come_from_the_committed_records(tmp_path):
    results, committed = (
        RecordStore(ROOT / 'results'),
        {f.name: f.read_text('utf-8') for f in (ROOT / 'results' / 'tables').glob('*.md')},
    )
    assert {f.name: f.read_text('utf-8') for f in write_tables(results, tmp_path)} == committed, (
        'run mimstudy report'
    )
    assert max(Counter(f'{r["experiment"]}-{r["protocol"]}' for r in results.find()).values(), default=1) == 1


def test_the_readme_shows_the_committed_records():
    readme = ROOT / 'README.md'
    if not readme.exists() or not pages(RecordStore(ROOT / 'results')):
        pytest.skip('no records are committed yet')
    text = readme.read_text('utf-8')
    assert text.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip() == readme_block(
        RecordStore(ROOT / 'results')
    ), 'run mimstudy report'

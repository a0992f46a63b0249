"Reports of many records: what is read, and what is imported for it."

import subprocess
import sys

import pytest
from invented_records import invented_record

from mimstudy.methods import catalogue
from mimstudy.papers.tables import SEMANTICMIM_T1
from mimstudy.report import statistics
from mimstudy.report.pages import page_texts
from mimstudy.study import records as module
from mimstudy.study.records import RecordStore


def records_of(rows, seeds):
    return [
        invented_record(f'semanticmim-t1/{row}', seed, linear_1_patch=10.0 + seed, linear_1_prefix=9.0)
        for row in rows
        for seed in range(seeds)
    ]


def test_each_record_is_read_once_and_each_row_configured_once(tmp_path, monkeypatch):
    "However many seeds a row has, its configuration is built once for a table."
    store = RecordStore(tmp_path)
    for one in records_of(('random', 'beit'), 6):
        store.add(one)
    read, configured = [], []
    real_read, real_experiment = module.read_record, statistics.table_experiment

    def count_read(file):
        read.append(file)
        return real_read(file)

    def count_experiment(table, row, *more):
        configured.append(row)
        return real_experiment(table, row, *more)

    monkeypatch.setattr(module, 'read_record', count_read)
    monkeypatch.setattr(statistics, 'table_experiment', count_experiment)
    found = statistics.table_records(SEMANTICMIM_T1, store, 'laptop', 'tiny-imagenet-64c')
    assert len(found.records) == 12 and found.stale == 0
    assert sorted(configured) == ['beit', 'random']
    assert page_texts(store) and len(read) == 12


def test_the_source_of_a_constructor_is_read_once(monkeypatch):
    catalogue.method_options('beit')
    monkeypatch.setattr(catalogue.ast, 'parse', None)
    assert 'pathway' in catalogue.method_options('beit')


@pytest.mark.slow
def test_a_report_with_its_figures_imports_no_torch(tmp_path):
    store = RecordStore(tmp_path)
    for one in records_of(('random', 'beit'), 2):
        store.add(one)
    code = (
        'import sys\n'
        'from mimstudy.cli.commands import app\n'
        'app(["report", "--results", sys.argv[1]], standalone_mode=False)\n'
        'print(sorted({"torch", "timm"} & set(sys.modules)))\n'
    )
    done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, check=True)
    *files, imported = done.stdout.splitlines()
    assert imported == '[]'
    assert any(name.endswith('.png') for name in files)

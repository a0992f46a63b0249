"Tables as CSV, HTML and LaTeX: the same numbers as the Markdown page, each linked to its record."

import html
import io
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pandas as pd
import pytest
from invented_records import invented_record

from mimstudy.papers.tables import TABLES
from mimstudy.report.comparisons import comparisons
from mimstudy.report.frames import (
    comparison_frame,
    render_records,
    table_csv,
    table_html,
    table_latex,
)
from mimstudy.report.pages import page, stale_pages, write_tables
from mimstudy.report.statistics import table_records
from mimstudy.report.tables import render
from mimstudy.study.records import RecordStore

T1 = TABLES['semanticmim-t1']
SCORES = {'random': 20.0, 'beit': 30.0, 'beit-8': 31.0, 'beit+semanticmim': 50.0}


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    store = RecordStore(tmp_path_factory.mktemp('frames'))
    for row, score in SCORES.items():
        for seed in range(3):
            scores = dict(linear_best_prefix=score + seed, linear_best_patch=score - seed)
            store.add(invented_record(f'semanticmim-t1/{row}', seed, **scores))
    return store


@pytest.fixture(scope='module')
def records(store):
    return table_records(T1, store, 'laptop')


def test_a_csv_holds_every_number_of_the_paper_and_of_the_records(records):
    frame = pd.read_csv(io.StringIO(table_csv(T1, records)))
    for row in T1.rows:
        for column in T1.columns:
            own = frame[(frame.row == row.name) & (frame.column == column.label)]
            paper, score = T1.paper(row, column), records.score(row, column)
            assert (len(own) > 0) == (paper is not None or score is not None)
            if paper is not None:
                assert set(own.paper) == {paper}
            if score is not None:
                assert own['mean'].tolist() == pytest.approx([score.mean] * len(own), abs=1e-4)
                assert set(own.seeds) == {3}


def test_a_csv_holds_every_comparison(records):
    frame = comparison_frame(T1, records)
    made = comparisons(T1, records)
    assert len(frame.dropna(subset='difference')) == len(made) == 8
    for one in made:
        rows = (frame.row == one.row.name) & (frame.compared_with == one.against.name)
        (line,) = frame[rows & (frame.column == one.column.label)].to_dict('records')
        assert (line['difference'], line['low'], line['high']) == (one.ours.mean, one.ours.low, one.ours.high)
        assert (line['p'], line['holm_level']) == (one.ours.p_value, one.level)


def html_lines(text):
    "The cells of each line of an HTML table, without tags and without the seeds that are links."
    lines = re.findall(r'<tr>(.*?)</tr>', text, re.S)
    lines = [re.findall(r'<td>(.*?)</td>', line, re.S) for line in lines]
    plain = [[html.unescape(re.sub('<[^>]+>', '', cell)) for cell in line] for line in lines if line]
    return [[re.sub(r'\): [\d ]+$', ')', cell) for cell in line] for line in plain]


def test_html_shows_the_cells_of_the_page(records):
    markdown = render(T1, records)
    shown = [line for line in html_lines(table_html(T1, records)) if 'seeds' in line[3]]
    assert len(shown) == 8
    for _, label, paper, here, against, theirs, ours, sign in shown:
        assert f'| {label} | {paper} | {here} | {against} | {theirs} | {ours} | {sign} |' in markdown


def test_html_links_each_score_to_its_record(store, records):
    links = re.findall(r'href="([^"]+)">(\d)</a>', table_html(T1, records))
    files = [((store.root / 'tables' / unquote(link)).resolve(), int(seed)) for link, seed in links]
    assert len(files) == 2 * 3 * len(SCORES)
    for file, seed in files:
        assert json.loads(file.read_text())['seed'] == seed


def test_a_page_links_each_score_to_its_record(store, records):
    text = render_records(T1, records)
    found = re.findall(r'\[([\d.]+) · ([\d.]+)\]\(([^)]+)\)', text)
    assert len(found) == 3 * len(SCORES)
    for prefix, patch, link in found:
        one = json.loads((store.root / 'tables' / unquote(link)).resolve().read_text())['scores']
        assert (float(prefix), float(patch)) == (one['linear/best/prefix'], one['linear/best/patch'])
    assert text in page(T1, records)


def test_a_page_links_notebooks_that_are_kept(store, records):
    one = store.find(row='beit+semanticmim', seed=1)[0]['experiment']
    text = render_records(T1, records, [one])
    assert text.count('[notebook]') == 1
    (link,) = re.findall(r'\(\[notebook\]\(\.\./notebooks/([^)]+)\.ipynb\)\)', text)
    assert unquote(link) == one


def test_latex_has_balanced_braces_and_no_bare_special_characters(records):
    text = table_latex(T1, records)
    assert text.count('{') == text.count('}') and text.isascii()
    assert not re.search(r'(?<!\\)[%#_]', text)
    assert text.count(r'BEiT + SemanticMIM & ') == 10
    assert r'52.0 $\pm$ 1.0' not in text and r'51.0 $\pm$ 1.0 (3 seeds)' in text


@pytest.mark.skipif(not shutil.which('pdflatex'), reason='pdflatex is not installed')
def test_latex_compiles(records, tmp_path):
    packages = r'\usepackage{booktabs,longtable}\usepackage[utf8]{inputenc}'
    text = rf'\documentclass{{article}}{packages}\begin{{document}}{table_latex(T1, records)}\end{{document}}'
    (tmp_path / 'table.tex').write_text(text)
    command = ['pdflatex', '-interaction=batchmode', '-halt-on-error', 'table.tex']
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_every_table_has_files_without_records(table, tmp_path):
    records = table_records(table, RecordStore(tmp_path), 'laptop')
    assert len(comparison_frame(table, records)) == sum(
        table.paper(row, column) is not None for row in table.rows for column in table.columns
    )
    assert table_html(table, records) and table_latex(table, records).isascii()
    assert render_records(table, records) == ''


def test_a_page_is_stale_when_a_record_changes_or_goes(store, tmp_path):
    shutil.copytree(store.root / 'scores', tmp_path / 'scores')
    copy = RecordStore(tmp_path)
    assert {file.name for file in stale_pages(copy)} == {file.name for file in write_tables(copy)}
    assert stale_pages(copy) == []
    one = copy.find(row='beit', seed=0)[0]
    copy.add(one | dict(scores=one['scores'] | {'linear/best/prefix': 35.0}))
    assert len(stale_pages(copy)) == 5
    write_tables(copy)
    (tmp_path / 'tables' / 'semanticmim-t9-laptop-scenes.md').write_text('of another time')
    assert [file.name for file in stale_pages(copy)] == ['semanticmim-t9-laptop-scenes.md']


def test_latex_shows_a_dataset_name_as_text(records):
    "A name of a dataset comes from a file: no command of LaTeX is left in it."
    text = table_latex(T1, records._replace(dataset=r'x\input{a_b}$&#~^%'))
    escaped = r'x\textbackslash{}input\{a\_b\}\$\&\#\textasciitilde{}\textasciicircum{}\%'
    assert escaped in text and r'\input' not in text

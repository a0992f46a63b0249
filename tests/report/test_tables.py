"Tables, sentences and pages: every number on a page is computed again here from the record files."

import json
import math
import re
from dataclasses import replace
from functools import cache
from shutil import copytree
from statistics import mean, stdev

import pytest
import torch
from invented_records import invented_record
from scipy.stats import norm, t

from mimstudy.core.errors import StudyError
from mimstudy.papers.experiments import experiment
from mimstudy.papers.tables import TABLES
from mimstudy.report.comparisons import has_paper_numbers, measured_columns
from mimstudy.report.claims import page_name
from mimstudy.report.pages import (
    CLAIMS_PAGE,
    MARKERS,
    compact_table,
    page,
    pages,
    readme_block,
    write_readme,
    write_tables,
)
from mimstudy.report.sentences import all_sentences, answer, NAMED_COMPARISONS, correction_sentence
from mimstudy.report.statistics import Estimate, table_records
from mimstudy.report.cells import same_sign
from mimstudy.report.tables import (
    MARKS,
    block_cells,
    overview,
    render,
    render_blocks,
    render_differences,
)
from mimstudy.study.records import RecordStore

T1 = TABLES['semanticmim-t1']
WITH_PAPER = [table for table in TABLES.values() if has_paper_numbers(table)]
NOT_FILLED = ('semanticmim-t1/maskfeat+semanticmim', 'conmim-t8/tau=0.2')


# -- invented records ---------------------------------------------------------------------------


def invented_scores(protocol, features, generator):
    "Scores of four blocks and the best one, drawn at random."

    def draw():
        return round(20 * torch.rand(1, generator=generator).item() + 5, 3)

    if features == 'pixels':
        return {f'{protocol}_0_pixels': draw()}
    scores = {f'{protocol}_{b}_{token}': draw() for b in range(1, 5) for token in ('prefix', 'patch')}
    for token in ('prefix', 'patch'):
        best, block = max((scores[f'{protocol}_{b}_{token}'], b) for b in range(1, 5))
        scores[f'{protocol}_best_{token}'] = best
        scores[f'{protocol}_best_{token}_block'] = block
    return scores


@pytest.fixture(scope='module')
def filled(tmp_path_factory):
    "A store of invented records: rows with three seeds, rows with one seed, and rows that were not run."
    store = RecordStore(tmp_path_factory.mktemp('filled'))
    generator = torch.Generator().manual_seed(0)
    for name in [f'{table.name}/{row.name}' for table in TABLES.values() for row in table.measured]:
        if name in NOT_FILLED:
            continue
        one = experiment(name, 'laptop')
        seeds = 1 if 'maskfeat' in name or 'tau=0.15' in name else 3
        for seed in range(seeds):
            for protocol in one.protocols:
                scores = invented_scores(protocol, one.features, generator)
                store.add(invented_record(name, seed, protocol=protocol, **scores))
    return store


@pytest.fixture
def changeable(filled, tmp_path):
    "A copy of that store, which a test may change."
    copytree(filled.root / 'scores', tmp_path / 'scores')
    return RecordStore(tmp_path)


def laptop(table, store):
    "The records of a table at laptop scale."
    return table_records(table, store, 'laptop')


# -- what a page must show, computed from the files ---------------------------------------------


@cache
def read_files(folder):
    "The records in the files of a folder."
    return [json.loads(file.read_text()) for file in folder.glob('*.json')]


def scores_by_seed(store, table, row, protocol, key):
    "Seed -> score and number of validation images, as the files have them."
    found = {}
    for one in read_files(store.root / 'scores'):
        if (one['table'], one['row'], one['protocol']) == (table.name, row.name, protocol):
            if key in one['scores']:
                found[one['seed']] = one['scores'][key], one['n_val']
    return found


def column_scores(store, table, row, column):
    "What the files have for a cell; None for raw pixels in a column of prefix tokens, and without a run."
    if row.features == 'paper':
        return None
    protocol, _, token = column.measure.split('/')
    key = column.measure
    if row.features == 'pixels':
        if token == 'prefix':
            return None
        key = f'{protocol}/0/pixels'
    return scores_by_seed(store, table, row, protocol, key)


def expected_score(scores):
    "The cell of a score."
    if scores is None:
        return '—'
    if not scores:
        return 'not run'
    values = [score for score, _ in scores.values()]
    if len(values) > 1:
        return f'{mean(values):.1f} ± {stdev(values):.1f} ({len(values)} seeds)'
    ((score, n),) = scores.values()
    return f'{score:.1f} ± {math.sqrt(score * (100 - score) / n):.1f} (s.e.)'


def variance(score, n):
    "Of a score in percent on n images."
    return score * (100 - score) / n


def half_width(sd, error, seeds, level):
    "Half an interval of a mean over seeds, whose validation images give it a standard error."
    between = t.ppf(1 - level / 2, seeds - 1) * sd / math.sqrt(seeds) if seeds > 1 else 0.0
    return math.hypot(between, norm.ppf(1 - level / 2) * error)


def expected_difference(ours, baseline):
    "Mean and half width of the difference, the number of seeds, its p-value; None without a seed of both."
    seeds = sorted(set(ours or ()) & set(baseline or ()))
    if not seeds:
        return None
    differences = [ours[seed][0] - baseline[seed][0] for seed in seeds]
    error = mean(math.sqrt(variance(*ours[seed]) + variance(*baseline[seed])) for seed in seeds)
    noise = stdev(differences) if len(seeds) > 1 else 0.0, error, len(seeds)
    low, high = 0.0, 1.0  # the p-value lies between them
    for _ in range(60):
        middle = (low + high) / 2
        inside = half_width(*noise, middle) > abs(mean(differences))
        low, high = (middle, high) if inside else (low, middle)
    return mean(differences), half_width(*noise, 0.05), len(seeds), high


def expected_interval(difference):
    "'+4.2 [+3.0, +5.4]'."
    if difference is None:
        return '—'
    middle, half, *_ = difference
    return f'{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]'


def difference_of(store, table, row, column):
    "The difference of a row from its baseline in a column."
    if not row.baseline:
        return None
    baseline = column_scores(store, table, table.row(row.baseline), column)
    return expected_difference(column_scores(store, table, row, column), baseline)


def paper_difference_of(table, row, column):
    "The same difference in the paper; None if it lacks a number."
    if not row.baseline:
        return None
    name = column.beside or column.name
    numbers = row.paper.get(name), table.row(row.baseline).paper.get(name)
    return None if None in numbers else numbers[0] - numbers[1]


def kept_after_correction(store, table):
    "The comparisons that Holm's procedure tells apart from 0: (row, row it is compared with, column)."
    p_values = {}
    for column in measured_columns(table, laptop(table, store)):
        for row in table.rows:
            for against in {row.baseline, row.control} - {''}:
                difference = difference_of(store, table, replace(row, baseline=against), column)
                if difference:
                    p_values[row.name, against, column.name] = difference[3]
    kept = set()
    for name, p in sorted(p_values.items(), key=lambda item: item[1]):
        if p > 0.05 / (len(p_values) - len(kept)):
            break
        kept.add(name)
    return kept


def expected_sign(theirs, difference, kept):
    "Whether paper and study agree; `kept` after the correction or not."
    if theirs is None or difference is None:
        return '—'
    middle, half, seeds, _ = difference
    if abs(middle) <= half:
        return 'within noise'
    sign = 'yes' if (middle > 0) == (theirs > 0) else 'no'
    if seeds < 3:
        return f'{sign}, a hint'
    return sign if kept else f'{sign}, uncorrected'


def split_cells(line):
    "The cells of a line of Markdown."
    return line.removeprefix('| ').removesuffix(' |').split(' | ')


def tables_in(text):
    "The tables of a page: for each its head and its lines, as lists of cells without bold."
    blocks = re.findall(r'(?:^\|.*\n?)+', text, flags=re.MULTILINE)
    tables = []
    for block in blocks:
        head, _, *lines = [[cell.strip('*') for cell in split_cells(x)] for x in block.splitlines()]
        tables.append((head, lines))
    return tables


# -- every number has its source ----------------------------------------------------------------


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_every_score_of_an_overview_has_its_source(filled, table):
    records = laptop(table, filled)
    columns = measured_columns(table, records)
    ((head, lines),) = tables_in(overview(table, records))
    assert len(head) == len(columns) + 3
    assert [line[0] for line in lines] == [row.label for row in table.rows]
    for row, line in zip(table.rows, lines, strict=True):
        for column, cell in zip(columns, line[1:-2], strict=True):
            scores = column_scores(filled, table, row, column)
            assert cell.split(', block')[0] == expected_score(scores)


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_every_difference_has_its_source_and_is_bold_if_it_is_certain(filled, table):
    records = laptop(table, filled)
    kept = kept_after_correction(filled, table)
    columns = measured_columns(table, records)
    head, _, *lines = map(split_cells, render_differences(table, records).splitlines())
    assert head == ['points', 'compared with', *(column.label for column in columns)]
    rows = [row for row in table.measured if row.baseline]
    for row, (label, baseline, *cells) in zip(rows, lines, strict=True):
        assert (label, baseline) == (row.label, table.row(row.baseline).label)
        for column, cell in zip(columns, cells, strict=True):
            difference = difference_of(filled, table, row, column)
            if difference is None:
                assert cell == '—'
                continue
            middle, half, *_ = difference
            mark = '*' if abs(middle) > half else ''
            if (row.name, row.baseline, column.name) in kept:
                mark = '**'
            assert cell == f'{mark}{middle:+.1f}{mark}'


def expected_line(store, table, row, column, kept):
    "The line of a row in the table of one column."
    number = row.paper.get(column.beside or column.name)
    theirs = paper_difference_of(table, row, column)
    difference = difference_of(store, table, row, column)
    return [
        row.label,
        '—' if number is None else f'{number:.{table.digits}f}',
        expected_score(column_scores(store, table, row, column)),
        table.row(row.baseline).label if row.baseline else '—',
        '—' if theirs is None else f'{theirs:+.{table.digits}f}',
        expected_interval(difference),
        expected_sign(theirs, difference, (row.name, row.baseline, column.name) in kept),
    ]


@pytest.mark.parametrize('table', WITH_PAPER, ids=lambda table: table.name)
def test_every_cell_of_a_table_has_its_source(filled, table):
    records = laptop(table, filled)
    columns = measured_columns(table, records)
    kept = kept_after_correction(filled, table)
    tables = tables_in(render(table, records))
    assert len(tables) == len(columns) + 1, 'one for each measured column, and one for the others'
    for column, (head, lines) in zip(columns, tables, strict=False):
        assert head[2:4] == ['here', 'compared with']
        assert head[4:] == ['difference, paper', 'difference, here', 'same sign?']
        expected = []
        for row in table.rows:
            expected.append(expected_line(filled, table, row, column, kept))
            if row.control:
                control = replace(row, baseline=row.control)
                interval = expected_interval(difference_of(filled, table, control, column))
                expected.append(['', '—', '—', table.row(row.control).label, '—', interval, '—'])
        assert lines == expected
    head, lines = tables[-1]
    missing = [column for column in table.columns if column not in columns and not column.beside]
    assert head == ['paper only', *(column.label for column in missing)]
    for row, (label, *cells) in zip(table.rows, lines, strict=True):
        assert label == row.label
        numbers = [row.paper.get(column.name) for column in missing]
        assert cells == ['—' if x is None else f'{x:.{table.digits}f}' for x in numbers]


def expected_block(scores):
    "The cell of a block: mean, and deviation if there are several seeds."
    if len(scores) > 1:
        return expected_score(scores).split(' (')[0]
    return f'{scores[0][0]:.1f}' if scores else 'not run'


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_every_score_of_a_block_has_its_source(filled, table):
    tables = tables_in(render_blocks(table, laptop(table, filled)))
    assert len(tables) == 2 * len(table.probes)
    rows = [row for row in table.measured if row.features != 'pixels']
    for head, lines in tables:
        protocol, token = head[0].split(', ')
        assert head[1:] == [f'block {block}' for block in range(1, 5)]
        for row, (label, *cells) in zip(rows, lines, strict=True):
            assert label == row.label
            keys = [f'{protocol}/{block}/{token}' for block in range(1, 5)]
            scores = [scores_by_seed(filled, table, row, protocol, key) for key in keys]
            assert cells == [expected_block(one) for one in scores]


def test_the_best_block_is_bold():
    assert block_cells([{1: 20.0, 2: 30.0}], [1, 2, 3]) == ['20.0', '**30.0**', '—']
    two_seeds = [{1: 20.0, 2: 30.0}, {1: 22.0, 2: 20.0}]
    assert block_cells(two_seeds, [1, 2]) == ['21.0 ± 1.4', '**25.0 ± 7.1**']
    assert block_cells([], [1, 2]) == ['not run', 'not run']


def test_the_table_of_the_readme_has_its_source(filled):
    records = laptop(T1, filled)
    ((head, lines),) = tables_in(compact_table(T1, records))
    columns = T1.columns[:2]
    assert head[1:3] == [column.label for column in columns]
    for row, (label, *cells) in zip(T1.rows, lines, strict=True):
        assert label == row.label
        for column, score, difference in zip(columns, cells[:2], cells[2:], strict=True):
            assert score == expected_score(column_scores(filled, T1, row, column)).split(' (')[0]
            theirs = paper_difference_of(T1, row, column)
            paper = '' if theirs is None else f', paper {theirs:+.1f}'
            assert difference == expected_interval(difference_of(filled, T1, row, column)) + paper


# -- sentences ----------------------------------------------------------------------------------


def shown_differences(table, records):
    "All cells of a rendered table, as one text."
    cells = [cell for _, lines in tables_in(render(table, records)) for line in lines for cell in line]
    return ' '.join(cells)


@pytest.mark.parametrize('table', WITH_PAPER, ids=lambda table: table.name)
def test_every_number_of_a_sentence_stands_in_the_table(filled, table):
    records = laptop(table, filled)
    cells = shown_differences(table, records)
    found = all_sentences(table, records)
    columns = measured_columns(table, records)
    compared = [difference_of(filled, table, row, column) for row in table.rows for column in columns]
    told = [sentence for sentence in found if not sentence.startswith('Not run')]
    assert len(told) == len(list(filter(None, compared))) > 1
    for sentence in found:
        if sentence.startswith('Not run'):
            continue
        points = re.search(r'([+-]\d+\.\d) points', sentence).group(1)
        assert f'{points} [' in cells
        paper = re.search(r'the paper has ([+-][\d.]+)\)', sentence)
        if paper:
            assert paper.group(1) in cells
        interval = re.search(r'95 % interval (\S+) to ([+-]\d+\.\d)', sentence)
        if interval:
            assert f'{points} [{interval.group(1)}, {interval.group(2)}]' in cells
        assert ('seeds' in sentence) == bool(interval) or 'one seed' in sentence


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_an_answer_sorts_rows_by_their_difference(filled, table):
    records = laptop(table, filled)
    columns = {column.label: column for column in measured_columns(table, records)}
    rows = {row.label: row for row in table.rows}
    sorted_rows = set()
    for sentence in answer(table, records):
        controls = 'over the control' in sentence
        title, _, text = sentence.removeprefix('**').partition('.** ')
        text = text.replace('; paper', ' paper').partition('in points: ')[2].removesuffix('.')
        for group in text.split('; '):
            name, _, listed = group.partition(': ')
            for label, interval in re.findall(r'(?:^|, | and )(.+?) \((\S+ \[\S+ \S+\])', listed):
                row = rows[label]
                row = replace(row, baseline=row.control) if controls else row
                difference = difference_of(filled, table, row, columns[title])
                assert interval == expected_interval(difference)
                middle, half, *_ = difference
                sign = 'above' if middle > 0 else 'below'
                assert name == ('within noise' if abs(middle) <= half else sign)
                sorted_rows.add((label, title, row.baseline))
    compared = [row for row in table.rows if row.baseline and (row.adds or row.features == 'trained')]
    compared += [replace(row, baseline=row.control) for row in table.rows if row.control]
    linear = [column for column in columns.values() if column.protocol == 'linear']
    expected = {
        (row.label, c.label, row.baseline)
        for row in compared
        for c in linear
        if difference_of(filled, table, row, c)
    }
    assert sorted_rows == expected


GAINS = {
    (4.0, 4.2, 3.9): ('The proxies helped.', 'above: BEiT + SemanticMIM (+4.0 ['),
    (-4.0, -4.2, -3.9): ('The proxies did harm.', 'below: BEiT + SemanticMIM (-4.0 ['),
    (4.0, -4.0, 0.1): ('The difference is within noise.', 'within noise: BEiT + SemanticMIM (+0.0 ['),
    (4.0, 4.1): ('Fewer than three seeds: a hint.', 'BEiT + SemanticMIM (+4.0 ['),
    (4.0,): ('Fewer than three seeds: a hint.', 'above: BEiT + SemanticMIM (+4.0 ['),
}


def store_with_gains(folder, gains, scale='laptop'):
    "BEiT without and with proxies, one seed for each gain in points."
    store = RecordStore(folder)
    for seed, gain in enumerate(gains):
        for row, score in (('beit', 10.0 + seed), ('beit+semanticmim', 10.0 + seed + gain)):
            store.add(invented_record(f'semanticmim-t1/{row}', seed, scale, linear_best_prefix=score))
    return store


@pytest.mark.parametrize('gains', GAINS)
def test_a_verdict_needs_three_seeds_and_little_noise(tmp_path, gains):
    verdict, group = GAINS[gains]
    records = laptop(T1, store_with_gains(tmp_path, gains))
    sentence = all_sentences(T1, records)[0]
    assert sentence.endswith(verdict)
    assert f'{mean(gains):+.1f} points' in sentence
    assert 'the paper has +17.7' in sentence
    if len(gains) > 1:
        assert f'{len(gains)} paired seeds, sd {stdev(gains):.1f}' in sentence
    assert group in answer(T1, records)[0]


@pytest.mark.parametrize(
    'gains, hint',
    [
        ((4.0, 4.2, 3.9), None),
        ((4.0, 4.1), 'These are hints: there are two seeds.'),
        ((4.0,), 'These are hints: there is one seed, and the intervals hold the choice of images only.'),
    ],
)
def test_an_answer_from_fewer_than_three_seeds_is_a_hint(tmp_path, gains, hint):
    found = answer(T1, laptop(T1, store_with_gains(tmp_path, gains)))
    assert found[1:] == ([hint] if hint else [])


def test_signs_agree_only_outside_of_the_noise():
    certain = Estimate(mean=4.0, sd=0.5, error=0.5, n=3)
    assert same_sign(17.7, certain) == 'yes'
    assert same_sign(-17.7, certain) == 'no'
    assert same_sign(17.7, certain, level=1e-6) == 'yes, uncorrected'
    assert same_sign(17.7, certain._replace(n=1)) == 'yes, a hint'
    assert same_sign(17.7, certain._replace(sd=5.0)) == 'within noise'
    assert same_sign(None, certain) == same_sign(17.7, None) == '—'


def test_smoke_scale_answers_nothing(tmp_path):
    store = store_with_gains(tmp_path, (40.0, 40.0, 40.0), 'smoke')
    (sentence,) = answer(T1, table_records(T1, store, 'smoke'))
    assert 'its numbers say nothing about the papers' in sentence
    assert readme_block(store) == 'Nothing above smoke scale has been run yet.'


# -- what is not shown --------------------------------------------------------------------------


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_a_table_without_records_says_not_run(tmp_path, table):
    store = RecordStore(tmp_path)
    records = laptop(table, store)
    text = render(table, records)
    tables = tables_in(text)
    assert 'not run' in text.splitlines()[2]
    assert not render_blocks(table, records)
    assert all_sentences(table, records) == [f'Not run: {", ".join(row.label for row in table.measured)}.']
    assert answer(table, records) == []
    if has_paper_numbers(table):
        for _, lines in tables[: len(measured_columns(table, records))]:
            assert {line[2] for line in lines} <= {'not run', '—'}
            assert {line[5] for line in lines} == {'—'}
    else:
        ((_, lines),) = tables
        assert {cell for line in lines for cell in line[1:]} == {'not run', '—'}


def test_a_store_without_records_has_no_pages(tmp_path):
    store = RecordStore(tmp_path)
    assert pages(store) == []
    assert write_tables(store) == []
    assert readme_block(store) == 'Nothing above smoke scale has been run yet.'


def test_a_number_goes_with_its_record(changeable):
    before = render(T1, laptop(T1, changeable))
    assert '| BEiT | 31.5 | not run' not in before
    for record in changeable.find(row='beit'):
        (changeable.root / 'scores' / f'{record["id"]}.json').unlink()
    assert '| BEiT | 31.5 | not run' in render(T1, laptop(T1, changeable))


def test_other_scales_and_configurations_are_not_mixed_in(changeable):
    before = render(T1, laptop(T1, changeable))
    scores = dict(linear_best_prefix=99.0, linear_best_patch=99.0)
    for scale in ('smoke', 'gpu'):
        changeable.add(invented_record('semanticmim-t1/beit', 0, scale, **scores))
    assert render(T1, laptop(T1, changeable)) == before
    stale = invented_record('semanticmim-t1/beit', 7, **scores)
    changeable.add(stale | dict(id='stale', experiment='semanticmim-t1-beit-laptop-earlier'))
    after = render(T1, laptop(T1, changeable))
    assert '1 records of other configurations left out' in after
    assert '99.0' not in after


def test_differing_settings_are_named(changeable):
    assert 'differing' not in render(T1, laptop(T1, changeable))
    one = changeable.find(table=T1.name, row='beit')[0]
    changeable.add(one | dict(evaluation=dict(epochs=1)))
    assert '**evaluated with differing settings**' in render(T1, laptop(T1, changeable))


def test_paper_scale_shows_the_block_of_the_paper(tmp_path):
    store = RecordStore(tmp_path)
    prefix = dict(linear_7_prefix=31.0, linear_best_prefix=60.0)
    patch = dict(linear_7_patch=38.0, linear_best_patch=61.0)
    store.add(invented_record('semanticmim-t1/beit', 0, 'paper', n_val=50_000, **prefix, **patch))
    text = render(T1, table_records(T1, store, 'paper'))
    assert '| 31.0 ±' in text
    assert '| 38.0 ±' in text
    assert '60.0' not in text
    assert '61.0' not in text
    assert 'best block' not in text


# -- pages and README ---------------------------------------------------------------------------


def test_a_page_counts_its_comparisons_and_names_those_that_are_left(filled):
    for table in TABLES.values():
        records = laptop(table, filled)
        text = correction_sentence(table, records)
        kept = kept_after_correction(filled, table)
        assert f'{len(kept) or "none"} can be told apart' in text
        assert text.count(' over ') == (len(kept) if len(kept) <= NAMED_COMPARISONS else 0)
        assert ('they are bold' in text) == (len(kept) > NAMED_COMPARISONS)
        assert f'- {text}' in page(table, records)


def test_every_table_with_records_has_a_page(filled, tmp_path):
    written = [file for file in write_tables(filled, tmp_path) if file.suffix == '.md']
    assert [file.name for file in written] == [*(page_name(*names) for names in pages(filled)), CLAIMS_PAGE]
    assert [name for name, _, _ in pages(filled)] == list(TABLES)
    for (name, scale, dataset), file in zip(pages(filled), written, strict=False):
        records = table_records(TABLES[name], filled, scale, dataset)
        assert file.read_text('utf-8') == page(TABLES[name], records)


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_a_page_has_the_answer_the_table_and_every_block(filled, table):
    records = laptop(table, filled)
    text = page(table, records)
    sentences = answer(table, records)
    if has_paper_numbers(table):
        sentences += all_sentences(table, records)
        assert overview(table, records) in text
    else:
        assert render_differences(table, records) in text
        assert MARKS in text
    assert all(f'- {sentence}\n' in text for sentence in sentences)
    assert render(table, records) in text
    assert render_blocks(table, records) in text


def test_the_largest_scale_comes_first(tmp_path):
    store = RecordStore(tmp_path)
    for scale in ('laptop', 'paper', 'smoke'):
        store.add(invented_record('semanticmim-t1/beit', 0, scale, linear_best_prefix=9.0))
    assert [scale for _, scale, _ in pages(store)] == ['paper', 'laptop', 'smoke']


def test_the_readme_is_changed_between_its_markers_only(filled, tmp_path):
    start, end = MARKERS
    readme = tmp_path / 'README.md'
    readme.write_text(f'# A\n\n{start}\nold\n{end}\n\nb\n')
    expected = f'# A\n\n{start}\n{readme_block(filled)}\n{end}\n\nb\n'
    for _ in range(2):
        assert write_readme(filled, readme).read_text('utf-8') == expected


@pytest.mark.parametrize('text', ['# A\n', f'{MARKERS[0]}\n', f'{MARKERS[1]}\n{MARKERS[0]}\n'])
def test_a_readme_without_markers_is_an_error(filled, tmp_path, text):
    readme = tmp_path / 'README.md'
    readme.write_text(text)
    with pytest.raises(StudyError, match='README.md needs the lines'):
        write_readme(filled, readme)
    assert readme.read_text() == text


def test_the_readme_links_every_page(filled):
    text = readme_block(filled)
    for names in pages(filled):
        assert f'(results/tables/{page_name(*names)})' in text

"Tables, differences and conclusions: every number on a page is computed again here from the records."

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from invented_records import invented_record

from mimstudy.core.errors import StudyError
from mimstudy.papers.experiments import experiment
from mimstudy.papers.tables import TABLES
from mimstudy.report.pages import MARKERS, page, pages, readme_block, write_readme, write_tables
from mimstudy.report.statistics import table_records
from mimstudy.report.tables import conclusions, differences, measured, overview, render, render_blocks
from mimstudy.study.records import RecordStore

ROOT = Path(__file__).resolve().parents[2]
EVERY_ROW = [f'{t.name}/{r.name}' for t in TABLES.values() for r in t.rows]


@pytest.fixture
def filled(tmp_path):
    "A store of made-up records: three seeds, one seed, and rows that were not run."
    results, g = RecordStore(tmp_path), torch.Generator().manual_seed(0)

    def top():
        return round(20 * torch.rand(1, generator=g).item() + 5, 3)

    for name in EVERY_ROW:
        e = experiment(name, 'laptop')
        if name in ('semanticmim-t1/maskfeat+semanticmim', 'conmim-t8/tau=0.2'):
            continue
        for seed in range(1 if 'maskfeat' in name or 'tau=0.15' in name else 3):
            for protocol in e.protocols:
                scores = {
                    f'{protocol}_{b}_{token}': top() for b in range(1, 5) for token in ('prefix', 'patch')
                }
                for token in ('prefix', 'patch'):
                    scores[f'{protocol}_best_{token}'], scores[f'{protocol}_best_{token}_block'] = max(
                        (scores[f'{protocol}_{b}_{token}'], b) for b in range(1, 5)
                    )
                if e.features == 'pixels':
                    scores = {f'{protocol}_0_pixels': top()}
                results.add(invented_record(name, seed, protocol=protocol, **scores))
    return results


def tables_in(text):
    "The markdown tables of a page, as lists of rows of cells."
    found, open_ = [], False
    for line in text.splitlines():
        if line.startswith('| '):
            if not open_:
                found.append([])
            found[-1].append([cell.strip(' *') for cell in line.strip().strip('|').split(' | ')])
        open_ = line.startswith('| ')
    return [[rows[0], *rows[2:]] for rows in found]


def by_seed(folder, table, row, protocol, key):
    "Straight from the files: seed -> score and the number of validation images."
    found = [json.loads(f.read_text()) for f in (folder / 'scores').glob('*.json')]
    return {
        r['seed']: (r['scores'][key], r['n_val'])
        for r in found
        if (r['table'], r['row'], r['protocol']) == (table, row, protocol) and key in r['scores']
    }


def expected_cell(scores):
    if not scores:
        return 'not run'
    values = [s for s, _ in scores.values()]
    if len(values) > 1:
        return f'{mean(values):.1f} ± {stdev(values):.1f} ({len(values)} seeds)'
    ((p, n),) = scores.values()
    return f'{p:.1f} ± {math.sqrt(p * (100 - p) / n):.1f} (s.e.)'


def expected_difference(ours, base):
    seeds = sorted(set(ours) & set(base))
    d = [ours[s][0] - base[s][0] for s in seeds]
    if not d:
        return '—', None
    half = 1.96 * mean(math.sqrt(sum(p * (100 - p) / n for p, n in (ours[s], base[s]))) for s in seeds)
    if len(d) > 1:
        half = math.hypot(half, {2: 12.7062, 3: 4.3027}[len(d)] * stdev(d) / math.sqrt(len(d)))
    return f'{mean(d):+.1f} [{mean(d) - half:+.1f}, {mean(d) + half:+.1f}]', mean(d) if abs(
        mean(d)
    ) > half else 0


COMPARED = [t for t in TABLES.values() if any(row.paper for row in t.rows)]


def test_every_number_of_an_overview_has_its_source(filled):
    for table in TABLES.values():
        shown = table_records(table, filled, 'laptop')
        (head, *lines), columns = *tables_in(overview(table, shown)), measured(table, shown)
        assert len(head) == len(columns) + 3 and [line[0] for line in lines] == [r.label for r in table.rows]
        for row, line in zip(table.rows, lines, strict=True):
            for column, cell in zip(columns, line[1:], strict=False):
                protocol = column.measure.split('/')[0]
                key = (
                    column.measure
                    if row.features != 'pixels'
                    else ''
                    if 'prefix' in column.measure
                    else f'{protocol}/0/pixels'
                )
                found = by_seed(filled.root, table.name, row.name, protocol, key) if key else {}
                assert cell.split(', block')[0] == (expected_cell(found) if key else '—')


def test_every_difference_has_its_source(filled):
    bold = set()
    for table in TABLES.values():
        head, _, *lines = (
            [c.strip() for c in line.strip('| ').split(' | ')]
            for line in differences(table, table_records(table, filled, 'laptop')).splitlines()
        )
        columns = measured(table, table_records(table, filled, 'laptop'))
        rows = [r for r in table.rows if r.baseline]
        assert len(head) == len(columns) + 2 and [line[0] for line in lines] == [r.label for r in rows]
        for row, (_, against, *cells) in zip(rows, lines, strict=True):
            base = table.row(row.baseline)
            assert against == base.label
            for column, cell in zip(columns, cells, strict=True):

                def read(r):
                    protocol = column.measure.split('/')[0]
                    if r.features == 'pixels' and 'prefix' in column.measure:
                        return {}
                    return by_seed(
                        filled.root,
                        table.name,
                        r.name,
                        protocol,
                        f'{protocol}/0/pixels' if r.features == 'pixels' else column.measure,
                    )

                text, sure = expected_difference(read(row), read(base))
                number = text.split(' [')[0]
                assert cell == (f'**{number}**' if sure else number)
                bold.add(bool(sure))
    assert bold == {True, False}


def test_every_number_of_a_page_has_its_source(filled):
    for table in COMPARED:
        text, walked = render(table, filled, 'laptop'), 0
        found = tables_in(text)
        columns = measured(table, table_records(table, filled, 'laptop'))
        for column, (head, *lines) in zip(columns, found, strict=False):
            assert head[2:] == [
                'here',
                'against',
                'difference, paper',
                'difference, here',
                'same sign?',
            ] and len(lines) == len(table.rows)
            for row, cells in zip(table.rows, lines, strict=True):

                def read(row):
                    key = (
                        column.measure
                        if row.features != 'pixels'
                        else ''
                        if 'prefix' in column.measure
                        else column.measure.split('/')[0] + '/0/pixels'
                    )
                    return by_seed(filled.root, table.name, row.name, column.measure.split('/')[0], key)

                label, paper, here, against, theirs, ours, same = cells
                number = row.paper.get(column.beside or column.name)
                base = table.row(row.baseline) if row.baseline else None
                assert label == row.label and against == (base.label if base else '—')
                assert paper == ('—' if number is None else f'{number:.{table.digits}f}')
                assert here == (
                    '—'
                    if row.features == 'pixels' and 'prefix' in column.measure
                    else expected_cell(read(row))
                )
                difference, sure = expected_difference(read(row), read(base)) if base else ('—', None)
                assert ours == difference
                published = (
                    row.paper.get(column.beside or column.name),
                    base and base.paper.get(column.beside or column.name),
                )
                assert theirs == (
                    '—' if None in published else f'{published[0] - published[1]:+.{table.digits}f}'
                )
                if theirs == '—' or ours == '—':
                    assert same == '—'
                elif sure == 0:
                    assert same == 'within noise'
                else:
                    assert same == ('yes' if (sure > 0) == (published[0] > published[1]) else 'no') + (
                        '' if len(set(read(row)) & set(read(base))) > 2 else ', a hint'
                    )
                walked += sum(bool(re.search(r'\d', c)) for c in (paper, here, theirs, ours))
        for head, *lines in found[len(columns) :]:
            unmeasured = [c for c in table.columns if c not in columns and not c.beside]
            assert head[1:] == [c.label for c in unmeasured]
            for row, cells in zip(table.rows, lines, strict=True):
                assert cells[1:] == [
                    f'{row.paper[c.name]:.{table.digits}f}' if c.name in row.paper else '—'
                    for c in unmeasured
                ]
                walked += sum(bool(re.search(r'\d', c)) for c in cells[1:])
        shown = [
            c
            for head, *lines in found
            for line in lines
            for c in line[1:]
            if re.search(r'\d', c) and c not in {r.label for r in table.rows}
        ]
        assert walked == len(shown) > 15, 'no cell with a number was passed over'


def test_every_number_of_the_block_tables_has_its_source(filled):
    for table in TABLES.values():
        for head, *lines in tables_in(render_blocks(table, filled, 'laptop')):
            protocol, token = head[0].split(', ')
            for label, *cells in lines:
                row = next(r for r in table.rows if r.label == label)
                for name, cell in zip(head[1:], cells, strict=True):
                    values = [
                        s
                        for s, _ in by_seed(
                            filled.root,
                            table.name,
                            row.name,
                            protocol,
                            f'{protocol}/{name.removeprefix("block ")}/{token}',
                        ).values()
                    ]
                    assert cell == (
                        f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')
                        if values
                        else 'not run'
                    )


def test_every_number_of_the_sentences_stands_in_a_table(filled):
    for table in COMPARED:
        differences = ' '.join(
            c for head, *lines in tables_in(render(table, filled, 'laptop')) for line in lines for c in line
        )
        for said in conclusions(table, filled, 'laptop'):
            if said.startswith('Not run'):
                continue
            number = re.search(r'([+-]\d+\.\d) points', said).group(1)
            assert f'{number} [' in differences
            if paper := re.search(r'the paper has ([+-][\d.]+)\)', said):
                assert paper.group(1) in differences
            if 'interval' in said:
                assert (
                    '[{}, {}]'.format(*re.search(r'interval (\S+?) to ([+-]\d+\.\d)', said).groups())
                    in differences
                )


def test_a_table_without_records_says_not_run(tmp_path):
    for table in TABLES.values():
        text = render(table, RecordStore(tmp_path), 'laptop')
        for column, (head, *lines) in zip(
            measured(table, table_records(table, RecordStore(tmp_path), 'laptop')),
            tables_in(text),
            strict=False,
        ):
            if table in COMPARED:
                assert {line[2] for line in lines} <= {'not run', '—'} and {line[5] for line in lines} == {
                    '—'
                }
            else:
                assert {cell for line in lines for cell in line[1:]} == {'not run', '—'}
        assert 'not run' in text.splitlines()[2] and not render_blocks(table, RecordStore(tmp_path), 'laptop')
        assert conclusions(table, RecordStore(tmp_path), 'laptop') == [
            f'Not run: {", ".join(r.label for r in table.rows)}.'
        ]
    assert pages(RecordStore(tmp_path)) == [] and 'Nothing above smoke' in readme_block(RecordStore(tmp_path))


def test_a_number_goes_when_its_record_goes(filled):
    table = TABLES['semanticmim-t1']
    before = render(table, filled, 'laptop')
    for r in filled.find(row='beit'):
        (filled.root / 'scores' / f'{r["id"]}.json').unlink()
    after = render(table, filled, 'laptop')
    assert before != after and [
        line for line in after.splitlines() if line.startswith('| BEiT | 31.5 | not run')
    ]


def test_scales_data_and_earlier_values_are_not_mixed(filled):
    table = TABLES['semanticmim-t1']
    before = render(table, filled, 'laptop')
    for scale in ('smoke', 'gpu'):
        filled.add(
            invented_record('semanticmim-t1/beit', 0, scale, linear_best_prefix=99.0, linear_best_patch=99.0)
        )
    assert render(table, filled, 'laptop') == before
    stale = invented_record('semanticmim-t1/beit', 7, linear_best_prefix=99.0, linear_best_patch=99.0)
    filled.add(stale | dict(id='stale', experiment='semanticmim-t1-beit-laptop-earlier'))
    after = render(table, filled, 'laptop')
    assert (
        '1 records of other values left out' in after
        and '99.0' not in after
        and table_records(table, filled, 'laptop').stale == 1
    )


def test_differing_settings_are_said(filled):
    assert 'differing' not in render(TABLES['semanticmim-t1'], filled, 'laptop')
    filled.add(filled.find(table='semanticmim-t1', row='beit')[0] | dict(evaluation=dict(epochs=1)))
    assert '**evaluated with differing settings**' in render(TABLES['semanticmim-t1'], filled, 'laptop')


@pytest.mark.parametrize(
    'gains,verdict',
    [
        ((4.0, 4.2, 3.9), 'The proxies helped.'),
        ((-4.0, -4.2, -3.9), 'The proxies did harm.'),
        ((4.0, -4.0, 0.1), 'Noise alone'),
        ((4.0, 4.1), 'a hint, no more'),
        ((4.0,), 'a hint, no more'),
    ],
)
def test_verdicts_need_three_seeds_and_little_noise(tmp_path, gains, verdict):
    results = RecordStore(tmp_path)
    for seed, gain in enumerate(gains):
        results.add(invented_record('semanticmim-t1/beit', seed, linear_best_prefix=10.0 + seed))
        results.add(
            invented_record('semanticmim-t1/beit+semanticmim', seed, linear_best_prefix=10.0 + seed + gain)
        )
    said = conclusions(TABLES['semanticmim-t1'], results, 'laptop')[0]
    assert verdict in said and f'{mean(gains):+.1f} points' in said and 'the paper has +17.7' in said
    if len(gains) > 2:
        assert f'sd {stdev(gains):.1f}' in said


def test_smoke_scale_concludes_nothing(tmp_path):
    for row in ('beit', 'beit+semanticmim'):
        for seed in range(3):
            RecordStore(tmp_path).add(
                invented_record(
                    f'semanticmim-t1/{row}', seed, 'smoke', linear_best_prefix=50.0 - 40 * (row == 'beit')
                )
            )
    (said,) = conclusions(TABLES['semanticmim-t1'], RecordStore(tmp_path), 'smoke')
    assert (
        'say nothing' in said
        and readme_block(RecordStore(tmp_path)) == 'Nothing above smoke scale has been run yet.'
    )


def test_paper_scale_reads_the_papers_block(tmp_path):
    RecordStore(tmp_path).add(
        invented_record(
            'semanticmim-t1/beit',
            0,
            'paper',
            n_val=50_000,
            linear_7_prefix=31.0,
            linear_best_prefix=60.0,
            linear_7_patch=38.0,
            linear_best_patch=61.0,
        )
    )
    text = render(TABLES['semanticmim-t1'], RecordStore(tmp_path), 'paper')
    assert '| 31.0 ±' in text and '60.0' not in text and 'best block' not in text


def test_pages_and_readme(filled, tmp_path):
    assert [f.name for f in write_tables(filled)] == [f'{t}-{s}-{d}.md' for t, s, d in pages(filled)]
    for (t, s, d), file in zip(pages(filled), write_tables(filled), strict=True):
        assert file.read_text('utf-8') == page(TABLES[t], filled, s, d)
    readme = tmp_path / 'README.md'
    readme.write_text(f'# A\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nb\n')
    once = write_readme(filled, readme).read_text('utf-8')
    assert (
        once
        == f'# A\n\n{MARKERS[0]}\n{readme_block(filled)}\n{MARKERS[1]}\n\nb\n'
        == write_readme(filled, readme).read_text('utf-8')
    )
    readme.write_text('# A\n')
    with pytest.raises(StudyError, match='README.md needs the lines'):
        write_readme(filled, readme)

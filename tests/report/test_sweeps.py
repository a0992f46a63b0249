"Curves of sweeps: the paper's numbers and the scores of the records, at their places."

import pytest
from invented_records import invented_record

from mimstudy.papers.tables import TABLES
from mimstudy.report.figures import table_figure
from mimstudy.report.statistics import table_records
from mimstudy.report.sweeps import measured_curves, paper_curves, sweep_figure
from mimstudy.study.records import RecordStore

SWEEPS = [table for table in TABLES.values() if table.axis]
LINEAR = {table.name: next(c for c in table.columns if c.measure == 'linear/best/patch') for table in SWEEPS}


def records_of(table, folder, seeds=3):
    "Scores that rise from row to row by one point, and from seed to seed by two."
    store = RecordStore(folder)
    for i, row in enumerate(table.measured):
        for seed in range(seeds):
            one = invented_record(f'{table.name}/{row.name}', seed, linear_best_patch=30.0 + i + 2 * seed)
            store.add(one)
    return table_records(table, store, 'laptop')


def test_the_curves_of_the_paper():
    table = TABLES['conmim-t7']
    assert paper_curves(table, table.columns[0]) == {
        'random masks': [(60, 82.52), (75, 83.51), (90, 83.04)],
        'block masks': [(40, 82.12), (60, 83.20), (75, 83.11), (90, 82.63)],
    }
    assert paper_curves(TABLES['semanticmim-fig5'], TABLES['semanticmim-fig5'].columns[0]) == {}


@pytest.mark.parametrize('table', SWEEPS, ids=lambda table: table.name)
def test_lines_and_bands_are_scores_and_their_intervals(table, tmp_path):
    records = records_of(table, tmp_path)
    figure = sweep_figure(table, records)
    panel = figure.axes[-1]
    curves = measured_curves(table, LINEAR[table.name], records)
    points = sum(len(points) for points in curves.values())
    assert points == sum(row.x is not None for row in table.rows)
    for line, band, (name, points) in zip(panel.lines, panel.collections, curves.items(), strict=False):
        assert line.get_xydata().tolist() == [[x, score.mean] for x, score in points]
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(min(score.low for _, score in points))
        assert heights.max() == pytest.approx(max(score.high for _, score in points))
        assert not name or line.get_label() == name
    assert panel.get_xlabel() == table.axis
    with_paper = bool(paper_curves(table, table.columns[0]))
    assert with_paper == figure.axes[0].get_title().startswith('paper')
    assert with_paper == table.name.startswith('conmim')


def test_a_sweep_without_records_has_no_figure(tmp_path):
    table = TABLES['conmim-t8']
    records = table_records(table, RecordStore(tmp_path), 'laptop')
    assert sweep_figure(table, records) is None and table_figure(table, records) is None

"""The declared numbers of the papers against a second transcription: the lines of their tables, as printed.

References, arrows and marks are left out; a line is a label and its numbers, in the order of the rows.
"""

import pytest

from mimstudy.papers.experiments import experiment
from mimstudy.papers.tables import TABLES

CONMIM_T1 = """
DeiT-S 224 - 79.8
DeiT-B 224 - 81.8
DeiT-B 384 - 83.1
MoCo v3 224 300 81.4
DINO 224 800 81.5
MAE 224 800 80.9
CIM 224 300 81.6
BEiT 224 300 81.3
ConMIM 224 300 82.0
ConMIM 384 300 83.9
MoCo v3 224 300 83.2
DINO 224 800 82.8
MAE 224 1600 83.6
CIM 224 300 83.3
BEiT 224 300 82.9
BEiT 224 800 83.2
BEiT 384 800 84.6
ConMIM 224 300 83.5
ConMIM 224 800 83.7
ConMIM 384 800 85.3
"""
SMALL_ROWS = range(3, 10)  # of Table 1: ViT-S/16

CONMIM_T2 = """
BEiT 46.3
ConMIM 47.7
Supervised 45.3
MoCo v3 47.2
DINO 46.8
BEiT 47.7
ConMIM 49.8
"""

CONMIM_T3 = """
DeiT 43.1 38.8
MAE 41.5 37.8
ConMIM 45.8 41.0
DeiT 46.5 41.7
DINO 47.6 42.3
MoCo v3 47.3 42.2
MAE 47.8 42.9
ConMIM 48.7 43.6
"""

PRINTED = {  # the column of Tables 4 to 9, in the order of the rows; None where no number is printed
    'conmim-t4': (81.8, 83.2, 83.51, 82.26, None),
    'conmim-t5': (81.8, 83.51, 82.60, 83.12),
    'conmim-t6': (81.8, 83.51, 83.41, 83.35, 82.62, 81.53),
    'conmim-t8': (82.55, 83.03, 83.51, 83.32, 83.35),
    'conmim-t9': (83.11, 83.51, 83.31),
}
CHANGES = {  # in brackets in Tables 4 to 6: the difference from ConMIM
    'conmim-t4': {'instance': -1.25},
    'conmim-t5': {'device': -0.91, 'filtered': -0.39},
    'conmim-t6': {'strong-both': -0.10, 'weak-both': -0.16, 'switched': -0.89, 'no-teacher': -1.98},
}
CONMIM_T7 = {
    ('block', 40): 82.12,
    ('block', 60): 83.20,
    ('block', 75): 83.11,
    ('block', 90): 82.63,
    ('random', 60): 82.52,
    ('random', 75): 83.51,
    ('random', 90): 83.04,
}
SEMANTICMIM_T1 = """
BEiT 31.5 38.7 81.9 82.2 23.8 40.2
BEiT + Ours 49.2 48.2 83.0 82.9 43.1 44.1
MaskFeat 23.4 33.5 82.7 83.0 37.8 42.6
MaskFeat + Ours 52.0 59.7 83.7 83.6 49.5 45.7
"""


def lines(text):
    "(label, numbers) of each line."
    found = []
    for line in text.strip().splitlines():
        words = line.split()
        first = next(i for i, word in enumerate(words) if word == '-' or word[0].isdigit())
        numbers = [None if word == '-' else float(word) for word in words[first:]]
        found.append((' '.join(words[:first]), numbers))
    return found


def method_of(row):
    "The method that a row's label begins with, as the paper spells it."
    return row.label.split(',')[0].replace('supervised', 'Supervised')


def test_conmim_table_1_with_schedules_and_sizes():
    rows = TABLES['conmim-t1'].rows
    for i, (row, (label, (size, epochs, top1))) in enumerate(zip(rows, lines(CONMIM_T1), strict=True)):
        assert (method_of(row), row.paper) == (label, dict(ft=top1))
        assert ('384 px' in row.label) == (size == 384)
        assert epochs is None or f'{epochs:.0f} epochs' in row.label
        if row.features == 'paper':
            assert epochs is None or size == 384
            continue
        config = experiment(f'conmim-t1/{row.name}', 'paper').config
        assert config.optim.epochs == epochs and config.data.size == size
        assert (config.encoder.width, config.encoder.heads) == ((384, 6) if i in SMALL_ROWS else (768, 12))


@pytest.mark.parametrize('name, text', [('conmim-t2', CONMIM_T2), ('conmim-t3', CONMIM_T3)])
def test_conmim_tables_2_and_3(name, text):
    columns = [column.name for column in TABLES[name].columns if not column.beside]
    for row, (label, numbers) in zip(TABLES[name].rows, lines(text), strict=True):
        assert (method_of(row), row.paper) == (label, dict(zip(columns, numbers, strict=True)))


@pytest.mark.parametrize('name', PRINTED)
def test_conmim_tables_4_to_9(name):
    table = TABLES[name]
    assert tuple(row.paper.get('ft') for row in table.rows) == PRINTED[name]
    for row, change in CHANGES.get(name, {}).items():
        row = table.row(row)
        assert round(row.paper['ft'] - table.row(row.baseline).paper['ft'], 2) == change


def test_conmim_table_7():
    rows = TABLES['conmim-t7'].rows
    assert {(row.change['mask']['kind'], row.x): row.paper['ft'] for row in rows} == CONMIM_T7


def test_semanticmim_table_1():
    table = TABLES['semanticmim-t1']
    printed = [row for row in table.rows if row.paper]
    columns = [column.name for column in table.columns if not column.beside]
    for row, (label, numbers) in zip(printed, lines(SEMANTICMIM_T1), strict=True):
        assert row.label.replace('SemanticMIM', 'Ours') == label
        assert [row.paper[column] for column in columns] == numbers


@pytest.mark.parametrize('name', ['semanticmim-fig5', 'semanticmim-fig6'])
def test_figures_have_no_numbers_but_those_of_table_1(name):
    table = TABLES[name]
    known = [TABLES['semanticmim-t1'].row(row).paper for row in ('beit', 'beit+semanticmim')]
    known = [dict(ft_cls=paper['ft_cls'], ft_patch=paper['ft_patch']) for paper in known]
    shown = [row for row in table.rows if row.paper]
    assert all(row.paper in known for row in shown)
    assert {row.name for row in shown} <= {'beit', 'proxies=8', 'ratio=0.6'}
    assert 'no printed numbers' in table.note

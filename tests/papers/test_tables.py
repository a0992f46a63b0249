"Tables: the papers' numbers, and names that hold together."

import re

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.papers.downstream import DOWNSTREAM
from mimstudy.papers.pretraining import PRETRAININGS
from mimstudy.papers.table_classes import FEATURES, PROBES
from mimstudy.papers.tables import SEMANTICMIM_T1, TABLES

PRINTED_DIFFERENCES = {  # in SemanticMIM Table 1, in brackets
    'beit+semanticmim': (
        'beit',
        dict(linear_cls=17.7, linear_patch=9.5, ft_cls=1.1, ft_patch=0.7, voc=19.3, ade20k=3.9),
    ),
    'maskfeat+semanticmim': (
        'maskfeat',
        dict(linear_cls=28.6, linear_patch=26.2, ft_cls=1.0, ft_patch=0.6, voc=11.7, ade20k=3.1),
    ),
}


@pytest.mark.parametrize('row', PRINTED_DIFFERENCES)
def test_numbers_give_the_differences_that_the_paper_prints(row):
    base, printed = PRINTED_DIFFERENCES[row]
    ours, theirs = SEMANTICMIM_T1.row(row), SEMANTICMIM_T1.row(base)
    assert ours.baseline == base
    assert {name: round(ours.paper[name] - theirs.paper[name], 1) for name in printed} == printed


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_rows(table):
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    for row in table.rows:
        assert re.fullmatch(r'[\w.=+-]+', row.name)
        assert not row.baseline or (row.baseline in names and row.baseline != row.name)
        assert row.features in FEATURES
        assert (row.config in PRETRAININGS) == (row.features != 'paper') and (row.config or row.paper)
        assert (row.x is None) or table.axis
        assert set(row.paper) <= {column.name for column in table.columns}
        assert row.label in table._repr_markdown_()


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_columns(table):
    names = [column.name for column in table.columns]
    assert len(set(names)) == len(names)
    for column in table.columns:
        assert not column.beside or column.beside in names
        protocol = column.protocol
        assert not column.measure or protocol in PROBES or table.downstream[protocol] in DOWNSTREAM
    assert set(table.protocols) == {*table.probes, *table.downstream}


def test_pixels_have_no_prefix_and_no_fine_tuning():
    columns = {column.name: column for column in SEMANTICMIM_T1.columns}
    assert columns['linear_patch'].key('laptop', 'pixels') == 'linear/0/pixels'
    assert columns['linear_cls'].key('laptop', 'pixels') is None
    assert columns['ft_patch'].key('laptop', 'pixels') is None


def test_a_number_of_the_paper_has_no_score():
    table = TABLES['conmim-t4']
    assert [row.name for row in table.rows if row not in table.measured] == ['deit']
    assert table.columns[0].key('laptop', 'paper') is None
    assert TABLES['conmim-t3'].columns[0].key('laptop', 'trained') is None


@pytest.mark.parametrize(
    'name', ['conmim-t7', 'conmim-t8', 'conmim-t9', 'semanticmim-fig5', 'semanticmim-fig6']
)
def test_a_sweep_has_its_rows_at_places_on_its_axis(name):
    table = TABLES[name]
    for curve in {row.curve for row in table.rows}:
        places = [row.x for row in table.rows if row.curve == curve and row.x is not None]
        assert len(set(places)) == len(places) and (len(places) > 2 or not places)


def test_a_wrong_row():
    with pytest.raises(StudyError, match='unknown row of semanticmim-t1 "biet"; did you mean beit'):
        SEMANTICMIM_T1.row('biet')

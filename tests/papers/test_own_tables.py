"Tables of one's own from a file, and free play: found, checked, and apart from what is declared."

from dataclasses import replace

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.papers.experiments import experiment
from mimstudy.papers.own_tables import change_text, find_table, free_play, read_change
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.tables import SEMANTICMIM_T1, TABLES

HEAD = """
from mimstudy.papers.pretraining import pretraining
from mimstudy.papers.tables import ALL_COLUMNS, PIXELS, SEMANTICMIM_T1
from mimstudy.papers.table_classes import Row, Table
"""


def write(folder, rows="Row('a', 'A', 'mae'),", name='mine', more='', file='my_tables.py'):
    "A file with one table."
    table = f"MINE = Table('{name}', 'My table', 'nowhere', ALL_COLUMNS, ({rows}))"
    (folder / file).write_text(f'{HEAD}{more}\n{table}\n')
    return folder / file


def test_an_identifier_does_not_depend_on_where_the_file_is(tmp_path, monkeypatch):
    (tmp_path / 'below').mkdir()
    write(tmp_path)
    write(tmp_path / 'below', file='others.py')
    monkeypatch.chdir(tmp_path)
    names = ['my_tables.py:MINE/a', 'my_tables.py/a', f'{tmp_path}/below/others.py:MINE/a']
    found = [experiment(name, 'smoke') for name in names]
    assert {one.id for one in found} == {found[0].id} and found[0].id.startswith('mine-a-smoke-scenes-s0-')
    assert found[0].name == 'mine/a'
    monkeypatch.chdir(tmp_path / 'below')  # a child process runs in another folder
    assert experiment(found[0].reference, 'smoke') == found[0]
    assert found[0].train_id == experiment('all-methods/mae', 'smoke').train_id, 'the same training is shared'


def test_a_row_may_bring_its_own_configuration(tmp_path):
    file = write(tmp_path, "Row('a', 'A', pretraining('mae').but(mask=dict(ratio=0.5))),")
    own = experiment(f'{file}:MINE/a', 'smoke').config
    assert own == experiment('all-methods/mae', 'smoke').config.but(mask=dict(ratio=0.5))
    assert pretraining('mae').mask.ratio != 0.5


@pytest.mark.parametrize(
    'written, name, message',
    [
        ({}, 'my_tables.py:MINES', 'unknown table of my_tables.py "MINES"; did you mean MINE'),
        ({}, 'my_table.py:MINE', 'there is no file'),
        (dict(name='semanticmim-t1'), 'my_tables.py:MINE', 'a declared table has the name "semanticmim-t1"'),
        (dict(name='../up'), 'my_tables.py:MINE', 'the name "../up" must consist of'),
        (dict(rows="Row('a/b', 'A', 'mae'),"), 'my_tables.py:MINE', 'the name "a/b" must consist of'),
        (dict(rows="Row('a', 'A', 'mae'), Row('a', 'A', 'mae')"), 'my_tables.py:MINE', 'a name of its own'),
        (dict(rows=''), 'my_tables.py:MINE', 'needs rows'),
        (dict(more='1 / 0'), 'my_tables.py:MINE', 'my_tables.py cannot be executed: ZeroDivisionError'),
        (dict(more='TWO = Table("two", "", "", (), ())'), 'my_tables.py', 'unknown table of my_tables.py ""'),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, monkeypatch, written, name, message):
    write(tmp_path, **written)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError) as error:
        find_table(name)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_free_play_has_other_identifiers_and_declared_ones_stay():
    declared = experiment('semanticmim-t1/beit', 'laptop')
    change = dict(epochs=3, batch=32, size=32, per_class=10)
    tried = experiment('semanticmim-t1/beit', 'laptop', change=change)
    optim, data = tried.config.optim, tried.config.data
    assert (optim.epochs, optim.batch, data.size, data.per_class) == (3, 32, 32, 10)
    assert optim.lr == declared.config.optim.lr * 32 / declared.config.optim.batch
    assert optim.warmup == pytest.approx(declared.config.optim.warmup / 2, abs=1e-4)
    assert tried.id != declared.id and tried.train_id != declared.train_id
    assert (tried.change, declared.change) == (change, {})
    assert read_change(change_text(change)) == change and read_change('') == {}
    assert free_play(SEMANTICMIM_T1, {}) is TABLES['semanticmim-t1']


def test_small_crops_follow_the_size():
    config = experiment('all-methods/dino', 'laptop', change=dict(size=32)).config
    declared = experiment('all-methods/dino', 'laptop').config
    assert config.data.multicrop.size % config.encoder.patch == 0
    share = declared.data.multicrop.size / declared.data.size
    assert abs(config.data.multicrop.size / 32 - share) <= config.encoder.patch / 64


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(size=30), 'patches of 8 px do not tile images of 30 px'),
        (dict(epoch=1), 'did you mean epochs'),
        (dict(epochs=0), 'epochs must be a whole number above 0'),
        (dict(batch='many'), 'batch must be a whole number above 0'),
    ],
)
def test_wrong_values_of_free_play(change, message):
    with pytest.raises(StudyError, match=message):
        experiment('semanticmim-t1/beit', 'laptop', change=read_change(change_text(change)))


def test_a_table_of_free_play_says_what_was_changed():
    table = free_play(SEMANTICMIM_T1, dict(epochs=1))
    assert 'epochs=1' in table.title and 'epochs=1 is not declared' in table.note
    assert replace(table, title=SEMANTICMIM_T1.title, note=SEMANTICMIM_T1.note, change={}) == SEMANTICMIM_T1

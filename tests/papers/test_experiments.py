"Experiments: every row resolves at every scale, and an identifier changes with every value that matters."

import json
import re
from dataclasses import replace

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.papers.conmim_tables import CONMIM_ABLATIONS
from mimstudy.papers.downstream import DOWNSTREAM
from mimstudy.papers.experiments import experiment, table_experiment
from mimstudy.papers.scales import SCALES
from mimstudy.papers.table_classes import Row, Table
from mimstudy.papers.tables import SEMANTICMIM_T1, TABLES

EVERY_ROW = [f'{table.name}/{row.name}' for table in TABLES.values() for row in table.measured]


@pytest.mark.parametrize('name', EVERY_ROW)
def test_every_row_is_an_experiment_at_every_scale(name):
    ids = set()
    for scale in SCALES:
        for seed in (0, 1):
            e = experiment(name, scale, seed=seed)
            assert (e.name, e.scale, e.dataset) == (name, scale, e.config.data.dataset)
            assert json.loads(json.dumps(e.values)) == e.values
            assert re.fullmatch(r'[\w.=+-]+', e.id) and re.fullmatch(r'[\w.=+-]+', e.train_id)
            ids |= {e.id, e.train_id}
    assert len(ids) == 4 * len(SCALES)


def test_ids_differ():
    assert len({experiment(name, 'smoke').id for name in EVERY_ROW}) == len(EVERY_ROW)


def variant(features='trained', **change):
    "The experiment of a row that changes BEiT."
    table = Table('t', '', '', (), (Row('r', 'r', 'beit', change, features=features),))
    return table_experiment(table, 'r', 'paper')


def test_an_id_depends_on_every_value_that_matters_and_on_no_other():
    assert variant(optim=dict(lr=1e-3)).train_id != variant(optim=dict(clip=1.0)).train_id
    decayed = dict(optim=dict(weight_decay=0.1))
    assert variant(**decayed).id != variant().id
    assert variant('random', **decayed).id == variant('random').id
    assert variant('random').id != variant('random', encoder=dict(prefix=8)).id
    assert variant('pixels', encoder=dict(prefix=8)).id == variant('pixels').id
    assert variant('pixels').id != variant('pixels', data=dict(per_class=7)).id
    assert variant(name='another').train_id == variant().train_id


def test_equal_trainings_of_different_tables_are_one():
    other = Table('other', '', '', (), (Row('default', 'default', 'conmim_b16_300'),))
    ours = table_experiment(other, 'default', 'laptop', seed=3)
    theirs = experiment('conmim-t8/tau=0.1', 'laptop', seed=3)
    assert ours.train_id == theirs.train_id and ours.id != theirs.id
    defaults = {experiment(f'{table.name}/conmim', 'laptop').train_id for table in CONMIM_ABLATIONS[:3]}
    assert len(defaults) == 1


@pytest.mark.parametrize('table', CONMIM_ABLATIONS, ids=lambda table: table.name)
def test_every_row_of_an_ablation_is_another_training(table):
    ids = {table_experiment(table, row.name, 'laptop').train_id for row in table.measured}
    assert len(ids) == len(table.measured)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('semanticmim-t9/beit', 'smoke'), 'unknown table "semanticmim-t9"; did you mean semanticmim-t1'),
        (('semanticmim-t1/biet', 'smoke'), 'unknown row of semanticmim-t1 "biet"; did you mean beit'),
        (('semanticmim-t1', 'smoke'), 'unknown experiment'),
        (('conmim-t4/deit', 'smoke'), 'conmim-t4/deit is a number of the paper; there is nothing to run'),
        (('conmim-t8/', 'smoke'), 'unknown experiment'),
        (('semanticmim-t1/beit', 'smokes'), 'unknown scale "smokes"; did you mean smoke'),
        (('semanticmim-t1/beit', 'smoke', '', 0, ('finetoon',)), 'did you mean finetune'),
    ],
)
def test_a_wrong_name_is_one_line(arguments, message):
    with pytest.raises(StudyError) as e:
        experiment(*arguments)
    assert message in str(e.value) and '\n' not in str(e.value)


# -- protocols --------------------------------------------------------------------------------------


def test_probes_by_default_and_others_by_name():
    assert experiment('semanticmim-t1/beit', 'smoke').protocols == ('linear',)
    named = experiment('semanticmim-t1/beit', 'smoke', protocols=('voc', 'linear', 'voc'))
    assert named.protocols == ('voc', 'linear') and named.id == experiment(named.name, 'smoke').id
    assert experiment('semanticmim-t1/pixels', 'smoke', protocols=('finetune', 'linear')).protocols == (
        'linear',
    )


def test_trainings_of_an_experiment():
    smoke = experiment('semanticmim-t1/beit', 'smoke', protocols=('voc', 'linear'))
    assert [config.data.dataset for config in smoke.configs] == ['scenes', 'scenes']
    paper = experiment('semanticmim-t1/beit', 'paper', 'imagenette', protocols=('voc', 'finetune'))
    assert [config.data.dataset for config in paper.configs] == ['imagenette', 'voc', 'imagenette']
    conmim = experiment('conmim-t8/tau=0.1', 'smoke', protocols=('finetune', 'finetune-release'))
    assert [config.data.views for config in conmim.configs[1:]] == ['rand+jitter', 'rand']


def test_a_record_is_named_by_the_values_of_its_training(monkeypatch):
    e = experiment('semanticmim-t1/beit', 'smoke', protocols=('voc', 'linear'))
    voc, linear = e.record_id('voc'), e.record_id('linear')
    other = DOWNSTREAM['semanticmim_voc'].but(optim=dict(weight_decay=0.5))
    monkeypatch.setitem(DOWNSTREAM, 'semanticmim_voc', other)
    assert e.record_id('voc') != voc and e.record_id('linear') == linear == f'{e.id}-linear'


def test_naming_a_default_changes_no_identifier():
    plain = table_experiment(SEMANTICMIM_T1, 'maskfeat', 'smoke')
    named = replace(plain, config=plain.config.but(options=dict(window=True)))
    other = replace(plain, config=plain.config.but(options=dict(window=False)))
    assert named.id == plain.id and named.train_id == plain.train_id
    assert other.id != plain.id

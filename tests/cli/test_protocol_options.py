"The option --protocols: wrong names and missing data are one line, before anything starts."

import pytest
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.core.errors import StudyError
from mimstudy.study.plan import check_parameters, plan
from mimstudy.study.records import RecordStore

PARAMETERS = dict(experiment='semanticmim-t1/pixels', scale='smoke', dataset='', seed=0, out='')


def test_pixels_have_no_encoder_to_train_further(tmp_path):
    with pytest.raises(StudyError, match='no encoder'):
        check_parameters(dict(PARAMETERS, protocols='finetune'))
    steps = plan('semanticmim-t1', scale='smoke', store=RecordStore(tmp_path), protocols=('finetune',))
    assert 'pixels' not in {step.experiment.row for step in steps} and len(steps) == 5


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('--protocols finetoon', 'did you mean finetune'),
        ('--protocols knn', 'unknown protocol of semanticmim-t1 "knn"'),
        ('--protocols', '--protocols needs one value or more'),
        ('--rows pixels --protocols voc', 'pixels have no encoder'),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    command = ['run', 'semanticmim-t1', '--dry-run', '--results', str(tmp_path), *arguments.split()]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count('\n') == 1


def test_missing_label_maps_are_reported_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_IMAGENET', str(tmp_path))
    monkeypatch.setenv('MIMSTUDY_DATA_VOC', str(tmp_path / 'nowhere'))
    command = ['run', 'semanticmim-t1', '--rows', 'beit', '--scale', 'paper', '--protocols', 'voc']
    done = CliRunner().invoke(app, [*command, '--results', str(tmp_path / 'out')])
    assert done.exit_code == 2 and 'MIMSTUDY_DATA_VOC' in done.stderr and 'Traceback' not in done.output

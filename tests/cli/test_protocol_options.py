"The option --protocols: wrong names and missing data are one line, before anything starts."

import pytest
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.papers.tables import SEMANTICMIM_T1


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
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('protocols', ['linear', 'finetune', 'linear voc'])
def test_raw_pixels_are_only_probed(protocols, tmp_path):
    probed = [row for row in SEMANTICMIM_T1.rows if row.features != 'pixels' or 'linear' in protocols]
    command = ['run', 'semanticmim-t1', '--scale', 'smoke', '--dry-run', '--results', str(tmp_path)]
    done = CliRunner().invoke(app, [*command, '--protocols', *protocols.split()])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == len(probed)
    assert ('pixels' in done.stdout) == ('linear' in protocols)


def test_missing_label_maps_are_reported_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_IMAGENET', str(tmp_path))
    monkeypatch.setenv('MIMSTUDY_DATA_VOC', str(tmp_path / 'nowhere'))
    command = ['run', 'semanticmim-t1', '--rows', 'beit', '--scale', 'paper', '--protocols', 'voc']
    done = CliRunner().invoke(app, [*command, '--results', str(tmp_path / 'out')])
    assert done.exit_code == 2
    assert 'MIMSTUDY_DATA_VOC' in done.stderr
    assert 'Traceback' not in done.output
    assert not (tmp_path / 'out' / 'runs').exists()

"What a command needs of the machine is checked before it begins: one line and exit code 2, no traceback."

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.papers.experiments import experiment
from mimstudy.study.plan import Step
from mimstudy.study.records import RecordStore
from mimstudy.study.scheduler import run

PIXELS = ['run', 'semanticmim-t1', '--rows', 'pixels', '--scale', 'smoke']
NO_TEMPORARY_FOLDER = '''
import os, sys, tempfile
tempfile._candidate_tempdir_list = lambda: ['/proc']
from mimstudy.cli.commands import app
app(sys.argv[1:])
'''


def mimstudy(words, program=('-m', 'mimstudy'), stdout=subprocess.PIPE, **variables):
    "The command in a process of its own, with these variables; one that is None is unset."
    env = {name: value for name, value in (os.environ | variables).items() if value is not None}
    command = [sys.executable, *program, *words]
    return subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=200)


def assert_one_line(done, message):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    'variables, message',
    [
        (dict(WORLD_SIZE=''), 'the variable WORLD_SIZE must be a whole number, 1 or more, not ""'),
        (dict(WORLD_SIZE='abc'), 'not "abc"'),
        (dict(WORLD_SIZE='-1'), 'not "-1"'),
        (dict(MPLBACKEND='nonsense'), 'the variable MPLBACKEND names no backend: "nonsense"'),
    ],
)
def test_a_variable_with_a_wrong_value(variables, message, tmp_path):
    assert_one_line(mimstudy([*PIXELS, '--results', str(tmp_path / 'out')], **variables), message)
    assert not list(tmp_path.iterdir())


def test_no_temporary_folder(tmp_path):
    done = mimstudy([*PIXELS, '--results', str(tmp_path)], program=('-c', NO_TEMPORARY_FOLDER))
    assert_one_line(done, 'no temporary file can be written')
    assert 'set TMPDIR to another folder' in done.stderr


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
@pytest.mark.parametrize('words', [['list'], [*PIXELS, '--results', 'never']])
def test_an_output_that_is_a_full_device(words):
    with open('/dev/full', 'w') as full:
        done = mimstudy(words, stdout=full)
    assert_one_line(done, 'the output cannot be written: its device is full')
    assert not Path('never').exists()


def test_a_reader_that_goes_away_is_no_traceback():
    "As in `mimstudy list rows | head -1`."
    read, write = os.pipe()
    os.close(read)
    done = mimstudy(['list', 'rows'], stdout=write)
    os.close(write)
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'place, reason',
    [
        ('/proc/nothing', 'No such file or directory'),
        ('{tmp}/' + 'x' * 300, 'File name too long'),
        ('{tmp}/' + 'yyyyyyyyy/' * 450, 'File name too long'),
        ('{tmp}/' + 'yyyyyyyyy/' * 380, 'File name too long'),
    ],
)
def test_results_that_cannot_be_written(tmp_path, place, reason):
    "Nothing was started, and the line is short enough to read."
    place = place.format(tmp=tmp_path)
    done = CliRunner().invoke(app, [*PIXELS, '--results', place])
    assert done.exit_code == 2, done.output
    error = done.stderr.splitlines()[-1]
    assert error.startswith('error: ') and reason in error and 'another folder' in error
    assert len(error) < 400 and 'Traceback' not in done.output


def test_a_check_of_the_results_leaves_nothing_behind(tmp_path):
    store = RecordStore(tmp_path / 'out')
    store.check_writable()
    assert not [file for file in tmp_path.rglob('*') if file.is_file()]
    done = experiment('semanticmim-t1/pixels', 'smoke')
    assert run([Step(done, 'done')], RecordStore(tmp_path / 'other')) == []
    assert not (tmp_path / 'other').exists(), 'nothing is to be done, so nothing has to be written'


@pytest.mark.slow
@pytest.mark.parametrize('home', [None, '/proc/nothing'])
def test_a_home_that_is_missing_or_cannot_be_written_is_no_obstacle(tmp_path, home):
    done = mimstudy([*PIXELS, '--results', str(tmp_path)], HOME=home, MPLCONFIGDIR=str(tmp_path / 'mpl'))
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    assert len(RecordStore(tmp_path).find()) == 1

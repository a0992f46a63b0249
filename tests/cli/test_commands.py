"The command line: what it lists, what it would do, and how it answers a mistake."

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mimstudy.cli.commands import LISTS, app, estimate
from mimstudy.papers.tables import TABLES

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the children: many threads on busy cores are slow


def mimstudy(*words):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize('what', LISTS)
def test_list(what):
    done = mimstudy('list', what)
    assert done.exit_code == 0 and len(done.stdout.splitlines()) >= 2


def test_list_rows_are_grouped_by_table():
    lines = mimstudy('list', 'rows').stdout.splitlines()
    for table in TABLES.values():
        at = lines.index(table.name)
        assert [line.split()[0] for line in lines[at + 1 : at + 1 + len(table.rows)]] == [
            f'{table.name}/{row.name}' for row in table.rows
        ]
    assert mimstudy('list').stdout == mimstudy('list', 'tables').stdout


@pytest.mark.parametrize(
    'words, said',
    [
        ('list tabels', 'did you mean tables'),
        ('run semanticmim-t2 --dry-run', 'unknown table "semanticmim-t2"; did you mean semanticmim-t1'),
        ('run semanticmim-t1 --rows biet --dry-run', 'did you mean beit'),
        ('run semanticmim-t1 --scale labtop --dry-run', 'did you mean laptop'),
        ('run semanticmim-t1 --data cifar10-jpg --dry-run', 'did you mean cifar10-jpeg'),
        ('status conmim-t10', 'did you mean conmim-t'),
        ('bench --methods conmin', 'did you mean conmim'),
        ('run semanticmim-t1 --rows', '--rows needs one value or more'),
        ('run semanticmim-t1 --seeds --dry-run', '--seeds needs one value or more'),
        ('bench --encoder vit_smal_patch16_224', 'did you mean'),
    ],
)
def test_a_mistake_is_one_line_and_two(words, said, tmp_path):
    done = mimstudy(
        *words.split(), *(['--results', str(tmp_path)] if words.startswith(('run', 'status')) else [])
    )
    assert done.exit_code == 2 and done.stderr.startswith('error: ') and said in done.stderr
    assert done.stderr.count('\n') == 1 and 'Traceback' not in done.output


@pytest.mark.parametrize('words', ['--seeds -1', '--seeds x', '--seeds=1.5', '--seeds 0 -3'])
def test_a_wrong_seed_is_named(words):
    done = mimstudy('run', 'semanticmim-t1', '--dry-run', *words.split())
    assert done.exit_code == 2 and "Invalid value for '--seeds'" in done.stderr


def test_a_seed_twice_is_one_run(tmp_path):
    assert (
        mimstudy(
            'run',
            'semanticmim-t1',
            '--rows',
            'beit',
            '--seeds',
            '0',
            '0',
            '--dry-run',
            '--results',
            str(tmp_path),
        ).stdout.count('seed 0')
        == 1
    )


@pytest.mark.parametrize(
    'words',
    [
        'run',
        'run semanticmim-t1 --seeds 0 x',
        'run semanticmim-t1 --seeds x',
        'run semanticmim-t1 --lr 1',
        'run semanticmim-t1 --jobs 0',
        'trian',
    ],
)
def test_wrong_flags_are_two(words):
    done = mimstudy(*words.split())
    assert done.exit_code == 2 and 'Traceback' not in done.output


@pytest.mark.parametrize(
    'words', ['--seeds 0 1 2', '--seeds 0,1,2', '--seeds 0 --seeds 1 --seeds 2', '--seeds=0,1 2']
)
def test_several_seeds_after_one_flag(words, tmp_path):
    done = mimstudy(
        'run',
        'semanticmim-t1',
        '--rows',
        'beit,maskfeat',
        '--scale',
        'smoke',
        *words.split(),
        '--dry-run',
        '--results',
        str(tmp_path),
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f'missing    semanticmim-t1/{row} seed {seed}' for seed in (0, 1, 2) for row in ('beit', 'maskfeat')
    ]
    assert list(tmp_path.iterdir()) == []  # a dry run leaves nothing


def test_rows_may_hold_an_equals_sign(tmp_path):
    for words in (
        ['--rows', 'tau=0.1', 'tau=0.2'],
        ['--rows=tau=0.1,tau=0.2'],
        ['--rows', 'tau=0.1', '--rows', 'tau=0.2'],
    ):
        done = mimstudy(
            'run', 'conmim-t8', *words, '--scale', 'smoke', '--dry-run', '--results', str(tmp_path)
        )
        assert [line.split()[1] for line in done.stdout.splitlines()] == [
            'conmim-t8/tau=0.1',
            'conmim-t8/tau=0.2',
        ]
    assert estimate(['a', '--jobs', '2']) == ['a', '--jobs', '2']


def test_a_seed_is_laptop_scale_and_nought_by_default(tmp_path):
    done = mimstudy('run', 'conmim-t8', '--dry-run', '--results', str(tmp_path))
    assert 'at laptop scale' in done.stderr and done.stdout.count('seed 0') == 5


def test_run_status_report(tmp_path):
    words = ['--scale', 'smoke', '--results', str(tmp_path)]
    done = mimstudy('run', 'semanticmim-t1', '--rows', 'pixels', *words)
    assert done.exit_code == 0, done.output
    assert 'raw pixels' in done.stdout and 'not run' in done.stdout
    for place in ('semanticmim-t1-smoke-scenes.md', 'scores', 'runs'):
        assert place in done.stdout
    status = mimstudy('status', 'semanticmim-t1', *words)
    assert '1 done, 5 missing' in status.stdout and status.exit_code == 0
    (page,) = (tmp_path / 'tables').glob('*.md')
    text = page.read_text()
    page.write_text('edited by hand')
    report = mimstudy('report', '--results', str(tmp_path))
    assert report.exit_code == 0 and page.name in report.stdout and page.read_text() == text


def test_a_failing_row_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / 'empty').mkdir()
    monkeypatch.setenv('MIMSTUDY_DATA_EMPTY', str(tmp_path / 'empty'))
    done = mimstudy(
        'run',
        'semanticmim-t1',
        '--rows',
        'pixels',
        'random',
        '--scale',
        'smoke',
        '--data',
        'empty',
        '--results',
        str(tmp_path / 'r'),
        '--jobs',
        '2',
    )
    assert done.exit_code == 1 and '2 of 2 rows failed' in done.stderr and 'Traceback' not in done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert (
        sorted(line.split(' seed 0: ')[0] for line in errors) == ['error: pixels', 'error: random']
        and 'StudyError' not in done.stderr
    )


@pytest.mark.parametrize('words', ['run semanticmim-t1 --rows pixels --scale smoke', 'status', 'report'])
def test_results_that_are_a_file(tmp_path, words):
    (tmp_path / 'file').write_text('in the way')
    for place in tmp_path / 'file', tmp_path / 'file' / 'below':
        done = mimstudy(*words.split(), '--results', str(place))
        assert (
            done.exit_code == 2
            and done.stderr.splitlines()[-1].startswith('error: ')
            and 'is a file' in done.stderr
            and 'Traceback' not in done.output
        )
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_a_device_that_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    for device, said in (
        ('gpu', 'unknown value of MIMSTUDY_DEVICE "gpu"'),
        ('mps', 'the device "mps" is not on this machine'),
    ):
        monkeypatch.setenv('MIMSTUDY_DEVICE', device)
        done = mimstudy(
            'run', 'semanticmim-t1', '--rows', 'pixels', '--scale', 'smoke', '--results', str(tmp_path / 'r')
        )
        assert done.exit_code == 2 and said in done.stderr and not (tmp_path / 'r').exists()


def test_a_data_set_that_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_NOWHERE', str(tmp_path / 'nowhere'))
    done = mimstudy(
        'run', 'semanticmim-t1', '--scale', 'smoke', '--data', 'nowhere', '--results', str(tmp_path / 'r')
    )
    assert (
        done.exit_code == 2
        and done.stderr.splitlines()[-1].startswith('error: the dataset "nowhere" is not at')
        and 'MIMSTUDY_DATA_NOWHERE' in done.stderr
    )
    assert not (tmp_path / 'r' / 'runs').exists()  # no process was started


@pytest.mark.parametrize(
    'words', [['--help'], ['list'], ['list', 'rows'], ['run', '--help'], ['run', '--lr', '1']]
)
def test_help_lists_and_wrong_flags_load_no_torch(words):
    said = 'import sys; from mimstudy.cli.commands import app\ntry: app(sys.argv[1:])\nexcept SystemExit: pass\nassert "torch" not in sys.modules and "pandas" not in sys.modules'
    subprocess.run([sys.executable, '-c', said, *words], check=True, capture_output=True)

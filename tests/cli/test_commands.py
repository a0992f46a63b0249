"The command line: what it lists, what it would run, and how it reports a mistake."

import json
import os
import subprocess
import sys

import pytest
from invented_records import invented_record
from typer.main import get_command
from typer.testing import CliRunner

from mimstudy.cli.commands import app
from mimstudy.cli.listing import LISTS
from mimstudy.cli.options import repeat_flags
from mimstudy.cli.summaries import summary, typed_path
from mimstudy.papers.experiments import experiment
from mimstudy.papers.tables import SEMANTICMIM_T1, TABLES
from mimstudy.study import scheduler
from mimstudy.study.plan import plan
from mimstudy.study.records import RecordStore, record

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for child processes: many threads on busy cores are slow


def app_commands():
    "The names of all commands."
    return list(get_command(app).commands)


def mimstudy(words, *more):
    "Run a command of these words; further words may hold blanks."
    return CliRunner().invoke(app, [*words.split(), *map(str, more)])


def assert_one_line_error(done, message):
    "Exit code 2, and one line on stderr that has the message."
    assert done.exit_code == 2
    assert done.stderr.startswith('error: ')
    assert message in done.stderr
    assert done.stderr.count('\n') == 1
    assert 'Traceback' not in done.output


# -- list ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('what', LISTS)
def test_list(what):
    done = mimstudy(f'list {what}')
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) >= 2


def test_tables_are_listed_by_default():
    assert mimstudy('list').stdout == mimstudy('list tables').stdout


def test_rows_are_grouped_by_table():
    lines = mimstudy('list rows').stdout.splitlines()
    for table in TABLES.values():
        first = lines.index(table.name) + 1
        names = [line.split()[0] for line in lines[first : first + len(table.rows)]]
        assert names == [f'{table.name}/{row.name}' for row in table.rows]


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words, message',
    [
        ('list tabels', 'did you mean tables'),
        ('bench --methods conmin', 'did you mean conmim'),
        ('bench --encoder vit_smal_patch16_224', 'did you mean'),
        ('figures semanticmim-fig17', 'did you mean semanticmim-fig7'),
        ('figures --format jpg', 'unknown format "jpg"'),
        ('figures --measure semanticmim-fig7', 'takes no names of figures'),
        ('figures --scale labtop', 'did you mean laptop'),
        ('run semanticmim-t1 --rows', '--rows needs one value or more'),
        ('run semanticmim-t1 --seeds --dry-run', '--seeds needs one value or more'),
    ],
)
def test_a_mistake_is_one_line(words, message):
    assert_one_line_error(mimstudy(words), message)


@pytest.mark.parametrize(
    'words, message',
    [
        ('run semanticmim-t2 --dry-run', 'unknown table "semanticmim-t2"; did you mean semanticmim-t1'),
        ('run semanticmim-t1 --rows biet --dry-run', 'did you mean beit'),
        ('run semanticmim-t1 --scale labtop --dry-run', 'did you mean laptop'),
        ('run semanticmim-t1 --data cifar10-jpg --dry-run', 'did you mean cifar10-jpeg'),
        ('run semanticmim-t1 --protocols finetoon --dry-run', 'did you mean finetune'),
        ('status conmim-t10', 'did you mean conmim-t'),
    ],
)
def test_an_unknown_name_is_one_line(words, message, tmp_path):
    assert_one_line_error(mimstudy(words, '--results', tmp_path), message)


@pytest.mark.parametrize('words', ['--seeds -1', '--seeds x', '--seeds=1.5', '--seeds 0 -3'])
def test_a_wrong_seed_is_named(words):
    done = mimstudy(f'run semanticmim-t1 --dry-run {words}')
    assert done.exit_code == 2
    assert "Invalid value for '--seeds'" in done.stderr


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
def test_wrong_flags_have_exit_code_two(words):
    done = mimstudy(words)
    assert done.exit_code == 2
    assert 'Traceback' not in done.output


def test_run_refuses_to_be_started_by_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    done = mimstudy('run semanticmim-t1 --scale smoke', '--results', tmp_path)
    assert_one_line_error(done, 'mimstudy run starts a process for each row itself')


@pytest.mark.parametrize('words', ['run semanticmim-t1 --rows pixels --scale smoke', 'status', 'report'])
@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_a_results_folder_that_is_a_file(tmp_path, words, place):
    (tmp_path / 'file').write_text('not a folder')
    done = mimstudy(words, '--results', tmp_path / place)
    assert_one_line_error(done, 'is a file')
    assert (tmp_path / 'file').read_text() == 'not a folder'


@pytest.mark.parametrize(
    'device, message',
    [
        ('gpu', 'unknown value of MIMSTUDY_DEVICE "gpu"'),
        ('mps', 'the device "mps" is not on this machine'),
    ],
)
def test_a_missing_device_is_reported_before_anything_starts(tmp_path, monkeypatch, device, message):
    monkeypatch.setenv('MIMSTUDY_DEVICE', device)
    done = mimstudy('run semanticmim-t1 --rows pixels --scale smoke', '--results', tmp_path / 'out')
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_missing_dataset_is_reported_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv('MIMSTUDY_DATA_NOWHERE', str(tmp_path / 'nowhere'))
    done = mimstudy('run semanticmim-t1 --scale smoke --data nowhere', '--results', tmp_path / 'out')
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith('error: the dataset "nowhere" is not at')
    assert 'MIMSTUDY_DATA_NOWHERE' in done.stderr
    assert not (tmp_path / 'out' / 'runs').exists()


# -- flags with several values ------------------------------------------------------------------


@pytest.mark.parametrize(
    'words', ['--seeds 0 1 2', '--seeds 0,1,2', '--seeds 0 --seeds 1 --seeds 2', '--seeds=0,1 2']
)
def test_several_seeds_after_one_flag(words, tmp_path):
    command = f'run semanticmim-t1 --rows beit,maskfeat --scale smoke {words} --dry-run'
    done = mimstudy(command, '--results', tmp_path)
    assert done.exit_code == 0, done.output
    expected = []
    for seed in (0, 1, 2):
        expected += [f'missing    semanticmim-t1/{row} seed {seed}' for row in ('beit', 'maskfeat')]
    assert done.stdout.splitlines() == expected
    assert list(tmp_path.iterdir()) == [], 'a dry run writes nothing'


@pytest.mark.parametrize(
    'words', ['--rows tau=0.1 tau=0.2', '--rows=tau=0.1,tau=0.2', '--rows tau=0.1 --rows tau=0.2']
)
def test_rows_may_hold_an_equals_sign(words, tmp_path):
    done = mimstudy(f'run conmim-t8 {words} --scale smoke --dry-run', '--results', tmp_path)
    names = [line.split()[1] for line in done.stdout.splitlines()]
    assert names == ['conmim-t8/tau=0.1', 'conmim-t8/tau=0.2']


def test_other_flags_stay_as_they_are():
    words = ['a', '--jobs', '2', '--dry-run']
    assert repeat_flags(words) == words


def test_a_seed_given_twice_is_one_run(tmp_path):
    done = mimstudy('run semanticmim-t1 --rows beit --seeds 0 0 --dry-run', '--results', tmp_path)
    assert done.stdout.count('seed 0') == 1


def test_laptop_scale_and_seed_0_by_default(tmp_path):
    done = mimstudy('run conmim-t8 --dry-run', '--results', tmp_path)
    assert 'at laptop scale' in done.stderr
    assert done.stdout.count('seed 0') == len(TABLES['conmim-t8'].rows)


# -- run, status, report ------------------------------------------------------------------------


def test_a_summary_counts_each_status(tmp_path):
    steps = plan('conmim-t8', scale='smoke', store=RecordStore(tmp_path))
    steps[0] = steps[0]._replace(status='done')
    steps[1] = steps[1]._replace(status='resumable')
    assert summary(steps) == '1 done, 1 resumable, 3 missing'


def test_paths_are_shown_relative_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / 'below').mkdir()
    monkeypatch.chdir(tmp_path / 'below')
    assert typed_path(tmp_path / 'below' / 'file') == 'file'
    assert typed_path(tmp_path / 'file') == os.path.join('..', 'file')


def test_run_status_report(tmp_path):
    done = mimstudy('run semanticmim-t1 --rows pixels --scale smoke', '--results', tmp_path)
    assert done.exit_code == 0, done.output
    for text in ('raw pixels', 'not run', 'semanticmim-t1-smoke-scenes.md', 'scores', 'runs'):
        assert text in done.stdout

    status = mimstudy('status semanticmim-t1 --scale smoke', '--results', tmp_path)
    assert status.exit_code == 0
    assert f'1 done, {len(SEMANTICMIM_T1.rows) - 1} missing' in status.stdout

    (page,) = (tmp_path / 'tables').glob('semanticmim-*.md')
    assert mimstudy('report --check', '--results', tmp_path).exit_code == 0
    text = page.read_text()
    page.write_text('edited by hand')
    check = mimstudy('report --check', '--results', tmp_path)
    assert check.exit_code == 1 and page.name in check.stderr
    assert page.read_text() == 'edited by hand'
    report = mimstudy('report', '--results', tmp_path)
    assert report.exit_code == 0
    assert page.name in report.stdout
    assert page.read_text() == text


def test_status_shows_how_far_a_training_is(tmp_path):
    store = RecordStore(tmp_path)
    (step,) = plan('semanticmim-t1', ['beit'], 'smoke', store=store)
    folder = store.run_folder(step.experiment.train_id)
    folder.mkdir(parents=True)
    (folder / 'checkpoint.pt').touch()
    (folder / 'log.csv').write_text('step,epoch,loss\n8,1.0,5.5\n')
    done = mimstudy('status semanticmim-t1 --scale smoke', '--results', tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if 'resumable:' in line]
    assert line.split() == 'beit seed 0 resumable: 50 %, epoch 1.0 of 2, loss 5.5'.split()


def test_a_report_without_records_says_so(tmp_path):
    done = mimstudy('report', '--results', tmp_path)
    assert done.exit_code == 0
    assert 'there are no records' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_record_outside_its_range_fails_the_check(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    for seed, score in enumerate((30.0, 32.0, 31.0)):
        store.add(invented_record('semanticmim-t1/beit', seed, linear_best_prefix=score))
    monkeypatch.setenv('MIMSTUDY_RESULTS', str(tmp_path))
    monkeypatch.setenv('MIMSTUDY_PUBLISHED', str(tmp_path))
    assert_one_line_error(mimstudy('check'), 'mimstudy check --update writes it')
    assert mimstudy('check --update').stdout.endswith('expectations.json: 1 ranges\n')
    assert mimstudy('check').exit_code == 0
    store.add(invented_record('semanticmim-t1/beit', 3, linear_best_prefix=60.0))
    done = mimstudy('check')
    assert done.exit_code == 1
    assert 'outside: semanticmim-t1/beit at laptop scale' in done.stderr
    assert '3 scores within their ranges, 1 outside' in done.stdout


def test_a_dataset_without_images_is_refused_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / 'empty').mkdir()
    monkeypatch.setenv('MIMSTUDY_DATA_EMPTY', str(tmp_path / 'empty'))
    words = 'run semanticmim-t1 --rows pixels random --scale smoke --data empty --jobs 2'
    done = mimstudy(words, '--results', tmp_path / 'out')
    assert done.exit_code == 2
    assert 'Traceback' not in done.output
    assert not (tmp_path / 'out' / 'runs').exists()


def test_every_failed_row_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, 'run_row', lambda experiment, run: 'the disk is full')
    words = 'run semanticmim-t1 --rows pixels random --scale smoke --jobs 2'
    done = mimstudy(words, '--results', tmp_path / 'out')
    assert done.exit_code == 1
    assert '2 of 2 rows failed; the same command tries them again' in done.stderr
    errors = sorted(line for line in done.stderr.splitlines() if line.startswith('error: '))
    assert errors == [f'error: {row} seed 0: the disk is full' for row in ('pixels', 'random')]


# -- the records that git tracks, and free play ---------------------------------------------------


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    "A folder for runs, and one of published records with the raw pixels of a table."
    monkeypatch.setenv('MIMSTUDY_RESULTS', str(tmp_path / 'local'))
    monkeypatch.setenv('MIMSTUDY_PUBLISHED', str(tmp_path / 'tracked'))
    RecordStore(tmp_path / 'tracked').add(invented_record('semanticmim-t1/pixels', scale='smoke'))
    return tmp_path


def files_below(folder):
    return {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def test_published_scores_are_said_to_be_that(two_folders):
    before = files_below(two_folders / 'tracked')
    done = mimstudy('run semanticmim-t1 --rows pixels --scale smoke')
    assert done.exit_code == 0, done.output
    assert '1 published' in done.stderr
    assert 'nothing is trained for them here' in done.stderr and '--results DIR' in done.stderr
    mimstudy('report')
    assert files_below(two_folders / 'tracked') == before, 'a run and a report leave what git tracks alone'
    again = mimstudy(
        'run semanticmim-t1 --rows pixels --scale smoke --dry-run', '--results', two_folders / 'x'
    )
    assert '1 missing' in again.stderr and 'published' not in again.output


def test_publish_copies_records_of_a_table(two_folders):
    one = invented_record('semanticmim-t1/random')
    RecordStore(two_folders / 'local').add(one)
    done = mimstudy('publish semanticmim-t1')
    assert '1 records copied' in done.stdout
    assert len(RecordStore(two_folders / 'tracked').find()) == 2
    assert_one_line_error(mimstudy('publish nothing-here'), 'no encoder in the run')


def test_free_play_is_not_what_is_declared(tmp_path):
    words = 'run semanticmim-t1 --scale smoke --rows beit pixels --epochs 1 --size 16 --dry-run'
    (tmp_path / 'scores').mkdir()
    RecordStore(tmp_path).add(invented_record('semanticmim-t1/pixels', scale='smoke'))
    done = mimstudy(words, '--results', tmp_path)
    heading = 'semanticmim-t1 at smoke scale on scenes with epochs=1, size=16: 2 missing'
    assert done.stderr.splitlines()[0] == heading
    assert mimstudy('run semanticmim-t1 --epochs 0').exit_code == 2
    assert_one_line_error(mimstudy('run semanticmim-t1 --size 30 --scale smoke'), 'do not tile images')


def test_a_table_of_your_own_is_known_to_status_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(OWN_TABLE)
    assert mimstudy('status mine.py:MINE --scale smoke --results r').stdout.splitlines() == [
        'my-table at smoke scale on scenes: 1 missing',
        '  raw seed 0                       missing',
    ]
    dry = mimstudy('run mine.py --scale smoke --dry-run --results r')
    assert dry.stdout == 'missing    my-table/raw seed 0\n'
    RecordStore('r').add(
        record(experiment('mine.py:MINE/raw', 'smoke'), 'linear', {'linear/0/pixels': 9.0}, 64)
    )
    assert 'my-table-smoke-scenes.md' in mimstudy('report mine.py:MINE --results r').stdout
    assert 'my-table' not in mimstudy('report --results r').stdout
    assert_one_line_error(mimstudy('run mine.py:YOURS'), 'there are: MINE')


OWN_TABLE = """
from mimstudy.papers.table_classes import Row, Table
from mimstudy.papers.tables import ALL_COLUMNS

MINE = Table('my-table', 'Mine', 'nowhere', ALL_COLUMNS[:2], (Row('raw', 'raw', 'beit', features='pixels'),))
"""


# -- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('words', ['', *app_commands()])
def test_help_has_whole_lines_of_80_columns(words):
    done = CliRunner(env=dict(COLUMNS='80')).invoke(app, [*words.split(), '-h'])
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert '...' not in done.stdout.partition('\n')[2].replace('names...', '').replace(
        '{names}...', ''
    ).replace('[NAME]...', '')


# -- speed of the first answer ------------------------------------------------------------------

LOOKED_UP = [  # words of a command, its exit code
    ('--help', 0),
    ('--version', 0),
    ('run --help', 0),
    ('run --lr 1', 2),
    *((f'list {what}', 0) for what in LISTS),
    ('status', 0),
    ('run semanticmim-t1 --dry-run', 0),
    ('run nothing', 2),
    ('run semanticmim-t1 --rows biet', 2),
    ('run semanticmim-t1 --scale labtop', 2),
    ('run semanticmim-t1 --data cifar10-jpg', 2),
    ('run semanticmim-t1 --protocols finetoon', 2),
    ('bench --methods conmin', 2),
    ('probe timm:vit_tiny_patch16_224 --protocols kmn', 2),
    ('probe timm:vit_tiny_patch16_224 --data scene', 2),
]
WITHOUT_TORCH = '''
import json, sys
from mimstudy.cli.commands import app
for words, code in json.loads(sys.argv[1]):
    try:
        app(words.split())
    except SystemExit as exit:
        assert exit.code == code, words
    for module in ('torch', 'pandas', 'timm', 'matplotlib'):
        assert module not in sys.modules, (words, module)
'''


def test_what_only_looks_names_up_imports_no_torch(tmp_path):
    command = [sys.executable, '-c', WITHOUT_TORCH, json.dumps(LOOKED_UP)]
    env = os.environ | dict(MIMSTUDY_RESULTS=str(tmp_path))  # runs that can be resumed have a log to read
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


# -- entry points ------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments', [['--version'], ['-h'], ['run', '-h']])
def test_the_command_as_a_module(arguments):
    done = subprocess.run([sys.executable, '-m', 'mimstudy', *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('mimstudy 0' if '--version' in arguments else 'Usage: mimstudy')

"What a new user does: the built wheel in a fresh environment, and an empty folder outside the checkout."

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

from mimstudy.core.scenes import scenes

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ('mimstudy', 'nbs/run', 'pyproject.toml', 'README.md', 'LICENSE')
pytestmark = pytest.mark.slow

OWN_TABLE = """
from mimstudy.papers.table_classes import Row, Table
from mimstudy.papers.tables import ALL_COLUMNS, PIXELS

MINE = Table('my-table', 'MAE that hides less', 'my question', ALL_COLUMNS, (
    PIXELS,
    Row('ratio=0.6', 'MAE, 60 % hidden', 'mae', dict(mask=dict(ratio=0.6)), baseline='pixels'),
))
"""


def pip(*words):
    "Run pip of this environment."
    subprocess.run([sys.executable, '-m', 'pip', '-q', *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope='session')
def program(tmp_path_factory):
    "The command of the wheel in a fresh environment, which sees the packages of this one but no checkout."
    folder = tmp_path_factory.mktemp('wheel')
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / 'source' / name)
    pip('wheel', '--no-deps', '--no-build-isolation', '-w', folder, folder / 'source')
    (wheel,) = folder.glob('*.whl')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'venv'], check=True)
    programs = folder / 'venv' / ('Scripts' if os.name == 'nt' else 'bin')
    pip('--python', programs / 'python', 'install', '--no-deps', '--no-index', wheel)
    (packages,) = folder.glob('venv/lib/python*/site-packages')
    (packages / 'packages.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return programs / 'mimstudy'


@pytest.fixture
def user(program, tmp_path):
    "Runs a command line in an empty folder with a home of its own, and returns what it printed."
    own = ('PYTHONPATH', 'VIRTUAL_ENV')
    env = {k: v for k, v in os.environ.items() if k not in own and not k.startswith('MIMSTUDY_')}
    env |= dict(HOME=str(tmp_path / 'home'), OMP_NUM_THREADS='1', COLUMNS='80')
    folder = tmp_path / 'empty'
    for new in (folder, tmp_path / 'home'):
        new.mkdir()

    def run(words, code=0, **variables):
        command = [str(program), *words.split()]
        if words.startswith('python '):
            command = [str(program.with_name('python')), *words.split()[1:]]
        done = subprocess.run(command, cwd=folder, env=env | variables, capture_output=True, text=True)
        assert done.returncode == code, f'{words}\n{done.stdout}\n{done.stderr}'
        assert 'Traceback' not in done.stderr
        return done

    run.folder = folder
    return run


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def test_version_help_module_and_completion(user):
    assert user('--version').stdout == user('python -m mimstudy --version').stdout
    assert user('-h').stdout.startswith('Usage: mimstudy')
    assert '_MIMSTUDY_COMPLETE' in user('--show-completion bash').stdout
    words = dict(_MIMSTUDY_COMPLETE='complete_bash', COMP_WORDS='mimstudy st', COMP_CWORD='1')
    assert user('', **words).stdout.split() == ['status']
    assert below(user.folder) == []


def test_run_status_report(user):
    done = user('run semanticmim-t1 --rows pixels beit --scale smoke')
    assert done.stderr.startswith('semanticmim-t1 at smoke scale on scenes: 2 missing')
    assert 'beit seed 0: starting' in done.stderr and 'beit seed 0: done' in done.stderr
    assert 'results/tables/semanticmim-t1-smoke-scenes.md' in done.stdout
    assert {path.name for path in user.folder.iterdir()} == {'results'}, 'everything is in ./results'
    assert '2 done, 7 missing' in user('status semanticmim-t1 --scale smoke').stdout
    again = user('run semanticmim-t1 --rows pixels beit --scale smoke')
    assert '2 done' in again.stderr and 'starting' not in again.stderr
    assert 'semanticmim-t1-smoke-scenes.md' in user('report').stdout
    (run,) = [path.parent.name for path in (user.folder / 'results' / 'runs').glob('*/encoder.safetensors')]
    assert 'best' in user(f'probe {run} --protocols knn --per-class 8').stdout
    user(f'export results/runs/{run} exported')
    assert 'model.safetensors' in below(user.folder / 'exported')
    assert 'no folder of published records' in user(f'publish {run}', code=2).stderr


def test_a_table_of_your_own_and_free_play(user):
    (user.folder / 'my_tables.py').write_text(OWN_TABLE)
    done = user('run my_tables.py:MINE --scale smoke --epochs 1 --per-class 12 --batch 16')
    assert 'MAE that hides less, with epochs=1 batch=16 per_class=12' in done.stdout
    free = user.folder / 'results' / 'free' / 'epochs=1+batch=16+per_class=12'
    records = [json.loads(file.read_text()) for file in (free / 'scores').glob('*.json')]
    assert {one['row'] for one in records} == {'pixels', 'ratio=0.6'} and len(records) == 4
    assert all(one['change'] == dict(epochs=1, batch=16, per_class=12) for one in records)
    assert not any(str(user.folder) in one['id'] for one in records)
    assert (
        'my-table at smoke scale on scenes: 2 missing'
        in user('status my_tables.py:MINE --scale smoke').stdout
    )
    assert 'there are no records' in user('report my_tables.py:MINE').stdout


def test_a_timm_encoder_is_probed(user):
    done = user('probe timm:vit_tiny_patch16_224 --data scenes --size 32 --per-class 8')
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-14:-1]] == [*map(str, range(1, 13)), 'best']
    (file,) = (user.folder / 'results' / 'probes').glob('*.json')
    assert lines[-1] == f'results/probes/{file.name}'
    assert 'did you mean' in user('probe timm:vit_tini_patch16_224', code=2).stderr


def test_unlabelled_images_are_pretrained_on(user):
    folder = user.folder / 'data' / 'holiday'
    folder.mkdir(parents=True)
    for i, image in enumerate(scenes(70, 32, seed=0).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'{i}.png')
    done = user('run all-methods --rows mae --scale smoke --data holiday')
    assert 'has no classes, so nothing is evaluated' in done.stderr
    (encoder,) = (user.folder / 'results' / 'runs').glob('mae-*/encoder.safetensors')
    assert encoder.is_file()


def test_a_folder_with_an_emoji_and_a_seed_of_twenty_digits(user):
    done = user('run semanticmim-t1 --rows pixels --scale smoke --results 🐟{x}')
    assert 'pixels seed 0: done' in done.stderr
    assert len(list((user.folder / '🐟{x}' / 'scores').glob('*.json'))) == 1
    wrong = user('run semanticmim-t1 --rows pixels --scale smoke --seeds 12345678901234567890', code=2)
    assert wrong.stderr.splitlines()[-1].startswith('error: a seed must lie between 0 and')

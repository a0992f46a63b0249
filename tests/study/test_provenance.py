"Provenance: the commit says what the files are, and no machine is named."

import json
import platform
import re
import subprocess

import torch

from mimstudy.study.provenance import commit, provenance


def git(folder, *arguments):
    identity = ['-c', 'user.name=test', '-c', 'user.email=test@example.com']
    subprocess.run(['git', *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_says_what_the_files_are(tmp_path, monkeypatch):
    package = tmp_path / 'package'
    package.mkdir()
    (package / 'module.py').write_text('a = 1\n')
    assert commit(package) == 'unknown'
    git(tmp_path, 'init', '-q')
    assert commit(package) == 'unknown', 'an untracked copy inside a repository has no commit'
    git(tmp_path, 'add', '.')
    assert commit(package) == 'unknown', 'no commit yet'
    git(tmp_path, 'commit', '-qm', 'one')
    clean = commit(package)
    assert re.fullmatch('[0-9a-f]{10}', clean)
    (tmp_path / 'results.json').write_text('{}')
    (package / 'new.txt').write_text('')
    assert commit(package) == clean, 'untracked files and files elsewhere do not count'
    (package / 'module.py').write_text('a = 2\n')
    assert commit(package) == clean + '+changes'
    monkeypatch.setenv('PATH', '')
    assert commit(package) == 'unknown', 'a machine without git'


def test_provenance_names_no_machine():
    here = provenance()
    assert set(here) == {'commit', 'versions', 'device'}
    assert here['versions']['torch'] == torch.__version__
    text = json.dumps(here)
    assert '/root' not in text and '/home' not in text
    assert len(platform.node()) < 4 or platform.node() not in text

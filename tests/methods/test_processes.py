"Two processes compute what one computes, or say that they do not: every method of the catalogue."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimstudy.methods.catalogue import METHODS

TESTS = Path(__file__).resolve().parents[1]
OWN_DRAWS = ('deit', 'cim')  # mix images or sample codes from the generators of each process


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Losses and warnings of all methods in one process, and in two that share each batch."
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / 'methods')))
    env = os.environ | dict(
        PYTHONPATH=path, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', MIMSTUDY_PROGRESS='none'
    )
    found = []
    for options in ([], launch):
        out = tmp_path_factory.mktemp('out')
        command = [sys.executable, *options, str(TESTS / 'method_training.py'), str(out)]
        subprocess.run(command, env=env, check=True, timeout=600)
        found.append(json.loads((out / 'losses.json').read_text()))
    return found


def largest_difference(a, b, what):
    return max(abs(x / y - 1) for x, y in zip(a[what], b[what], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_two_processes_equal_one_or_say_that_they_do_not(trained, name):
    "Losses and gradient norms of four steps on the same batches, masks and views."
    one, two = (found[name] for found in trained)
    assert 'error' not in one | two
    assert len(one['loss']) == 4 and not one['said']
    differences = [largest_difference(two, one, what) for what in ('loss', 'grad_norm')]
    if two['said']:
        assert len(two['said']) == 1 and 'with processes = 2 it sees 4 images at a time' in two['said'][0]
        assert min(differences) > 0.01
    elif name in OWN_DRAWS:
        assert max(differences) < 0.2
    else:
        assert max(differences) < 5e-5

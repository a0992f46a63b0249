"""Shared by all tests: one thread (busy cores make many threads slow), golden vectors, tolerance, the flag
--slow."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / 'golden'


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the slow tests')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))
        if 'cuda' in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(scope='session')
def golden():
    "golden('hog') -> the tensors of tests/golden/hog.safetensors; golden('masks.json') -> its values."

    def load(name):
        return (
            json.loads((GOLDEN / name).read_text())
            if name.endswith('.json')
            else load_file(GOLDEN / f'{name}.safetensors')
        )

    return load


def assert_close(a, b, rel=5e-6):
    "Assert max|a-b| <= rel * max|b|, the tolerance that the golden files are held to."
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, f'shapes differ: {tuple(a.shape)} and {tuple(b.shape)}'
    worst, scale = (a - b).abs().max().item(), b.abs().max().item()
    assert worst <= rel * scale, (
        f'max|a-b| = {worst:.3g}, which is {worst / max(scale, 1e-300):.3g} of max|b|; allowed {rel:g}'
    )


def sub(tensors, prefix):
    "The tensors whose names start with `prefix`, without it."
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture
def real_data(monkeypatch):
    "The folder of real image sets, or a skip with the reason."
    for place in (os.environ.get('MIMSTUDY_DATA'), ROOT.parent / 'shared' / 'data'):
        if place and Path(place).is_dir():
            monkeypatch.setenv('MIMSTUDY_DATA', str(place))
            return Path(place)
    pytest.skip('no real image sets: set MIMSTUDY_DATA to a folder that holds them')

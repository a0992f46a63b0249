"The parameters of the run notebooks, as papermill shows them: each has a type and a meaning."

from pathlib import Path

import pytest
from papermill import inspect_notebook

from mimstudy.study.plan import PARAMETERS

RUN = sorted((Path(__file__).resolve().parents[1] / 'nbs' / 'run').glob('*.ipynb'))


@pytest.mark.parametrize('file', RUN, ids=lambda file: file.name)
def test_every_parameter_has_a_type_and_a_meaning(file):
    found = inspect_notebook(str(file))
    assert found
    for name, about in found.items():
        assert about['inferred_type_name'] in ('str', 'int'), f'{name} has no type'
        assert len(about['help']) > 10, f'{name} has no meaning'


@pytest.mark.parametrize('name', ['row', 'pretrain'])
def test_papermill_shows_every_parameter_that_a_run_may_have(name):
    (file,) = [file for file in RUN if file.stem == name]
    expected = {*PARAMETERS} if name == 'row' else {*PARAMETERS} - {'protocols'}
    assert {*inspect_notebook(str(file))} == expected

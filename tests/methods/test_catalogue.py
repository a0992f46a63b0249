"The catalogue reads names, options and descriptions from source files; they are those of the constructors."

from inspect import isclass, signature

import pytest

from mimstudy.methods.catalogue import DATA_ARGUMENTS, METHODS, constructor, data_arguments
from mimstudy.methods.catalogue import description, method_options


@pytest.mark.parametrize('name', METHODS)
def test_what_is_read_is_what_the_constructor_has(name):
    method = constructor(name)
    parameters = {n: p.default for n, p in signature(method).parameters.items() if n != 'encoder'}
    expected = {n: p.__name__ if isclass(p) else p for n, p in parameters.items() if n not in DATA_ARGUMENTS}
    assert method_options(name) == expected
    assert data_arguments(name) == [n for n in parameters if n in DATA_ARGUMENTS]
    assert (method.__name__, method.__doc__) == (name, description(name))

"Throughput: processes that run steps when asked, in their own environment."

import pytest

from mimstudy.core.errors import StudyError
from mimstudy.study.throughput import PEERS, StepProcess, installed_peers, throughput, whole_step


def test_a_process_runs_a_step_for_each_line():
    process = StepProcess('simmim', 'smoke', 'no', {})
    for _ in range(3):
        process.step()
    process.close()
    assert process.process.returncode == 0
    assert len(process.seconds) == 3 and all(seconds > 0 for seconds in process.median_seconds())


def test_a_process_that_fails_is_one_line():
    with pytest.raises(StudyError, match='ended early'):
        StepProcess('no-such-method', 'smoke', 'no', {})


def test_wrong_names():
    with pytest.raises(StudyError, match='did you mean simmim'):
        throughput('smoke', ['simmin'])


@pytest.mark.parametrize('name', PEERS)
def test_other_libraries(name):
    if name not in installed_peers():
        pytest.skip(f'{PEERS[name][1]} is not installed')
    step = whole_step(name, 'smoke', 'no')
    step()
    assert step.loss().isfinite()

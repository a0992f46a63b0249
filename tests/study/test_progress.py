"The progress of a run: what rows print becomes events, shares of a bar, and lines for the user."

import json
from io import StringIO
from types import SimpleNamespace

import pytest

from mimstudy.engine.training_log import ProgressReporter, progress_event
from mimstudy.papers.tables import TABLES
from mimstudy.study.progress import ProgressDisplay, read_event


class Terminal(StringIO):
    "A file that says it is a terminal."

    def isatty(self):
        return True


def progress(name, step, steps):
    "The line that a training prints after a step."
    return json.dumps(progress_event(name, step, steps, 4.31, 352.0, 72.0))


@pytest.mark.parametrize(
    'line', ['plain text', '43 %', '12', '[1, 2]', '{"name": "beit"}', 'null', '{"event']
)
def test_other_text_is_a_message(line):
    assert read_event(line) == dict(event='message', message=line)


def test_an_event_is_read_as_it_was_printed():
    event = progress_event('beit', 3, 10, 4.31, 352.0, 72.0)
    assert read_event(json.dumps(event)) == event
    warning = dict(event='warning', message='1 of 264 images cannot be decoded')
    assert read_event(json.dumps(warning)) == warning


def test_every_line_is_shown_outside_a_terminal():
    file = StringIO()
    display = ProgressDisplay(2, file)
    display.handle('a', progress('beit', 2, 10))
    display.handle('b', 'reading images')
    display.handle('a', progress('beit', 8, 10))
    display.handle('a', json.dumps(dict(event='warning', message='1 image cannot be decoded')))
    display.close()
    assert display.shares == {'a': 0.8, 'b': 0.0}
    assert file.getvalue().splitlines() == [
        'a: 2/10 · loss 4.31 · 1:12 left',
        'b: reading images',
        'a: 8/10 · loss 4.31 · 1:12 left',
        'a: warning: 1 image cannot be decoded',
    ]


def test_a_share_grows_from_training_to_training():
    display = ProgressDisplay(1, StringIO())
    shares = []
    for name, step in [('beit', 5), ('beit', 10), ('finetune prefix', 5), ('finetune patch', 5)]:
        display.handle('a', progress(name, step, 10), trainings=3)
        shares.append(display.shares['a'])
    assert shares == pytest.approx([0.5 / 3, 1 / 3, 1.5 / 3, 2.5 / 3])


def test_a_share_never_shrinks_and_never_exceeds_one():
    "A resumed training begins at its last checkpoint; a row may train more often than was counted."
    display = ProgressDisplay(1, StringIO())
    display.handle('a', progress('beit', 8, 10))
    display.handle('a', progress('beit', 6, 10))
    display.handle('a', 'a message')
    assert display.shares == {'a': 0.8}
    for name in ('finetune prefix', 'finetune patch'):
        display.handle('a', progress(name, 10, 10))
    assert display.shares == {'a': 1.0}


def test_a_terminal_shows_one_bar_over_all_rows(monkeypatch):
    monkeypatch.setenv('MIMSTUDY_PROGRESS', '')
    file = Terminal()
    display = ProgressDisplay(2, file)
    display.handle('a', progress('beit', 86, 100))
    display.handle('a', json.dumps(dict(event='warning', message='1 image cannot be decoded')))
    display.close()
    assert display.bar.total == 2
    assert '43 %' in file.getvalue()
    assert 'a: 86/100 · loss 4.31' in file.getvalue()
    assert 'a: warning: 1 image cannot be decoded\n' in file.getvalue()


def test_lines_can_be_requested_in_a_terminal(monkeypatch):
    monkeypatch.setenv('MIMSTUDY_PROGRESS', 'lines')
    display = ProgressDisplay(2, Terminal())
    assert display.bar is None


def test_the_longest_line_fits_into_80_columns(monkeypatch):
    monkeypatch.setenv('MIMSTUDY_PROGRESS', '')
    monkeypatch.setenv('COLUMNS', '80')
    names = [row.name for table in TABLES.values() for row in table.rows]
    longest = f'{max(names, key=len)} seed 0'
    file, terminal = StringIO(), Terminal()
    for where in (file, terminal):
        display = ProgressDisplay(1, where)
        event = progress_event('semanticmim_maskfeat', 1234, 7500, 4.3111, 1352.0, 7272.0)
        display.handle(longest, json.dumps(event))
        display.close()
    assert len(file.getvalue().rstrip('\n')) <= 80
    assert '2:01:12 left' in terminal.getvalue(), 'the end of the line is not cut off in a terminal'


def reports(monkeypatch, capsys, times, steps=100):
    "What a training prints that reports step i at times[i]."
    clock = iter([0.0, *(time for _, time in times)])
    monkeypatch.setattr('mimstudy.engine.training_log.time', SimpleNamespace(monotonic=lambda: next(clock)))
    reporter = ProgressReporter('beit', steps, seconds=0.0, style='json')
    for step, _ in times:
        reporter.update(step, 1.0, 1.0)
    return [json.loads(line)['seconds_left'] for line in capsys.readouterr().out.splitlines()]


def test_the_remaining_time_is_estimated_from_enough_steps(monkeypatch, capsys):
    "The first step takes a minute, all others a second: no estimate knows of the minute."
    left = reports(monkeypatch, capsys, [(1, 60.0), (5, 64.0), (11, 70.0), (51, 110.0), (100, 159.0)])
    assert left == [None, None, 89.0, 49.0, 0.0]

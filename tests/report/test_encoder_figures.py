"The attention figures of both papers: their encoders, when they are out of date, what is committed."

import shutil
from pathlib import Path

import pytest
import torch

from mimstudy.core.errors import StudyError
from mimstudy.core.plotting import show_curves
from mimstudy.papers.experiments import table_experiment
from mimstudy.report.encoder_figures import (
    KINDS,
    PAPER_FIGURES,
    caption,
    figure_encoders,
    file_name,
    stale_figures,
    untrained_encoder,
    write_figure,
)
from mimstudy.report.measures import METHODS, measure_findings, read_measures
from mimstudy.study.build import build_encoder
from mimstudy.study.records import RecordStore

ROOT = Path(__file__).resolve().parents[2]
STORE = RecordStore(ROOT / 'results')
PLACE = ('laptop', 'scenes')


def curve(encoders):
    "The attention of nothing."
    return show_curves({label: [0.0, 1.0] for label in encoders})


FIGURE = PAPER_FIGURES['semanticmim-fig10']._replace(draw=curve)  # of one encoder, drawn quickly


@pytest.fixture
def store(tmp_path):
    "A results folder with the encoder of the figure."
    name = table_experiment(METHODS, FIGURE.rows[0], *PLACE).train_id
    shutil.copytree(STORE.root / 'encoders' / name, tmp_path / 'encoders' / name)
    return RecordStore(tmp_path)


def test_a_figure_is_out_of_date_when_its_encoder_has_changed(store, tmp_path):
    file = write_figure(FIGURE, store, tmp_path, *PLACE)
    assert stale_figures(store, tmp_path) == []
    (weights,) = tmp_path.glob('encoders/*/encoder.safetensors')
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    assert stale_figures(store, tmp_path) == [file]
    weights.unlink()
    assert stale_figures(store, tmp_path) == [file]


@pytest.mark.parametrize('kind, start', list(zip(KINDS, (b'\x89PNG', b'<?xml', b'%PDF'))))
def test_kinds_of_files(store, tmp_path, kind, start):
    file = write_figure(FIGURE, store, tmp_path, *PLACE, kind)
    assert file.name == f'semanticmim-fig10-laptop-scenes.{kind}'
    assert file.read_bytes().startswith(start)


def test_a_figure_without_encoders_says_how_to_train_them(tmp_path):
    with pytest.raises(StudyError, match='mimstudy run all-methods --scale laptop --data scenes trains them'):
        write_figure(FIGURE, RecordStore(tmp_path), tmp_path, *PLACE)


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('row', ['random', 'random-8'])
def test_an_untrained_encoder_is_that_with_which_a_training_starts(row, seed):
    config = table_experiment(METHODS, row, *PLACE, seed).config
    like = build_encoder(table_experiment(METHODS, 'beit', *PLACE).config)
    state = torch.get_rng_state()
    found = untrained_encoder(like, config, seed).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    expected = build_encoder(config, seed).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_committed_figures_are_complete_small_and_up_to_date():
    folder = ROOT / 'figures'
    for name in PAPER_FIGURES:
        file = folder / file_name(name, *PLACE)
        assert file.stat().st_size < 400_000, name
    assert stale_figures(STORE, folder) == [], 'run mimstudy figures --results results'


def test_every_encoder_of_every_figure_is_committed_in_little_space():
    rows = tuple({row for figure in PAPER_FIGURES.values() for row in figure.rows})
    assert len(figure_encoders(STORE, rows, *PLACE)) == len(rows)
    files = [file for file in (STORE.root / 'encoders').rglob('*') if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6


def test_the_caption_of_every_figure_begins_with_what_was_measured():
    findings = measure_findings(read_measures(STORE, *PLACE))
    for figure in PAPER_FIGURES.values():
        own = [one for one in findings if figure.name in one.claim.figures]
        text = caption(figure, findings)
        assert own
        assert text.startswith('These encoders ')
        assert text.startswith('These encoders do not show') == any(
            not one.verdict.startswith('agrees') for one in own
        )

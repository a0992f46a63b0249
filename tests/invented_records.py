"""A record with invented scores, for tests; its commit and its device say so. Tests write it into temporary
folders only."""

from functools import cache
from unittest.mock import patch

from mimstudy.papers.experiments import experiment
from mimstudy.study.provenance import provenance
from mimstudy.study.records import record


cached_provenance = cache(provenance)


def invented_record(name, seed=0, scale='laptop', protocol='linear', n_val=3200, **scores):
    "The record of an experiment; `linear_1_patch=12.0` is the score linear/1/patch."
    e = experiment(name, scale, seed=seed)
    images_seen = 96_000 if e.features == 'trained' else 0
    scores = {key.replace('_', '/'): value for key, value in scores.items()}
    with patch('mimstudy.study.records.provenance', cached_provenance):  # it asks git, which takes long
        one = record(e, protocol, scores, n_val, images_seen=images_seen)
    return one | dict(commit='invented', device='invented')

"""Held-out loss: on the held-out text of each field, with natural shares of its topics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from training_fixtures import ROW

from benchmarks.agent.held_out import HeldOutRows
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.model import StackedProxies


def test_held_out_loss_is_on_the_held_out_text_of_each_field_by_natural_shares(
    corpus: Corpus, small: FeedbackConfig
) -> None:
    """Against a loop over domains; catches rows of training text, and fields that are mixed up."""
    rows = HeldOutRows(corpus, rows_per_field=60, row_tokens=ROW)
    available = np.maximum(np.diff(corpus.held_out_bounds) - 1, 0) // ROW
    assert (rows.num_rows <= available).all()
    assert (rows.num_rows[corpus.documents > 0] > 0).all()
    proxies = StackedProxies(2, small.proxy)
    losses = rows.losses(proxies)
    assert losses.shape == (2, 2)
    per_domain = np.zeros(52)
    for d in np.flatnonzero(rows.num_rows):
        blocks = np.arange(rows.num_rows[d]) * available[d] // rows.num_rows[d]
        starts = corpus.held_out_bounds[d] + blocks * ROW
        tokens = torch.from_numpy(corpus.held_out[starts[:, None] + np.arange(ROW + 1)].astype(np.int64))
        per_domain[d] = proxies.losses(tokens.expand(2, -1, -1))[0].item()
    shares = corpus.start_state + corpus.target_distribution
    expected = [(per_domain * shares)[:26].sum(), (per_domain * shares)[26:].sum()]
    assert np.allclose(losses, expected, atol=1e-5)


def test_a_field_without_held_out_rows_is_refused(corpus: Corpus) -> None:
    empty = dataclasses.replace(corpus, held_out_bounds=np.minimum(corpus.held_out_bounds, corpus.held_out_bounds[26]))
    with pytest.raises(ConfigurationError, match="field 'target' has no held-out row of 8 tokens"):
        HeldOutRows(empty, rows_per_field=30, row_tokens=ROW)

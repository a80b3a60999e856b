"""Loss of each field on held-out text.

Shapes: P proxies, R rows, L tokens of a row, F = 2 fields, D = 52 domains.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import FIELDS, NUM_CANONICAL, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import deliverable
from dmagent_loader.training.proxies.model import StackedProxies

ROWS_AT_ONCE = 16


class HeldOutRows:
    """Rows of the held-out documents; the topics of a field have their natural shares.

    Attributes:
        num_rows: (52,), number of rows of each domain.

    Args:
        corpus: Corpus with held-out tokens.
        rows_per_field: Approximate number of rows of each field. A domain with too little text contributes all of it
            and keeps its share.
        row_tokens: L.

    Raises:
        ConfigurationError: A field has no full row of held-out text.
    """

    def __init__(self, corpus: Corpus, *, rows_per_field: int, row_tokens: int) -> None:
        available = np.maximum(np.diff(corpus.held_out_bounds) - 1, 0) // row_tokens
        shares = corpus.start_state + corpus.target_distribution
        for number, name in enumerate(FIELDS):
            if not available[number * NUM_TOPICS : (number + 1) * NUM_TOPICS].any():
                raise ConfigurationError(
                    f"field {name!r} has no held-out row of {row_tokens} tokens: keep more documents from training "
                    "(held_out_every), or choose shorter rows"
                )
        # deliverable() expects a distribution, but the shares of the two fields sum to 2.
        shares = 2 * deliverable(shares / 2, available)
        self.num_rows = np.minimum(np.ceil(rows_per_field * shares).astype(np.int64), available)
        starts, weights, fields = [], [], []
        for d in np.flatnonzero(self.num_rows):
            rows = self.num_rows[d]
            blocks = np.arange(rows) * available[d] // rows
            starts.append(corpus.held_out_bounds[d] + blocks * row_tokens)
            weights.append(np.full(rows, shares[d] / rows))
            fields.append(np.full(rows, d // NUM_TOPICS))
        positions = np.concatenate(starts)[:, None] + np.arange(row_tokens + 1)
        self._tokens = torch.from_numpy(corpus.held_out[positions].astype(np.int64))
        self._weights = np.concatenate(weights)
        self._fields = np.concatenate(fields)
        assert len(self.num_rows) == NUM_CANONICAL

    @torch.no_grad()
    def losses(self, proxies: StackedProxies) -> FloatArray:
        """Mean next-token loss in nats on each field's held-out text, with natural shares of the topics: (P, F)."""
        rows = []
        for part in torch.split(self._tokens.to(proxies.embedding.device), ROWS_AT_ONCE):
            logits = proxies.logits(proxies.hidden(part[None, :, :-1])).float()
            targets = part[:, 1:].reshape(-1).repeat(proxies.num_proxies)
            losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="none")
            rows.append(losses.view(proxies.num_proxies, len(part), -1).mean(dim=-1).cpu().double().numpy())
        weighted = np.concatenate(rows, axis=1) * self._weights
        return np.stack([weighted[:, self._fields == f].sum(axis=1) for f in range(len(FIELDS))], axis=1)

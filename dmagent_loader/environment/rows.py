"""`RowEnvironment`: training rows in place of questions, for the loss of the model on each domain."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence

from dmagent_loader.environment.batches import ScoredWindow
from dmagent_loader.environment.evaluation import Evaluation
from dmagent_loader.environment.probe_rows import Row, probe_windows
from dmagent_loader.environment.scoring import Model, model_max_length, model_vocabulary
from dmagent_loader.environment.settings import EnvironmentSettings
from dmagent_loader.errors import ConfigurationError, InfluenceError


class RowEnvironment(Evaluation):
    """Training rows of each domain, scored like questions: the fields are the domains.

    The feedback of a domain is minus its loss: the mean over its rows of the mean log-probability per token, in nats.
    Any code that evaluates an `Environment`, on any number of ranks, can thus compute losses by domain. As in training,
    padding is not read, and only the first tokens of a row that is too long for the model are.

    Args:
        rows_by_domain: Domain -> one or more rows: token ids, or mappings with ``input_ids`` and optionally
            ``attention_mask`` and ``labels``.
        settings: Settings of the calls; those of questions, among them `max_length`, have no effect. None: the
            defaults.
        max_row_tokens: Largest number of tokens that the model reads of a row; None: as many as it can read.

    Raises:
        ConfigurationError: There are no domains, a domain has no rows, or a row has no token to predict.

    Example:
        >>> import torch
        >>> def model(input_ids, attention_mask):
        ...     return torch.zeros(*input_ids.shape, 8)  # every token is equally likely
        >>> rows = RowEnvironment({"source/web": [[1, 2, 3]], "target/math": [[4, 5], [6, 7, 1]]})
        >>> {domain: round(-value, 4) for domain, value in rows.evaluate(model).items()}  # log 8
        {'source/web': 2.0794, 'target/math': 2.0794}
    """

    _kind = "rows"

    def __init__(
        self,
        rows_by_domain: Mapping[str, Sequence[Row]],
        settings: EnvironmentSettings | None = None,
        *,
        max_row_tokens: int | None = None,
    ) -> None:
        super().__init__(settings or EnvironmentSettings())
        self._windows = probe_windows(rows_by_domain, max_length=max_row_tokens or sys.maxsize - 1, vocabulary=None)
        self._read = self._windows
        self._largest_token = max(int(row.tokens.max()) for listed in self._windows.values() for row in listed)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self._windows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of domains and tokens; equal means comparable losses."""
        digest = hashlib.sha256()
        for domain, listed in self._windows.items():
            digest.update(json.dumps([domain, [row.num_scored for row in listed]]).encode())
            for row in listed:
                digest.update(len(row.tokens).to_bytes(8, "little") + row.tokens.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are read; before the first evaluation, by a model of any length."""
        return sum(len(row.tokens) for listed in self._read.values() for row in listed)

    def _windows_of(self, model: Model) -> dict[str, list[ScoredWindow]]:
        """The rows that the model can read to a token to predict.

        Raises:
            ConfigurationError: A token is not in the model's vocabulary.
            InfluenceError: A domain has no such row.
        """
        vocabulary = model_vocabulary(model)
        if vocabulary is not None and self._largest_token >= vocabulary:
            raise ConfigurationError(
                f"the rows contain token id {self._largest_token}, but the model's vocabulary is {vocabulary}: "
                "tokenise the rows with the model's own tokenizer"
            )
        longest = model_max_length(model)
        if longest is None:
            self._read = self._windows
            return self._read
        found = {
            domain: [head for head in (_head(row, longest) for row in listed) if head is not None]
            for domain, listed in self._windows.items()
        }
        if empty := [domain for domain, listed in found.items() if not listed]:
            raise InfluenceError(
                f"the rows of {empty} have no token to predict within the {longest} tokens that the model reads: give "
                "these domains other rows"
            )
        self._read = found
        return found

    def _origin(self, field: str, number: int) -> str:
        return f"row {number} of domain {field!r}"

    def _summary(self, feedback: Mapping[str, float]) -> str:
        values = ", ".join(f"{domain} {-value:.4f}" for domain, value in feedback.items())
        return f"losses {values} on {sum(map(len, self._windows.values()))} rows"


def _head(row: ScoredWindow, longest: int) -> ScoredWindow | None:
    """The first tokens of a row, as many as a model reads; None: there is none to predict among them."""
    cut = max(0, row.num_inputs - longest)
    if cut == 0:
        return row
    if row.num_scored <= cut:
        return None
    return ScoredWindow(tokens=row.tokens[:-cut], num_scored=row.num_scored - cut)

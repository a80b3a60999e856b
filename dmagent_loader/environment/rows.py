"""`RowEnvironment`: training rows in place of questions, for the loss of the model on each domain."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from dmagent_loader.environment.batches import ScoredWindow
from dmagent_loader.environment.core import Environment
from dmagent_loader.environment.encoding import EncodedQuestion
from dmagent_loader.environment.probe_rows import Row, probe_windows
from dmagent_loader.environment.questions import Question
from dmagent_loader.environment.settings import EnvironmentSettings


class RowEnvironment(Environment):
    """Training rows of each domain, scored like questions: the fields are the domains.

    The feedback of a domain is minus its loss: the mean over its rows of the mean log-probability per token, in nats.
    Any code that evaluates an `Environment`, on any number of ranks, can thus compute losses by domain.

    Args:
        rows_by_domain: Domain -> one or more rows: token ids, or mappings with ``input_ids`` and optionally
            ``attention_mask`` and ``labels``. Of a row longer than the model's maximum length, the last tokens are
            scored.
        settings: Settings of the calls; those of questions have no effect. None: the defaults.

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

    def __init__(
        self, rows_by_domain: Mapping[str, Sequence[Row]], settings: EnvironmentSettings | None = None
    ) -> None:
        # Rows are tokens already, so there is no tokenizer and nothing of `Environment.__init__` applies.
        settings = settings or EnvironmentSettings()
        self.settings = dataclasses.replace(settings, score="answer")
        self.last_seconds = self.total_seconds = 0.0
        windows = probe_windows(rows_by_domain, max_length=settings.max_length or sys.maxsize - 1, vocabulary=None)
        self.questions = {
            domain: tuple(
                Question(question="", answer="", origin=f"row {number} of domain {domain!r}")
                for number in range(len(listed))
            )
            for domain, listed in windows.items()
        }
        self._encoded = [
            EncodedQuestion(tokens=row.tokens, num_answer_tokens=row.num_scored)
            for listed in windows.values()
            for row in listed
        ]
        self._largest_token = max(int(encoded.tokens.max()) for encoded in self._encoded)
        self._tokenizer_max_length = None
        self._windows: dict[int, list[ScoredWindow]] = {}

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return sum(len(encoded.tokens) for encoded in self._encoded)

    def _report_cuts(self, max_length: int) -> None:
        """Longer rows are no fault: training cuts them, too."""

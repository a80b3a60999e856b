"""Question sets that score all proxies at once.

The feedback equals that of `dmagent_loader.environment.Environment` for each proxy alone (Eq. 1, reconstructed).
Reading and encoding are the environment's; only the scoring is batched over proxies.

Shapes: P proxies, K fields, B pairs of a batch, T tokens, S scored tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dmagent_loader.environment.encoding import EncodedQuestion, PairEncoder, request
from dmagent_loader.environment.questions import Question, evenly_spaced, read_questions
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.proxies.model import StackedProxies


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """Selection and scoring of the question-answer pairs.

    Args:
        max_tokens: Longest pair, at most the length of a training row; longer ones are left out instead of cut.
        max_questions: Largest number of pairs of a field, or one number for each field; they are evenly spaced among
            the pairs that fit.
        score: ``"answer"`` or ``"pair"``, as in `EnvironmentSettings`; ``"pair"`` is far less noisy with small proxies.
        cloze: Whether multiple choice questions are asked without the list of choices, see `read_questions`.
        separator: Text between question and answer, scored with the answer, as in `EnvironmentSettings`.
        batch_tokens: Largest number of tokens of one proxy in one call; it does not change the feedback.
    """

    max_tokens: int = 128
    max_questions: int | tuple[int, ...] = 300
    score: Literal["answer", "pair"] = "pair"
    cloze: bool = True
    separator: str = " "
    batch_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class _Batch:
    tokens: Tensor  # (1, B, T) inputs, zeros on the right of the shorter ones: causal, so they change nothing
    scored: Tensor  # (S,) positions in the flattened (B * T) whose next token is scored
    targets: Tensor  # (S,) those next tokens
    pairs: Tensor  # (S,) the pair in the batch that each belongs to
    weights: Tensor  # (S,) 1 / (scored tokens of the pair)
    fields: Tensor  # (B,) field number of each pair


class ProxyQuestions:
    """Question-answer pairs of K fields, padded into batches of like length.

    Attributes:
        fields: Names of the K fields.
        num_questions: Number of pairs asked, by field.
        num_tokens: Tokens that each proxy reads for one feedback, without padding.
        fingerprint: Hex SHA-256 of all tokens.
    """

    def __init__(self, questions: Mapping[str, list[Question]], tokenizer: Any, config: QuestionConfig) -> None:
        """Encodes and batches.

        Args:
            questions: Field -> its pairs.
            tokenizer: See `PairEncoder`.
            config: Settings.

        Raises:
            EnvironmentDataError: No pair of a field is short enough.
            ConfigurationError: The number of limits differs from the number of fields.
        """
        limits = config.max_questions
        if isinstance(limits, int):
            limits = (limits,) * len(questions)
        if len(limits) != len(questions):
            raise ConfigurationError(
                f"max_questions has {len(limits)} numbers, but the fields are {', '.join(questions)}: give one for each"
            )
        encoder = PairEncoder(tokenizer)
        self.fields = tuple(questions)
        self.num_questions: dict[str, int] = {}
        pairs: list[tuple[int, EncodedQuestion]] = []
        for number, (name, listed) in enumerate(questions.items()):
            encoded = [(q, encoder.encode(*request(q, config.separator), q.origin)) for q in listed]
            fitting = {id(q): e for q, e in encoded if len(e.tokens) <= config.max_tokens + 1}
            chosen = evenly_spaced([q for q, _ in encoded if id(q) in fitting], limits[number])
            if not chosen:
                raise EnvironmentDataError(
                    f"none of the {len(listed)} pairs of field {name!r} fits into {config.max_tokens} tokens: raise "
                    "max_tokens (and the length of the training rows) or give shorter questions"
                )
            self.num_questions[name] = len(chosen)
            pairs += [(number, fitting[id(q)]) for q in chosen]
        if config.score == "pair":
            pairs = [(number, replace(pair, num_answer_tokens=len(pair.tokens) - 1)) for number, pair in pairs]
        digest = hashlib.sha256()
        for number, pair in pairs:
            digest.update(np.array([number, pair.num_answer_tokens, len(pair.tokens)], dtype=np.int64).tobytes())
            digest.update(pair.tokens.astype(np.int64).tobytes())
        self.fingerprint = digest.hexdigest()
        self.num_tokens = sum(len(pair.tokens) - 1 for _, pair in pairs)
        pairs.sort(key=lambda entry: -len(entry[1].tokens))
        self._batches: list[_Batch] = []
        while pairs:
            size = max(1, config.batch_tokens // (len(pairs[0][1].tokens) - 1))
            self._batches.append(_batch(pairs[:size]))
            pairs = pairs[size:]

    @classmethod
    def from_files(cls, files: Mapping[str, Path], tokenizer: Any, config: QuestionConfig) -> ProxyQuestions:
        """Reads the JSON lines of each field; see `dmagent_loader.environment.questions.read_questions`."""
        return cls({n: read_questions(path, cloze=config.cloze) for n, path in files.items()}, tokenizer, config)

    @torch.no_grad()
    def feedback(self, proxies: StackedProxies) -> FloatArray:
        """Mean over the pairs of the mean log-probability per scored token, in nats: (P, K)."""
        count, device = proxies.num_proxies, proxies.embedding.device
        totals = torch.zeros(count, len(self.fields), dtype=torch.float64)
        for batch in self._batches:
            hidden = proxies.hidden(batch.tokens.to(device))[:, batch.scored.to(device)]
            logits = proxies.logits(hidden).float()
            losses = functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch.targets.to(device).repeat(count), reduction="none"
            )
            means = torch.zeros(count, len(batch.fields), dtype=torch.float64)
            means.index_add_(1, batch.pairs, -losses.view(count, -1).cpu().double() * batch.weights)
            totals.index_add_(1, batch.fields, means)
        questions = torch.tensor([self.num_questions[name] for name in self.fields], dtype=torch.float64)
        return np.asarray((totals / questions).numpy(), dtype=np.float64)


def _batch(pairs: list[tuple[int, EncodedQuestion]]) -> _Batch:
    length = max(len(pair.tokens) for _, pair in pairs) - 1
    tokens = np.zeros((1, len(pairs), length), dtype=np.int64)
    scored, targets, owners, weights = [], [], [], []
    for row, (_, pair) in enumerate(pairs):
        inputs, answers = len(pair.tokens) - 1, pair.num_answer_tokens
        tokens[0, row, :inputs] = pair.tokens[:-1]
        scored.append(row * length + np.arange(inputs - answers, inputs))
        targets.append(pair.tokens[-answers:])
        owners.append(np.full(answers, row))
        weights.append(np.full(answers, 1.0 / answers))
    return _Batch(
        tokens=torch.from_numpy(tokens),
        scored=torch.from_numpy(np.concatenate(scored)),
        targets=torch.from_numpy(np.concatenate(targets)),
        pairs=torch.from_numpy(np.concatenate(owners)),
        weights=torch.from_numpy(np.concatenate(weights)),
        fields=torch.tensor([number for number, _ in pairs]),
    )

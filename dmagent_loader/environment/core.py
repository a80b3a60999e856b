"""`Environment`: question sets and a model's feedback on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dmagent_loader._distributed import get_rank, is_active, together
from dmagent_loader._validation import shown
from dmagent_loader.environment.batches import ScoredWindow, window
from dmagent_loader.environment.encoding import PairEncoder, Tokenizer, request, tokenizer_max_length
from dmagent_loader.environment.evaluation import Evaluation
from dmagent_loader.environment.influence import InfluenceSettings, measure
from dmagent_loader.environment.influence_ways import STEP
from dmagent_loader.environment.probe_rows import Row, probe_windows, without_copies
from dmagent_loader.environment.questions import (
    Paths,
    Question,
    evenly_spaced,
    questions_from_pairs,
    read_questions,
)
from dmagent_loader.environment.scoring import Model, model_max_length, model_vocabulary, unwrap
from dmagent_loader.environment.settings import EnvironmentSettings
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError, InfluenceError
from dmagent_loader.mixture.influence import Influence

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048
"""Maximum length if the settings, the model and the tokenizer set none, as in lm-evaluation-harness."""


class Environment(Evaluation):
    """Question sets, one per field, and a model's feedback on them (Eq. 1, reconstructed).

    Feedback of a field = mean over its pairs of the mean log-probability per answer token given the question, in nats.
    Under torch.distributed the pairs are split over the ranks; all ranks call `evaluate` and get the same numbers.

    Use `from_files` or `from_pairs` to build one.

    Example:
        >>> import torch
        >>> def model(input_ids, attention_mask):
        ...     return torch.zeros(*input_ids.shape, 256)  # every byte is equally likely
        >>> environment = Environment.from_pairs(
        ...     {"general": [("1 + 1 =", "2")]}, lambda text: list(text.encode()), progress=False
        ... )
        >>> round(environment.evaluate(model)["general"], 4)  # -log 256
        -5.5452
    """

    _kind = "questions"

    def __init__(
        self, questions: Mapping[str, list[Question]], tokenizer: Tokenizer, settings: EnvironmentSettings
    ) -> None:
        if isinstance(tokenizer, (str, bytes, os.PathLike)):
            raise ConfigurationError(
                f"tokenizer is {shown(tokenizer)}; pass the tokenizer itself, for example "
                "AutoTokenizer.from_pretrained(...) of transformers"
            )
        if not questions:
            raise EnvironmentDataError("the environment has no field: give questions for at least one")
        for field, listed in questions.items():
            if not isinstance(field, str) or not field:
                raise EnvironmentDataError(f"{field!r} cannot name a field: use a non-empty string")
            if not listed:
                raise EnvironmentDataError(
                    f"field {field!r} has no questions, so its feedback is undefined: add questions or remove the field"
                )
        super().__init__(settings)
        self.questions = {f: tuple(evenly_spaced(qs, settings.max_questions)) for f, qs in questions.items()}
        encoder = PairEncoder(tokenizer, settings.prefix_token_id)
        self._tokenizer_max_length = tokenizer_max_length(tokenizer)
        self._encoded = [
            encoder.encode(*request(question, settings.separator), question.origin)
            for listed in self.questions.values()
            for question in listed
        ]
        encoder.refuse_truncation()
        if get_rank() == 0:
            encoder.warn(len(self._encoded))
        self._largest_token = max(int(encoded.tokens.max()) for encoded in self._encoded)
        self._windows: dict[int, list[ScoredWindow]] = {}

    @classmethod
    def from_files(cls, files: Mapping[str, Paths], tokenizer: Tokenizer, **settings: Any) -> Environment:
        """Builds an environment from JSON lines files with the columns ``question`` and ``answer``.

        Args:
            files: Field name -> path or paths, ``.jsonl`` or ``.jsonl.gz``.
            tokenizer: Tokenizer of the model: a Hugging Face tokenizer, a ``tokenizers.Tokenizer``, or a callable from
                text to token ids.
            **settings: Arguments of `EnvironmentSettings`.

        Raises:
            EnvironmentDataError: A file is not usable; the message names file, line and column.
            ConfigurationError: A setting is invalid, or the tokenizer is not usable.
        """
        given = EnvironmentSettings.of(settings)
        _refuse_no_mapping("files", files)
        return cls({f: read_questions(p, cloze=given.cloze) for f, p in files.items()}, tokenizer, given)

    @classmethod
    def from_pairs(
        cls, pairs: Mapping[str, Iterable[tuple[str, str]]], tokenizer: Tokenizer, **settings: Any
    ) -> Environment:
        """Builds an environment from (question, answer) pairs in memory; otherwise like `from_files`."""
        _refuse_no_mapping("pairs", pairs)
        questions = {field: questions_from_pairs(field, listed) for field, listed in pairs.items()}
        return cls(questions, tokenizer, EnvironmentSettings.of(settings))

    @property
    def fields(self) -> tuple[str, ...]:
        """Field names, in the given order."""
        return tuple(self.questions)

    @property
    def num_questions(self) -> dict[str, int]:
        """Number of questions of each field."""
        return {field: len(listed) for field, listed in self.questions.items()}

    @property
    def requests(self) -> dict[str, list[tuple[str, str]]]:
        """(context, continuation) of each pair: the lm-evaluation-harness requests that give the same numbers."""
        return {f: [request(q, self.settings.separator) for q in listed] for f, listed in self.questions.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of fields, questions, tokens and settings that affect feedback; equal means comparable feedback."""
        digest = hashlib.sha256()
        settings = {name: getattr(self.settings, name) for name in ("score", "separator", "max_length")}
        encoded = iter(self._encoded)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for field, listed in self.questions.items():
            digest.update(json.dumps([field, len(listed)]).encode())
            for question in listed:
                pair = next(encoded)
                digest.update(json.dumps([question.question, question.answer, pair.num_answer_tokens]).encode())
                digest.update(pair.tokens.astype("<i8").tobytes())
        return digest.hexdigest()

    def influence(
        self,
        model: Model,
        rows_by_domain: Mapping[str, Sequence[Row]],
        *,
        optimizer: object = None,
        rank: int | None = None,
        world_size: int | None = None,
        **settings: Any,
    ) -> Influence:
        """Estimates how much training on each domain would raise each field, without any training.

        The result maps field -> domain -> score with a standard error, in nats of the field's mean answer
        log-probability per unit of learning rate. A positive score means that training on the domain helps the field.
        The model, its gradients, the optimizer and all random states are restored bit for bit. All ranks call this
        together with the same rows, share the work and get the same result.

        Args:
            model: Model as in `evaluate`, but a module with trainable parameters; only those are considered (LoRA,
                frozen parts). DistributedDataParallel and FSDP 2 are supported.
            rows_by_domain: Domain -> several training rows: token ids, or mappings with ``input_ids`` and optionally
                ``attention_mask`` and ``labels``. At least 32 rows per domain keep the standard errors small. Copies
                of a row count once.
            optimizer: Optimizer that trains the model; its second moments give the scale of an update. Without them,
                the mean squared gradients of mixed batches are used.
            rank: See `evaluate`.
            world_size: See `evaluate`.
            **settings: Arguments of `InfluenceSettings`, for example ``way="reverse"``.

        Raises:
            InfluenceError: Influence cannot be measured on this model, or memory is too short even for the cheapest
                method.
            ConfigurationError: The rows, the model or a setting is not usable.
            RankError: Another rank failed, or the ranks have different questions or rows.

        Example:
            >>> import torch
            >>> class Bigrams(torch.nn.Module):  # next-byte logits from the current byte
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.table = torch.nn.Embedding(256, 256, _weight=torch.zeros(256, 256))
            ...     def forward(self, input_ids, attention_mask):
            ...         return self.table(input_ids)
            >>> environment = Environment.from_pairs({"sums": [("1+1=", "2")] * 4}, lambda text: list(text.encode()))
            >>> rows = {"source/talk": [b"hello world", b"hello there"], "target/sums": [b"1+1=2 2+2=4", b"1+1=2"]}
            >>> influence = environment.influence(Bigrams(), {n: [list(r) for r in rows[n]] for n in rows})
            >>> influence["sums"]["target/sums"].value > influence["sums"]["source/talk"].value
            True
        """
        given = InfluenceSettings.of(settings)
        if (rank is None) != (world_size is None):
            raise ConfigurationError(f"rank is {rank} and world_size is {world_size}: give both or neither")
        model = unwrap(model)
        with together(STEP, shared=(InfluenceError,)) as facts:
            if is_active():
                facts["the environment's questions"] = self.fingerprint
            questions = self._windows_of(model)
            read = probe_windows(
                rows_by_domain,
                max_length=min(self._max_length(model), given.max_row_tokens or sys.maxsize),
                vocabulary=model_vocabulary(model),
            )
            rows = without_copies(read)
        if given.batch_tokens is None and self.settings.batch_tokens is not None:
            given = dataclasses.replace(given, batch_tokens=self.settings.batch_tokens)
        found = measure(
            model,
            questions,
            rows,
            given,
            optimizer=optimizer,
            logits_of=self.settings.logits_of,
            rank=rank,
            world_size=world_size,
        )
        copies = {domain: len(read[domain]) - len(kept) for domain, kept in rows.items()}
        return dataclasses.replace(found, copies={domain: count for domain, count in copies.items() if count})

    def _windows_of(self, model: Model) -> dict[str, list[ScoredWindow]]:
        vocabulary = model_vocabulary(model)
        if vocabulary is not None and self._largest_token >= vocabulary:
            raise ConfigurationError(
                f"the questions contain token id {self._largest_token}, but the model's vocabulary is {vocabulary}: "
                "build the environment with the model's own tokenizer"
            )
        max_length = self._max_length(model)
        if max_length not in self._windows:
            self._windows[max_length] = [
                window(encoded, max_length, whole_pair=self.settings.score == "pair") for encoded in self._encoded
            ]
            self._report_cuts(max_length)
        windows = iter(self._windows[max_length])
        return {field: [next(windows) for _ in listed] for field, listed in self.questions.items()}

    def _origin(self, field: str, number: int) -> str:
        return self.questions[field][number].origin

    def _summary(self, feedback: Mapping[str, float]) -> str:
        values = ", ".join(f"{field} {value:.4f}" for field, value in feedback.items())
        return f"feedback {values} on {len(self._encoded)} questions"

    def _max_length(self, model: Model) -> int:
        """Maximum number of tokens the model reads."""
        return self.settings.max_length or model_max_length(model) or self._tokenizer_max_length or DEFAULT_MAX_LENGTH

    def _report_cuts(self, max_length: int) -> None:
        cut = sum(len(encoded.tokens) > max_length + 1 for encoded in self._encoded)
        answers = sum(encoded.num_answer_tokens > max_length for encoded in self._encoded)
        if cut and get_rank() == 0:
            logger.warning(
                "%d of %d questions are longer than max_length=%d and were truncated from the left; in %d the answer "
                "alone is longer, so only its last tokens are scored: remove them or raise max_length if that matters",
                cut,
                len(self._encoded),
                max_length,
                answers,
            )


def _refuse_no_mapping(name: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{name} is {shown(given)}; it must map each field to its questions")

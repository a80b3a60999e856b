"""`Environment`: question sets and a model's feedback on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dmagent_loader._distributed import all_reduce_sum, get_rank, get_world_size, is_active, together
from dmagent_loader._validation import shown
from dmagent_loader.environment.batches import (
    BATCH_TOKENS,
    DEFAULT_BATCH_TOKENS,
    ScoredWindow,
    plan_batches,
    window,
)
from dmagent_loader.environment.encoding import PairEncoder, Tokenizer, request, tokenizer_max_length
from dmagent_loader.environment.influence import InfluenceSettings, measure
from dmagent_loader.environment.influence_ways import STEP
from dmagent_loader.environment.probe_rows import Row, probe_windows
from dmagent_loader.environment.questions import (
    Paths,
    Question,
    evenly_spaced,
    questions_from_pairs,
    read_questions,
)
from dmagent_loader.environment.scoring import (
    Model,
    Scorer,
    model_max_length,
    model_vocabulary,
    scoring_state,
    unwrap,
)
from dmagent_loader.environment.settings import EnvironmentSettings
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError, FeedbackError
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray, IntArray

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048
"""Maximum length if the settings, the model and the tokenizer set none, as in lm-evaluation-harness."""

_STEP = "evaluating the model"


class LogLikelihoods(NamedTuple):
    """Log-likelihoods of the N pairs of one field.

    Attributes:
        sums: (N,), log-probability summed over each pair's scored tokens, in nats.
        num_tokens: (N,), number of scored tokens of each pair.
    """

    sums: FloatArray
    num_tokens: IntArray


class Environment:
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
        self.settings = settings
        self.questions = {f: tuple(evenly_spaced(qs, settings.max_questions)) for f, qs in questions.items()}
        self.last_seconds = 0.0
        self.total_seconds = 0.0
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

    def evaluate(
        self,
        model: Model,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Computes a model's feedback on every field (Eq. 1, reconstructed).

        The model and all random states are restored. `last_seconds` and `total_seconds` record the time taken.

        Args:
            model: Causal language model that takes token ids and returns logits, see `scoring.Model`; for any other,
                the environment's setting ``logits_of``. DistributedDataParallel and torch.compile are unwrapped.
            rank: Data-parallel rank of this process. Give it together with `world_size` if the ranks of the default
                process group are not all data-parallel replicas (tensor parallelism). None: the rank in the default
                process group.
            world_size: Number of data-parallel ranks. None: the size of the default process group.
            progress: False hides the progress bar that the environment's setting allows.

        Returns:
            Field -> mean over pairs of the mean log-probability per scored token, the same on every rank.

        Raises:
            FeedbackError: Log-probabilities are not finite.
            RankError: The evaluation failed on another rank, or the ranks have different questions.
            ConfigurationError: The model does not match the tokenizer, or does not return logits.
        """
        feedback = {}
        for field, (sums, num_tokens) in self.log_likelihoods(
            model, rank=rank, world_size=world_size, progress=progress
        ).items():
            bad = np.flatnonzero(~np.isfinite(sums))
            if len(bad):
                raise FeedbackError(
                    f"log-probabilities are not finite for {len(bad)} of {len(sums)} questions of field {field!r} "
                    f"(first: {self.questions[field][bad[0]].origin}), so there is no feedback: the model has probably "
                    "diverged or its logits overflow; check its loss, and evaluate in bfloat16 or float32"
                )
            feedback[field] = float(np.mean(sums / num_tokens))
        logger.info(
            "feedback %s on %d questions in %.2f s",
            ", ".join(f"{field} {value:.4f}" for field, value in feedback.items()),
            len(self._encoded),
            self.last_seconds,
        )
        return feedback

    def log_likelihoods(
        self,
        model: Model,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        progress: bool = True,
    ) -> dict[str, LogLikelihoods]:
        """Computes the summed log-probability of every pair; arguments as for `evaluate`.

        Non-finite values are returned unchanged.

        Raises:
            ConfigurationError: The model does not match the tokenizer, or does not return logits.
            FeedbackError: No rank returned log-probabilities for some of the questions.
            RankError: The evaluation failed on another rank, or the ranks have different questions.
        """
        if (rank is None) != (world_size is None):
            raise ConfigurationError(f"rank is {rank} and world_size is {world_size}: give both or neither")
        started = time.perf_counter()
        model = unwrap(model)
        with together(_STEP) as facts:
            if is_active():
                facts["the environment's questions"] = self.fingerprint
            windows = self._windows_for(model)
            sums, times = np.zeros(len(windows)), np.zeros(len(windows))
            self._score(
                model,
                windows,
                rank=get_rank() if rank is None else rank,
                world_size=get_world_size() if world_size is None else world_size,
                sums=sums,
                times=times,
                progress=progress,
            )
        reduced = all_reduce_sum(np.concatenate([sums, times]), _STEP)
        # Ranks that share one model score the same pairs; divide by the number of times each pair was scored.
        scored, counted = reduced[: len(windows)], reduced[len(windows) :]
        if not counted.all():
            raise FeedbackError(
                f"no rank returned log-probabilities for {int((counted == 0).sum())} of {len(counted)} questions: call "
                "evaluate on every rank that holds the model's output, with its data-parallel rank and world size"
            )
        means = scored / counted
        self.last_seconds = time.perf_counter() - started
        self.total_seconds += self.last_seconds
        num_tokens = np.array([entry.num_scored for entry in windows], dtype=np.int64)
        results, start = {}, 0
        for field, count in self.num_questions.items():
            part = slice(start, start + count)
            results[field] = LogLikelihoods(means[part], num_tokens[part])
            start += count
        return results

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
                ``attention_mask`` and ``labels``. At least 32 rows per domain keep the standard errors small.
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
            >>> rows = {"source/talk": [b"hello world"] * 2, "target/sums": [b"1+1=2 2+2=4"] * 2}
            >>> influence = environment.influence(Bigrams(), {n: [list(r) for r in rows[n]] for n in rows})
            >>> influence["sums"]["target/sums"].value > influence["sums"]["source/talk"].value
            True
        """
        given = InfluenceSettings.of(settings)
        if (rank is None) != (world_size is None):
            raise ConfigurationError(f"rank is {rank} and world_size is {world_size}: give both or neither")
        model = unwrap(model)
        with together(STEP) as facts:
            if is_active():
                facts["the environment's questions"] = self.fingerprint
            windows = iter(self._windows_for(model))
            questions = {field: [next(windows) for _ in range(n)] for field, n in self.num_questions.items()}
            rows = probe_windows(
                rows_by_domain,
                max_length=min(self._max_length(model), given.max_row_tokens or sys.maxsize),
                vocabulary=model_vocabulary(model),
            )
        if given.batch_tokens is None and self.settings.batch_tokens is not None:
            given = dataclasses.replace(given, batch_tokens=self.settings.batch_tokens)
        return measure(
            model,
            questions,
            rows,
            given,
            optimizer=optimizer,
            logits_of=self.settings.logits_of,
            rank=rank,
            world_size=world_size,
        )

    def _score(
        self,
        model: Model,
        windows: list[ScoredWindow],
        *,
        rank: int,
        world_size: int,
        sums: FloatArray,
        times: FloatArray,
        progress: bool,
    ) -> None:
        """Scores this rank's share of the pairs into `sums` and `times`, both (N,)."""
        scorer = Scorer(model, self.settings.logits_of)
        batches, num_calls = plan_batches(
            [entry.num_inputs for entry in windows],
            rank=rank,
            world_size=world_size,
            batch_size=self.settings.batch_size,
            batch_tokens=self.settings.batch_tokens or BATCH_TOKENS.get(scorer.device.type, DEFAULT_BATCH_TOKENS),
        )
        hidden = not (progress and self.settings.progress and get_rank() == 0)
        results = []
        with (
            scoring_state(model),
            # With disable=None tqdm is silent where standard error is no terminal: a log would get a bar per decision.
            tqdm(
                total=sum(map(len, batches)), desc="environment", unit="q", leave=False, disable=hidden or None
            ) as bar,
        ):
            scorer.take_over_output_layer(windows)
            for batch in batches:
                # Keep results on the device: copying each batch's result would stall the GPU.
                results.append(scorer.log_probs([windows[pair] for pair in batch]))
                bar.update(len(batch))
            for _ in range(num_calls - len(batches)):
                scorer.log_probs([min(windows, key=lambda entry: entry.num_inputs)])
        for batch, log_probs in zip(batches, results, strict=True):
            if log_probs is None:
                continue
            counts = [windows[pair].num_scored for pair in batch]
            values = log_probs.double().cpu().numpy()
            sums[batch] = np.add.reduceat(values, np.cumsum([0, *counts[:-1]]))
            times[batch] = 1.0

    def _windows_for(self, model: Model) -> list[ScoredWindow]:
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
        return self._windows[max_length]

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

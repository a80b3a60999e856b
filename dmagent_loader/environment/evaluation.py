"""`Evaluation`: log-likelihoods of token windows, grouped by field, under a model; the same on all ranks."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dmagent_loader._distributed import all_reduce_sum, get_rank, get_world_size, is_active, together
from dmagent_loader.environment.batches import BATCH_TOKENS, DEFAULT_BATCH_TOKENS, ScoredWindow, plan_batches
from dmagent_loader.environment.scoring import Model, Scorer, scoring_state, unwrap
from dmagent_loader.environment.settings import EnvironmentSettings
from dmagent_loader.errors import ConfigurationError, FeedbackError, InfluenceError
from dmagent_loader.mixture.simplex import FloatArray, IntArray

logger = logging.getLogger(__name__)

_STEP = "evaluating the model"


class LogLikelihoods(NamedTuple):
    """Log-likelihoods of the N pairs of one field.

    Attributes:
        sums: (N,), log-probability summed over each pair's scored tokens, in nats.
        num_tokens: (N,), number of scored tokens of each pair.
    """

    sums: FloatArray
    num_tokens: IntArray


class Evaluation(ABC):
    """The evaluation of a model, common to `Environment` (questions) and `RowEnvironment` (training rows).

    Under torch.distributed, the windows are split over the ranks; all ranks call `evaluate` and get the same numbers.

    Args:
        settings: Settings of the calls.

    Attributes:
        settings: As given.
        last_seconds: Duration of the last evaluation.
        total_seconds: Duration of all evaluations.
    """

    _kind = "windows"
    """Noun for the windows, for messages."""

    def __init__(self, settings: EnvironmentSettings) -> None:
        self.settings = settings
        self.last_seconds = self.total_seconds = 0.0

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """Field names, in the given order."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all that affects the result; equal means comparable."""

    @abstractmethod
    def _windows_of(self, model: Model) -> Mapping[str, list[ScoredWindow]]:
        """Field -> windows that fit the model."""

    @abstractmethod
    def _origin(self, field: str, number: int) -> str:
        """Name of a window, for messages."""

    @abstractmethod
    def _summary(self, feedback: Mapping[str, float]) -> str:
        """The result of an evaluation, for the log."""

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
        feedback: dict[str, float] = {}
        for field, (sums, num_tokens) in self.log_likelihoods(
            model, rank=rank, world_size=world_size, progress=progress
        ).items():
            bad = np.flatnonzero(~np.isfinite(sums))
            if len(bad):
                raise FeedbackError(
                    f"log-probabilities are not finite for {len(bad)} of {len(sums)} {self._kind} of field {field!r} "
                    f"(first: {self._origin(field, int(bad[0]))}), so there is no feedback: the model has probably "
                    "diverged or its logits overflow; check its loss, and evaluate in bfloat16 or float32"
                )
            feedback[field] = float(np.mean(sums / num_tokens))
        logger.info("%s in %.2f s", self._summary(feedback), self.last_seconds)
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
        # Losses that one rank cannot measure are unavailable on all ranks, and the run continues without them.
        with together(_STEP, shared=(InfluenceError,)) as facts:
            if is_active():
                facts[f"the environment's {self._kind}"] = self.fingerprint
            by_field = self._windows_of(model)
            windows = [window for listed in by_field.values() for window in listed]
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
                f"no rank returned log-probabilities for {int((counted == 0).sum())} of {len(counted)} {self._kind}: "
                "call evaluate on every rank that holds the model's output, with its data-parallel rank and world size"
            )
        means = scored / counted
        self.last_seconds = time.perf_counter() - started
        self.total_seconds += self.last_seconds
        num_tokens = np.array([entry.num_scored for entry in windows], dtype=np.int64)
        results, start = {}, 0
        for field, listed in by_field.items():
            part = slice(start, start + len(listed))
            results[field] = LogLikelihoods(means[part], num_tokens[part])
            start += len(listed)
        return results

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

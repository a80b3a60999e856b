"""Three methods for the same quantity: the first-order gain of each field from a step on each domain.

With a_d the gradient of a domain's mean log-probability per token, q_k that of field k's feedback, and P the diagonal
preconditioner of the optimizer, an update on domain d with learning rate lr adds lr P a_d to the parameters, and field
k gains lr <q_k, P a_d>. P is symmetric, so this is also the gain of the domain from a step along the field's gradient:

- `gradient`: one backward pass over each domain's rows, and the inner product with P q_k (Xie et al., DoGE; Xia et al.,
  LESS, which uses projected gradients).
- `ghost`: the same inner products for each row, computed layer by layer in one backward pass over batches that mix rows
  of all domains (see `environment.ghost`). One value per row; not for sharded models.
- `reverse`: one virtual step along P q_k, then forward passes over all rows. The score is their gain over the start,
  divided by the length of the step. It needs no backward pass over rows and gives one value per row.

Shapes: K fields, G groups of questions, D domains, n groups of a domain's rows, N parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dmagent_loader._distributed import Interrupted, all_reduce_sum, interruptible, sum_over_ranks, together
from dmagent_loader.environment import ghost
from dmagent_loader.environment.batches import ScoredWindow, plan_batches
from dmagent_loader.environment.gradients import Flat, Parameters, displaceable, is_lack_of_memory, products
from dmagent_loader.environment.scoring import Scorer
from dmagent_loader.errors import InfluenceError
from dmagent_loader.mixture.simplex import FloatArray

logger = logging.getLogger(__name__)

T = TypeVar("T")
Windows = Sequence[ScoredWindow]

MIXED_BATCHES = 8
"""Number of mixed batches whose mean squared gradient replaces the optimizer's second moments if they are unknown."""

MIXED_ROWS = 64
"""Total number of rows in these batches, or one per domain if that is more."""

TRIAL_LENGTHS = (9, 6, 7)
"""Tokens of the rows on which the ghost method is compared with whole gradients."""

STEP = "measuring the influence of the domains"


class ShortOfMemory(Exception):
    """A rank ran out of memory. Every rank raises this error, so that all take the same fallback."""


SHARED = (InfluenceError, ShortOfMemory)
"""Errors that all ranks raise if one does."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Inputs of one measurement, and the gradients and scores computed from them.

    Args:
        parameters: Parameters of the model.
        scorer: Scorer of the model.
        questions: For each of K fields, G groups of questions.
        rows: Domain -> rows.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel ranks.
        batch_tokens: Maximum number of tokens per model call.
        damping: Constant added to the denominators of P, as a fraction of their root mean square.
    """

    parameters: Parameters
    scorer: Scorer
    questions: Sequence[Sequence[Windows]]
    rows: Mapping[str, Windows]
    rank: int
    world_size: int
    batch_tokens: int
    damping: float

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs an action without collectives other than the model's, then lets all ranks agree on whether it succeeded.

        Raises:
            ShortOfMemory: Any rank ran out of memory.
            InfluenceError: Any rank raised it.
            RankError: Another rank failed for another reason.
        """
        result: list[T] = []
        sharded = self.parameters.is_sharded and self.world_size > 1
        with together(STEP, shared=SHARED):
            try:
                with interruptible(STEP) if sharded else nullcontext():
                    result.append(action())
            except Exception as error:
                self.parameters.reset_after_failure()
                if is_lack_of_memory(error):
                    raise ShortOfMemory(str(error)) from error
                if not isinstance(error, Interrupted):
                    raise
        return result[0]

    def backward(self, windows: Windows, *, shared: bool) -> None:
        """Adds the gradient of the mean over windows of their mean log-probability to ``.grad``.

        Args:
            windows: One or more windows.
            shared: Whether all ranks call this with the same windows and each computes its share; otherwise this rank
                computes all of them.
        """
        rank, world_size = (self.rank, self.world_size) if shared else (0, 1)
        batches, num_calls = self.batches(windows, rank, world_size)
        # Sharded gradients are averaged over ranks, but each rank computes a share of one sum.
        factor = (self.world_size if self.parameters.is_sharded else 1) / len(windows)
        for batch in batches:
            chosen = [windows[number] for number in batch]
            torch.autograd.backward(self._means(chosen).sum() * factor)
        for _ in range(num_calls - len(batches)):
            torch.autograd.backward(self._means([min(windows, key=_length)]).sum() * 0.0)

    def backward_each(self, windows: Windows) -> None:
        """Runs one batch and the sum over windows of their mean log-probabilities backward."""
        torch.autograd.backward(self._means(windows).sum())

    def gradient(self, windows: Windows, *, shared: bool) -> Flat:
        """The gradient that `backward` adds; without sharding, only that of this rank's windows."""
        self.parameters.clear_gradient()
        self.backward(windows, shared=shared)
        found = self.parameters.gradient()
        self.parameters.clear_gradient()
        return found

    @torch.no_grad()
    def log_probs(self, windows: Windows) -> FloatArray:
        """Mean log-probability per scored token of each window, in nats: (windows,), 0 for other ranks' windows."""
        values = np.zeros(len(windows))
        batches, num_calls = self.batches(windows, self.rank, self.world_size)
        for batch in batches:
            values[batch] = self._means([windows[number] for number in batch]).double().cpu().numpy()
        for _ in range(num_calls - len(batches)):
            self._means([min(windows, key=_length)])
        return values

    def question_gradient(self, group: Windows) -> Flat:
        """Gradient of a group of questions: complete on every rank, or this rank's shards of it."""
        flat = self.on_all_ranks(lambda: self.gradient(group, shared=True))
        if not self.parameters.is_sharded and self.world_size > 1:
            sum_over_ranks(flat, STEP)
        return flat

    def root_mean_squares(self) -> Flat:
        """Root mean squared gradient over mixed batches of all domains, in place of Adam's second moments."""
        rows = interleaved(self.rows.values())[: max(MIXED_ROWS, len(self.rows))]
        count = min(MIXED_BATCHES, len(rows))
        batches = [rows[number::count] for number in range(count)]
        alone = self.parameters.is_sharded or self.world_size == 1
        mine = batches if alone else batches[self.rank :: self.world_size]

        def squares() -> Flat:
            total = [torch.zeros_like(part) for part in self._zeros()]
            for batch in mine:
                for sum_, part in zip(total, self.gradient(batch, shared=self.parameters.is_sharded), strict=True):
                    sum_.addcmul_(part, part)
            return total

        total = self.on_all_ranks(squares)
        if not self.parameters.is_sharded and self.world_size > 1:
            sum_over_ranks(total, STEP)
        return [part.div_(count).sqrt_() for part in total]

    def divided(self, flat: Flat, denominators: Flat) -> Flat:
        """Multiplies a gradient by P in place and returns it."""
        floor = self.damping * self.root_mean_square(denominators)
        for part, denominator in zip(flat, denominators, strict=True):
            part.div_(denominator + max(floor, 1e-30))
        return flat

    def root_mean_square(self, flat: Flat) -> float:
        """Root mean square over all parameters, including the shards of other ranks."""
        copies = self.parameters.copies()
        norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in flat]
        sums = [norm**2 / c for norm, c in zip(norms, copies, strict=True)]
        both = np.array([sum(sums), sum(part.numel() / c for part, c in zip(flat, copies, strict=True))])
        if self.parameters.is_sharded:
            both = all_reduce_sum(both, STEP)
        return float(np.sqrt(both[0] / both[1]))

    def _zeros(self) -> Flat:
        return [torch.zeros(t.numel(), dtype=torch.float32, device=t.device) for t in self.parameters.local()]

    def batches(self, windows: Windows, rank: int, world_size: int) -> tuple[list[list[int]], int]:
        """Numbers of this rank's windows for each call, and the number of calls of the busiest rank."""
        lengths = [_length(entry) for entry in windows]
        size = len(windows)
        return plan_batches(lengths, rank=rank, world_size=world_size, batch_size=size, batch_tokens=self.batch_tokens)

    def _means(self, windows: Windows) -> Tensor:
        found = self.scorer.log_probs(windows)
        if found is None:
            raise InfluenceError(
                "the model's output is on other ranks (pipeline parallelism), which hold different parameters, so "
                "gradients cannot be compared on any rank: use the policy 'question-topics'"
            )
        counts = [entry.num_scored for entry in windows]
        return torch.stack([part.mean() for part in torch.split(found, counts)])


def gradient_way(probe: Probe, denominators: Flat, row_groups: int) -> list[FloatArray]:
    """Inner products of P q_k with the gradient of each group of rows.

    Args:
        probe: Inputs of the measurement.
        denominators: Denominators of P, see `Probe.root_mean_squares`.
        row_groups: Maximum number of groups n that a domain's rows are split into.

    Returns:
        For each domain, (K, G, n), in nats per unit of learning rate.
    """
    shape = (len(probe.questions), len(probe.questions[0]))
    stacked = question_directions(probe, denominators)
    copies = probe.parameters.copies()
    items = [
        (domain, number, rows[number::count])
        for domain, rows in enumerate(probe.rows.values())
        for count in [min(row_groups, len(rows))]
        for number in range(count)
    ]

    def mine() -> FloatArray:
        values = np.zeros((len(items), shape[0] * shape[1]))
        for position, (_, _, rows) in enumerate(items):
            if probe.parameters.is_sharded or position % probe.world_size == probe.rank:
                gradient = probe.gradient(rows, shared=probe.parameters.is_sharded)
                values[position] = products(stacked, gradient, copies)
        return values

    values = probe.on_all_ranks(mine)
    if probe.world_size > 1:
        values = all_reduce_sum(values, STEP)
    return [
        np.stack([values[i] for i, item in enumerate(items) if item[0] == domain], axis=-1).reshape(*shape, -1)
        for domain in range(len(probe.rows))
    ]


def ghost_way(probe: Probe, denominators: Flat) -> list[FloatArray]:
    """Inner products of P q_k with the gradient of each row.

    Args:
        probe: Inputs of the measurement.
        denominators: Denominators of P, see `Probe.root_mean_squares`.

    Returns:
        For each domain, (K, G, n) with n its number of rows, in nats per unit of learning rate.

    Raises:
        NoRule: The method does not apply to this model.
    """
    if probe.parameters.is_sharded:
        raise ghost.NoRule("the parameters are sharded (FSDP 2), and a layer's direction would be too")
    rows = [row for listed in probe.rows.values() for row in listed]
    ends = np.cumsum([len(listed) for listed in probe.rows.values()])[:-1]
    probe.on_all_ranks(lambda: _check_ghost(probe, rows))
    recorder = ghost.Ghost(probe.parameters, question_directions(probe, denominators))
    shape = (len(probe.questions), len(probe.questions[0]))

    def mine() -> FloatArray:
        values = np.zeros((shape[0] * shape[1], len(rows)))
        for batch in probe.batches(rows, probe.rank, probe.world_size)[0]:
            chosen = [rows[number] for number in batch]
            found = recorder.products(lambda chosen=chosen: probe.backward_each(chosen), len(chosen))  # type: ignore[misc]
            for part in found:
                if part is not None:
                    values[:, batch] += part.double().cpu().numpy()
        return values

    values = probe.on_all_ranks(mine)
    if probe.world_size > 1:
        values = all_reduce_sum(values, STEP)
    return np.split(values.reshape(*shape, -1), ends, axis=-1)


def _check_ghost(probe: Probe, rows: Windows) -> None:
    """Compares the method with whole gradients on the beginnings of three rows, of different lengths if possible."""
    chosen = [rows[0], rows[len(rows) // 2], rows[-1]]
    tokens = [row.tokens[:length] for row, length in zip(chosen, TRIAL_LENGTHS, strict=True)]
    windows = [ScoredWindow(tokens=part, num_scored=len(part) - 1) for part in tokens]
    ghost.check(probe.parameters, lambda numbers: probe.backward_each([windows[n] for n in numbers]), len(windows))


def question_directions(probe: Probe, denominators: Flat) -> list[Tensor]:
    """P q_k of each group of questions: for each parameter, (K x G, values)."""
    groups = [group for listed in probe.questions for group in listed]
    stacked = probe.on_all_ranks(lambda: [part.new_empty(len(groups), part.numel()) for part in denominators])
    for number, group in enumerate(groups):
        for rows, part in zip(stacked, probe.divided(probe.question_gradient(group), denominators), strict=True):
            rows[number] = part
    return stacked


def reverse_way(probe: Probe, denominators: Flat, step: float) -> list[FloatArray]:
    """Gain of each row from a virtual step along P q_k, divided by the length of the step.

    Args:
        probe: Inputs of the measurement.
        denominators: Denominators of P, see `Probe.root_mean_squares`.
        step: Root mean square of the change of a parameter.

    Returns:
        For each domain, (K, G, n) with n its number of rows, in nats per unit of learning rate.
    """
    rows = [row for listed in probe.rows.values() for row in listed]
    ends = np.cumsum([len(listed) for listed in probe.rows.values()])[:-1]
    shape = (len(probe.questions), len(probe.questions[0]))
    gains = np.zeros((*shape, len(rows)))

    def scored() -> FloatArray:
        values = probe.on_all_ranks(lambda: probe.log_probs(rows))
        return all_reduce_sum(values, STEP) if probe.world_size > 1 else values

    saved = probe.on_all_ranks(lambda: [tensor.clone() for tensor in probe.parameters.local()])
    with displaceable(probe.parameters, saved) as move:
        start = scored()
        for k, groups in enumerate(probe.questions):
            for g, group in enumerate(groups):
                move(None, 0.0)
                direction = probe.divided(probe.question_gradient(group), denominators)
                size = probe.root_mean_square(direction)
                if size == 0:
                    continue  # The questions have no gradient: the influence is 0, and the step cannot be scaled.
                factor = step / size
                move(direction, factor)
                gains[k, g] = (scored() - start) / factor
    return np.split(gains, ends, axis=-1)


def interleaved(listed: Collection[Windows]) -> list[ScoredWindow]:
    """Rows in round-robin order over the domains, skipping domains that have run out."""
    return [rows[i] for i in range(max(map(len, listed))) for rows in listed if i < len(rows)]


def _length(entry: ScoredWindow) -> int:
    return entry.num_inputs

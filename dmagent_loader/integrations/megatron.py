"""Megatron-core: an external data iterator, the evaluation of a distributed model, and the run's state.

    mixing = MegatronMixing(sampler, environment, micro_batch_size=..., global_batch_size=..., max_length=...)
    mixing.begin(model)
    while not mixing.finished:
        forward_backward(data_iterator=mixing.data_iterator, model=model, ...)
        optimizer.step()
        mixing.step_end(model, iteration=...)

Every process of the run builds the sampler with ``**data_parallel_ranks()``, and makes the same calls. Rank 0 of the
run decides, and all ranks receive the decision: tensor- and pipeline-parallel peers hold the same mix. Only processes
that take micro-batches from the data iterator read shards.

Shapes: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from dmagent_loader import _distributed as distributed
from dmagent_loader.data_loader import MixingDataLoader
from dmagent_loader.environment import Environment, Evaluation
from dmagent_loader.errors import ConfigurationError, InfluenceError, StateError, require_extra
from dmagent_loader.integrations.mixing import Mixing, Report
from dmagent_loader.sampler import AgentWeightedSampler

require_extra("megatron.core", "megatron")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

__all__ = ["MegatronMixing", "MicroBatches", "ParallelModel", "Ranks", "data_parallel_ranks", "evaluate"]

logger = logging.getLogger(__name__)


class Ranks(TypedDict):
    """Data-parallel rank of a process, and the number of such ranks."""

    rank: int
    world_size: int


def data_parallel_ranks() -> Ranks:
    """Rank and world size for `AgentWeightedSampler`; processes that hold parts of one model have the same rank.

    Raises:
        ConfigurationError: Megatron's process groups do not exist yet.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigurationError(
            "Megatron's process groups do not exist yet, so the data-parallel rank is unknown: call "
            "parallel_state.initialize_model_parallel() before you build the sampler"
        )
    return {
        "rank": parallel_state.get_data_parallel_rank(),
        "world_size": parallel_state.get_data_parallel_world_size(),
    }


class MicroBatches(Iterator[dict[str, Any]]):
    """The external data iterator: micro-batches of this data-parallel rank, until the plan ends.

    All processes that hold parts of one model may read it, and get the same micro-batches; or one may read it and send
    them on.

    Args:
        sampler: Sampler whose transform returns the inputs of the forward step, for example `transforms.ShiftedTokens`.
        micro_batch_size: B.
        samples_per_step: Samples of one data-parallel rank in one global batch.
        num_workers: Data workers.
        prefetch_factor: Micro-batches that each worker prepares ahead.
    """

    def __init__(
        self,
        sampler: AgentWeightedSampler,
        *,
        micro_batch_size: int,
        samples_per_step: int,
        num_workers: int,
        prefetch_factor: int | None,
    ) -> None:
        self._loader = MixingDataLoader(
            sampler,
            micro_batch_size,
            samples_per_step=samples_per_step,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            by_trainer=True,
        )
        self._batches: Iterator[dict[str, Any]] | None = None
        self._samples_per_batch = micro_batch_size * sampler.world_size
        self.begin = 0
        """Samples consumed over all data-parallel ranks before the first micro-batch."""
        self.given = 0
        """Samples over all data-parallel ranks in the micro-batches delivered to this process."""

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches)
        self.given += self._samples_per_batch
        return batch


class ParallelModel(nn.Module):
    """A Megatron-core model for `Environment`, scored by its own parallel forward on whichever rank holds its output.

    Logits are never gathered: the model's vocabulary-parallel cross entropy returns one loss for each token.

    Args:
        chunks: Model of this process, as Megatron's schedules take it: one module, or several with an interleaved
            pipeline; wrapped in Megatron's DistributedDataParallel or not.
        max_length: Largest number of tokens that the model reads.

    Raises:
        ConfigurationError: The run is context-parallel.
    """

    def __init__(self, chunks: nn.Module | Sequence[nn.Module], *, max_length: int) -> None:
        super().__init__()
        if parallel_state.get_context_parallel_world_size() > 1:
            raise ConfigurationError(
                "the evaluation of a context-parallel model is not supported, because each rank would see only a part "
                "of each question: set context_parallel_size to 1"
            )
        modules = list(chunks) if isinstance(chunks, Sequence) else [chunks]
        self.chunks = nn.ModuleList(modules)
        self.config = SimpleNamespace(max_position_embeddings=max_length, vocab_size=_vocabulary(modules))
        # Sequence-parallel regions are split evenly over the tensor-parallel ranks.
        parallel = get_model_config(modules[0])
        self._multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1

    def token_log_probs(self, input_ids: Tensor, following: Tensor) -> Tensor | None:
        """Log-probability of each following token, in nats.

        Args:
            input_ids: (B, T), padded on the right.
            following: (B, T), the token after each input token.

        Returns:
            (B, T); None on ranks without the last stage of the pipeline.
        """
        rows, tokens = input_ids.shape
        # One micro-batch per stage keeps a pipeline busy; an interleaved pipeline requires it.
        num_microbatches = parallel_state.get_pipeline_model_parallel_world_size()
        size = -(-rows // num_microbatches)
        padding = (0, -tokens % self._multiple, 0, size * num_microbatches - rows)
        inputs = torch.split(nn.functional.pad(input_ids, padding), size)
        labels = torch.split(nn.functional.pad(following, padding), size)
        length = tokens + padding[1]
        positions = torch.arange(length, device=input_ids.device).expand(size, length)

        def forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: nn.Module) -> tuple[Tensor, Any]:
            batch, targets = next(batches)
            # No mask: the model is causal and padding is on the right.
            return model(batch, positions, None, labels=targets), lambda losses, non_loss_data: losses

        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(list(zip(inputs, labels, strict=True))) for _ in self.chunks],
            model=list(self.chunks),
            num_microbatches=num_microbatches,
            seq_length=length,
            micro_batch_size=size,
            decoder_seq_length=length,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not losses:
            return None
        return -torch.cat(list(losses))[:rows, :tokens]


def evaluate(environment: Evaluation, model: nn.Module | Sequence[nn.Module], *, max_length: int) -> dict[str, float]:
    """The feedback of a Megatron-core model, the same on every rank; all ranks call it together.

    Questions are dealt over the data-parallel ranks; processes that hold parts of one model work on the same questions.

    Args:
        environment: Question sets.
        model: See `ParallelModel`.
        max_length: Largest number of tokens that the model reads.
    """
    return environment.evaluate(ParallelModel(model, max_length=max_length), **data_parallel_ranks())


class MegatronMixing:
    """The sampler, the environment and the data iterator of one Megatron-core run.

    Decisions are made between optimizer steps. Without data workers nothing is prefetched, so a new mix takes effect
    with the next step.

    Args:
        sampler: Sampler, built with ``**data_parallel_ranks()`` on every process.
        environment: Question sets; None: no decisions, mixes change by `set_mix` only.
        micro_batch_size: Rows of one forward step.
        global_batch_size: Rows of one optimizer step over all data-parallel ranks; the run ends with the last whole
            step.
        max_length: Largest number of tokens that the model reads.
        train_iters: Optimizer steps of the run, if the data last that long; None: unknown.
        num_workers: Torch data workers of each process that reads.
        prefetch_factor: Micro-batches that each worker prepares ahead; None: 2.
        writer: Object with a method ``add_scalar(name, value, step)``, such as a TensorBoard writer; None on processes
            that do not write.

    Raises:
        ConfigurationError: The batch sizes do not fit, or the ranks of the sampler are not the data-parallel ranks.

    Attributes:
        data_iterator: Argument for ``forward_backward_func(data_iterator=...)``.
    """

    def __init__(
        self,
        sampler: AgentWeightedSampler,
        environment: Environment | None = None,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        max_length: int,
        train_iters: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        writer: Any = None,
    ) -> None:
        ranks = data_parallel_ranks()
        if (sampler.rank, sampler.world_size) != (ranks["rank"], ranks["world_size"]):
            raise ConfigurationError(
                f"the sampler reads as rank {sampler.rank} of {sampler.world_size}, but this process is data-parallel "
                f"rank {ranks['rank']} of {ranks['world_size']}: build it with AgentWeightedSampler(..., "
                "**data_parallel_ranks())"
            )
        if global_batch_size % (micro_batch_size * sampler.world_size):
            raise ConfigurationError(
                f"a global batch of {global_batch_size} rows is not a multiple of {micro_batch_size} rows on each of "
                f"{sampler.world_size} data-parallel ranks: choose batch sizes that fit"
            )
        self.sampler, self.environment, self.writer, self.train_iters = sampler, environment, writer, train_iters
        self._mixing = Mixing(sampler, environment)
        self.micro_batch_size, self.global_batch_size, self.max_length = micro_batch_size, global_batch_size, max_length
        self.data_iterator = MicroBatches(
            sampler,
            micro_batch_size=micro_batch_size,
            samples_per_step=global_batch_size // sampler.world_size,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
        )

    @property
    def consumed(self) -> int:
        """Samples that training has consumed over all data-parallel ranks since the run began."""
        return self._mixing.consumed

    @property
    def finished(self) -> bool:
        """Whether there is no further whole global batch."""
        return self._mixing.finished()

    def begin(
        self,
        model: nn.Module | Sequence[nn.Module] | None,
        *,
        iteration: int = 0,
        base_feedback: Mapping[str, float] | None = None,
    ) -> Report | None:
        """Begins or resumes training: evaluates the base model, if that was not done before.

        Call it before the first step, and after a checkpoint was loaded.

        Args:
            model: See `ParallelModel`; None: nothing is evaluated now.
            iteration: Optimizer steps so far.
            base_feedback: Feedback of the base model, if it was measured before; None: it is measured now. Without a
                `model`, the losses of the base model by domain stay unknown (see `LOSSES`).

        Returns:
            The metrics, if a decision was due.
        """
        self._mixing.begin(samples=None if self.train_iters is None else self.train_iters * self.global_batch_size)
        if not self.data_iterator.given:
            self.data_iterator.begin = self._mixing.consumed
        known = model is not None or base_feedback is not None
        report = self._maybe_reweight(model, iteration, base_feedback) if known else None
        self._mixing.announce()
        return report

    def step_end(
        self, model: nn.Module | Sequence[nn.Module], *, iteration: int, consumed: int | None = None
    ) -> Report | None:
        """Counts consumed samples after an optimizer step, and decides if a decision is due.

        All processes call it together, after each step.

        Args:
            model: See `ParallelModel`.
            iteration: Optimizer steps so far.
            consumed: Samples consumed over all ranks since the run began; None: the samples of all delivered
                micro-batches, counted on the process that took the most.

        Returns:
            The metrics, if a decision was due.
        """
        delivered = self.data_iterator.begin + distributed.all_reduce_max(self.data_iterator.given, "counting samples")
        self._mixing.consumed = delivered if consumed is None else consumed
        report = self._maybe_reweight(model, iteration)
        if self.train_iters is not None and iteration >= self.train_iters:
            self._mixing.end()
        return report

    def state_dict(self, *, consumed: int | None = None) -> dict[str, str]:
        """State for Megatron's distributed checkpoint: one text entry of its common state, the same on every rank.

        The state belongs in the checkpoint, not in a file beside it: then both are complete, or neither is.

        Args:
            consumed: Samples consumed over all ranks since the run began; None: as last reported to `step_end`.
        """
        if consumed is not None:
            self._mixing.consumed = consumed
        return {"json": json.dumps(self._mixing.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a saved state, before the first micro-batch. The number of ranks may differ from then.

        Args:
            state: Return value of `state_dict`.

        Raises:
            StateError: The state cannot be read, belongs to other shards or another seed, or is loaded too late.
        """
        if self.data_iterator.given:
            raise StateError(
                f"micro-batches of {self.data_iterator.given} samples were delivered before the state was loaded: load "
                "it before the first step"
            )
        try:
            restored = json.loads(state["json"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StateError(f"the checkpoint's state of MegatronMixing cannot be read: {error!r}") from error
        self._mixing.load_state_dict(restored)
        self.data_iterator.begin = self._mixing.consumed

    def _maybe_reweight(
        self,
        model: nn.Module | Sequence[nn.Module] | None,
        iteration: int,
        known: Mapping[str, float] | None = None,
    ) -> Report | None:
        if self._mixing.finished() or not self._mixing.due():
            return None

        def measure(environment: Evaluation) -> Mapping[str, float]:
            if known is not None and environment is self._mixing.environment:
                return known
            if model is None:
                raise InfluenceError(
                    "the base model was evaluated in an earlier process, which did not measure the domains' losses, so "
                    "those before the second decision take their place"
                )
            return evaluate(environment, model, max_length=self.max_length)

        report = self._mixing.reweight(measure)
        for name, value in report.full.items() if self.writer is not None else ():
            self.writer.add_scalar(name, value, iteration)
        return report


def _vocabulary(chunks: Sequence[nn.Module]) -> int | None:
    """Vocabulary size of the model; None if no chunk states it."""
    for chunk in chunks:
        for module in chunk.modules():
            size = getattr(module, "vocab_size", None)
            if isinstance(size, int):
                return size
    return None

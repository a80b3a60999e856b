"""`MixingDataLoader`: a torch `DataLoader` that describes itself to the sampler."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from dmagent_loader._loading.batches import Batches, Conversion
from dmagent_loader._loading.config import DEFAULT_PREFETCH_FACTOR, LoaderSettings
from dmagent_loader._loading.lazy import TAGS, Columns
from dmagent_loader._loading.slots import Empty, Slots
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.transforms import PACKED_MEMBER, packed_tokens
from dmagent_loader.transforms.packed import OfRows, PackedBatch, of_packed_rows, packed_batch

__all__ = ["MixingDataLoader"]

_built = itertools.count()

_SLOTS_IN_USE = 2
"""Batches of a worker that the trainer may hold at a time without making it fall back to new shared memory."""


class MixingDataLoader(DataLoader[Any]):
    """Batches of one rank, with a bounded delay of new mixes.

    The sampler has to know batch size, data workers and prefetch: batches are dealt to workers in the order of the run,
    and a new mix can start only at samples that no worker has fetched. This loader describes itself to the sampler, and
    is otherwise a plain torch `DataLoader`.

    Packed rows are read and converted a batch at a time if the sampler has no `transform`, or
    `transforms.packed_tokens` or `transforms.ShiftedTokens`, and no `num_threads`; the batches are the same. The
    fastest are those of `transforms.collate_packed`, and of ``transform=packed_tokens`` without a `collate_fn`.

    Args:
        sampler: Sampler to read.
        batch_size: Samples of one rank in one batch; None: single samples, not batched.
        samples_per_step: Samples of one rank in one step, for example micro-batch size times gradient accumulation; the
            run is cut to whole steps. With 1, the last batch may be smaller.
        num_workers: Data workers of this process. Without workers a new mix takes effect with the next batch.
        prefetch_factor: Batches that each worker prepares ahead; None: 2 with workers.
        collate_fn: Function from samples to a batch; None: torch's default.
        generator: Source of the workers' base seed; None: a separate one, because drawing from the global random state
            would change the training of the model.
        pin_memory: See `torch.utils.data.DataLoader`.
        persistent_workers: See `torch.utils.data.DataLoader`; only with workers.
        by_trainer: Whether an integration counts consumed samples and decides; set by integrations.
        **settings: Further arguments of `torch.utils.data.DataLoader`.

    Raises:
        ConfigurationError: `sampler` is not a sampler, a size is below 1, or an argument contradicts the order of a
            run.

    Example:
        >>> import tempfile
        >>> from dmagent_loader.testing import write_toy_shards
        >>> shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20})
        >>> sampler = AgentWeightedSampler(shards, samples_per_reweight=10)
        >>> [len(batch["__key__"]) for batch in MixingDataLoader(sampler, batch_size=4)][:2]
        [4, 4]
    """

    def __init__(
        self,
        sampler: AgentWeightedSampler,
        batch_size: int | None = 1,
        *,
        samples_per_step: int = 1,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        generator: torch.Generator | None = None,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        by_trainer: bool = False,
        **settings: Any,
    ) -> None:
        if not isinstance(sampler, AgentWeightedSampler):
            raise ConfigurationError(f"sampler is {shown(sampler)}; it must be an AgentWeightedSampler")
        refused = sorted({"shuffle", "sampler", "batch_sampler", "drop_last", "in_order"} & set(settings))
        if refused:
            raise ConfigurationError(
                f"MixingDataLoader does not take {', '.join(refused)}, because the sampler's plan fixes the order of "
                "samples: leave it out; to end the run with a whole step, pass samples_per_step="
            )
        samples = 1 if batch_size is None else whole_number("batch_size", batch_size, least=1)
        factor = DEFAULT_PREFETCH_FACTOR if prefetch_factor is None else prefetch_factor
        factor = whole_number("prefetch_factor", factor, least=1)
        self._description = LoaderSettings(
            batch_size=samples,
            samples_per_fetch=samples,
            samples_per_step=whole_number("samples_per_step", samples_per_step, least=1),
            prefetch_factor=factor,
            by_trainer=by_trainer,
        )
        num_workers = whole_number("num_workers", num_workers, least=0)
        self._mixed = sampler
        self._of_batches: DataLoader[Any] | None = None
        sampler.bind(self._description)
        super().__init__(
            sampler,
            batch_size=batch_size,
            collate_fn=collate_fn,
            num_workers=num_workers,
            prefetch_factor=factor if num_workers else None,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers and num_workers > 0,
            generator=_own_generator(sampler) if generator is None else generator,
            **settings,
        )

    def __iter__(self) -> Any:
        """A new pass. Another loader may have described itself to the sampler since: this one does so again.

        A description by an integration stays, which knows more than the loader.
        """
        bound, own = self._mixed.loader, self._description
        same = (bound.batch_size, bound.samples_per_fetch, bound.samples_per_step, bound.prefetch_factor) == (
            (own.batch_size, own.samples_per_fetch, own.samples_per_step, own.prefetch_factor)
        )
        if not same and (own.by_trainer or not bound.by_trainer):
            self._mixed.bind(own)
        if self.batch_size is None:
            return super().__iter__()
        conversion = _conversion(self._mixed, self.collate_fn)
        if not self.num_workers and not self.pin_memory:
            reads_batches = conversion.of_columns is not None
            return iter(Batches(self._mixed, self.batch_size, conversion)) if reads_batches else super().__iter__()
        if self._of_batches is None or not self.persistent_workers:
            slots = None
            if self.num_workers:
                slots = Slots(self.num_workers, (self.prefetch_factor or DEFAULT_PREFETCH_FACTOR) + _SLOTS_IN_USE)
            self._of_batches = DataLoader(
                Batches(self._mixed, self.batch_size, conversion, slots),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                timeout=self.timeout,
                worker_init_fn=self.worker_init_fn,
                multiprocessing_context=self.multiprocessing_context,
                generator=self.generator,
                prefetch_factor=self.prefetch_factor,
                persistent_workers=self.persistent_workers,
                pin_memory_device=self.pin_memory_device,
            )
        return iter(self._of_batches)


def _conversion(sampler: AgentWeightedSampler, collate: Callable[[list[Any]], Any]) -> Conversion:
    """How the samples of a batch become the batch, and whether packed rows can be read together for it."""
    transform = sampler.transform
    form = packed_batch(collate) if transform is None else None
    if transform is packed_tokens and collate is default_collate:
        form = PackedBatch()
    if form is not None:
        return Conversion(collate, form.of_columns)
    of_rows = of_packed_rows(transform)
    if of_rows is None and (transform is not None or sampler.is_lazy):
        return Conversion(collate)
    return Conversion(collate, _Samples(of_rows), to_samples=True)


@dataclass(frozen=True)
class _Samples:
    """Samples of rows that were read together.

    Attributes:
        of_rows: The transform of packed rows, (B, T); None: rows stay as they are stored.
    """

    of_rows: OfRows | None

    def __call__(self, columns: Columns, _: Empty) -> list[dict[str, Any]]:
        if self.of_rows is None:
            values: list[Any] = [list(columns.values)]
            names: tuple[str, ...] = (PACKED_MEMBER,)
        else:
            converted = self.of_rows(columns.values)
            names, values = tuple(converted), [value.unbind() for value in converted.values()]
        tags = (columns.index.tolist(), columns.keys(), columns.domain)
        return [dict(zip((*TAGS, *names), row, strict=True)) for row in zip(*tags, *values, strict=True)]


def _unchanged(batch: Any) -> Any:
    """A batch that is complete: torch's own function would convert arrays in it."""
    return batch


def _own_generator(sampler: AgentWeightedSampler) -> torch.Generator:
    """A generator with a different seed for each loader of a process: it identifies workers of older loaders."""
    return torch.Generator().manual_seed((sampler.plan.seed * 1_000_003 + next(_built)) & 0x7FFF_FFFF_FFFF_FFFF)

"""Settings of the reader, chosen by the user, and the description of the loader that reads the sampler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.sharding import StreamKind
from dmagent_loader.mixture.shuffle import Shuffle, shared_shuffle
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.shards.checks import OnDamage
from dmagent_loader.shards.tar import KeyEnd

DEFAULT_PREFETCH_FACTOR = 2
"""torch's default: batches that each data worker prepares ahead."""


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """Settings of the reader.

    Args:
        batch_size: Batch size of a bare `DataLoader` with data workers, which cannot report it. `MixingDataLoader` and
            the integrations report theirs.
        prefetch_factor: Batches that each data worker of such a loader prepares ahead. It bounds the delay of a new
            mix.
        shuffle_window: Rows of a domain that are shuffled together. Larger windows move neighbouring rows of a shard
            further apart; 1 does not shuffle at all. None: 8,192 to 65,536, fewer for more domains, so that rows are
            read quickly (``docs/order.md``); 65,536 with ``own_shards=True``. A resumed run keeps its own.
        shuffle_shards: Shards of a domain that are in use at a time, over all ranks. 1 reads one after the other. None:
            1 to 64, as with the window; 64 with ``own_shards=True``. A resumed run keeps its own.
        own_shards: Whether each rank reads nearly always from the same shards, its own part of them, so that a node
            fetches a fraction of the data. It makes each rank plan the whole global batch. None: if any shard is
            remote, and `shuffle_shards` is 8 or more. The same on all ranks. Use True if several nodes read from a
            store.
        num_threads: Threads of one iterator that read row by row, for files on a slow network mount: use 2 or more
            there. 0 reads each row when it is needed, and packed rows a batch at a time: handing a cached row from
            thread to thread costs more than reading it. Remote shards are fetched in blocks, without these threads.
        num_rows: Rows requested from the threads at a time; one such block is read while another is delivered.
        max_bad_rows: Bound of `on_bad_row="skip"`: the largest number of replaced samples of the run, or, as a float
            from 0 to 1, the largest share of the rows of each domain (after its first pass: of its samples). More are
            an error. Each rank counts its own, and those of the others up to the last decision.
        on_damage: ``"raise"`` refuses damaged shards; ``"skip"`` uses their whole rows and logs the loss.
        key_ends_at: The dot of a file name in a shard at which the key of its row ends. ``"first-dot"`` is webdataset's
            rule; ``"last-dot"`` is for base names with dots in them, such as ``arxiv.2101.00000.txt``.
        cache_dir: Folder of the shard indexes; None: ``$DMAGENT_CACHE_DIR``, else ``~/.cache/dmagent_loader``.
        block_cache_dir: Folder for blocks of remote shards, shared by all processes of a node. None: a folder of the
            user on the disk for temporary files (``$TMPDIR``). Use a local disk with locks.
        block_cache_bytes: Limit on the size of that folder. None: half of the free space, at most 64 GiB. 0: no
            folder; every process keeps its own blocks in memory.
        indexes: Indexes in the store, with which shards need not be read through at a start. True: those beside remote
            shards, as ``dmagent shard`` and ``dmagent index --beside`` write them. A path or URL: those that ``dmagent
            index --to`` wrote there, for local shards, too. False: none; every shard is read through once, which shows
            damage before training rather than when its row is read.
        progress: Whether to show a progress bar while shards are indexed.

    Raises:
        ConfigurationError: A value is invalid.
    """

    batch_size: int | None = None
    prefetch_factor: int = DEFAULT_PREFETCH_FACTOR
    shuffle_window: int | None = None
    shuffle_shards: int | None = None
    own_shards: bool | None = None
    num_threads: int = 0
    num_rows: int = 512
    max_bad_rows: float = 0.01
    on_damage: OnDamage = "raise"
    key_ends_at: KeyEnd = "first-dot"
    cache_dir: str | os.PathLike[str] | None = None
    block_cache_dir: str | os.PathLike[str] | None = None
    block_cache_bytes: int | None = None
    indexes: str | os.PathLike[str] | bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size, least=1)
        whole_number("prefetch_factor", self.prefetch_factor, least=1)
        for name in ("shuffle_window", "shuffle_shards"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        whole_number("num_rows", self.num_rows, least=1)
        whole_number("num_threads", self.num_threads, least=0)
        if self.block_cache_dir is not None and not isinstance(self.block_cache_dir, (str, os.PathLike)):
            raise ConfigurationError(f"block_cache_dir is {shown(self.block_cache_dir)}; it must be a path, or None")
        if self.block_cache_bytes is not None:
            whole_number("block_cache_bytes", self.block_cache_bytes, least=0)
        if isinstance(self.max_bad_rows, float):
            if not 0 <= self.max_bad_rows <= 1:
                raise ConfigurationError(
                    f"max_bad_rows is {self.max_bad_rows}; it must be a number of samples, or a share from 0.0 to 1.0"
                )
        else:
            whole_number("max_bad_rows", self.max_bad_rows, least=0)
        if not isinstance(self.indexes, (str, os.PathLike, bool)):
            raise ConfigurationError(f"indexes is {shown(self.indexes)}; it must be a path, a URL, True or False")
        if self.on_damage not in get_args(OnDamage):
            raise ConfigurationError(f"on_damage is {shown(self.on_damage)}; choose one of {list(get_args(OnDamage))}")
        if self.key_ends_at not in get_args(KeyEnd):
            raise ConfigurationError(
                f"key_ends_at is {shown(self.key_ends_at)}; choose one of {list(get_args(KeyEnd))}"
            )

    def shuffle(self, shard_rows: Sequence[IntArray]) -> Shuffle:
        """The shuffle with which a run begins.

        Args:
            shard_rows: For each domain, the rows of each of its shards.
        """
        if not self.own_shards:
            return shared_shuffle(shard_rows, self.shuffle_window, self.shuffle_shards)
        default = Shuffle()
        return Shuffle(window=self.shuffle_window or default.window, shards=self.shuffle_shards or default.shards)


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Description of the loader that reads a sampler.

    Args:
        kind: ``"sharded"``: each rank reads its share. ``"whole"``: the trainer splits one stream among its ranks.
        batch_size: Samples of one rank in one batch.
        samples_per_fetch: Consecutive samples that the loader takes from the stream of one worker at a time; None:
            unknown.
        samples_per_step: Samples of one rank in one step, for example an optimizer step; the run is cut to whole steps.
        prefetch_factor: Batches that each worker prepares ahead.
        prefetched_samples: Upper bound on the samples, over all ranks, that the loader and its workers hold beyond
            those consumed; 0: derived from the workers.
        by_trainer: Whether an integration reads, counts and decides. Checks meant for hand-written loops are then off.
    """

    kind: StreamKind = "sharded"
    batch_size: int = 1
    samples_per_fetch: int | None = None
    samples_per_step: int = 1
    prefetch_factor: int = DEFAULT_PREFETCH_FACTOR
    prefetched_samples: int = 0
    by_trainer: bool = False

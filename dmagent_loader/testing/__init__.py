"""Helpers for tests of code that uses this package: toy shards, and a check that a run resumes exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmagent_loader.shards.writing.packing import PACKED_MEMBER, encode_npy
from dmagent_loader.shards.writing.tar_writer import TarWriter

__all__ = ["ResumableSampler", "assert_same_after_resume", "sample_ids", "write_toy_shards"]


class ResumableSampler(Protocol):
    """The part of `AgentWeightedSampler` that the checks use."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yields the samples after the last one that was delivered."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """The state of the run as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Resumes after a state."""
        ...


def write_toy_shards(
    folder: str | os.PathLike[str],
    rows: Mapping[str, int],
    *,
    rows_per_shard: int = 16,
    tokens: int | None = None,
    vocabulary: int = 64,
) -> dict[str, list[str]]:
    """Writes small WebDataset shards; equal arguments give equal bytes.

    Args:
        folder: Folder of the shards; each domain gets a folder of its own in it.
        rows: Domain -> number of rows.
        rows_per_shard: Rows of each shard.
        tokens: Length of packed token rows (member ``input_ids.npy``, uint16); None: text rows (member ``txt``).
        vocabulary: Number of different token ids.

    Returns:
        Domain -> paths of its shards: the `shards` argument of `AgentWeightedSampler`.
    """
    shards: dict[str, list[str]] = {}
    for number, (domain, count) in enumerate(rows.items()):
        home = Path(folder, *domain.split("/"))
        home.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        for shard, first in enumerate(range(0, max(count, 1), rows_per_shard)):
            writer = TarWriter(home / f"toy-{shard:06d}.tar")
            for row in range(first, min(first + rows_per_shard, count)):
                if tokens is None:
                    members = {"txt": f"row {row} of {domain}".encode()}
                else:
                    members = {PACKED_MEMBER: encode_npy(generator.integers(0, vocabulary, tokens, dtype=np.uint16))}
                writer.add(f"{domain.replace('/', '_')}_{row:06d}", members)
            writer.close(durable=False)
        shards[domain] = sorted(str(path) for path in home.glob("toy-*.tar"))
    return shards


def sample_ids(samples: Iterable[Mapping[str, Any]], count: int | None = None) -> list[tuple[int, str, str]]:
    """(global index, domain, key) of the next samples of a sampler.

    Args:
        samples: The sampler.
        count: Number of samples; None: all that are left.
    """
    return [(sample["__index__"], sample["__domain__"], sample["__key__"]) for sample in islice(samples, count)]


def assert_same_after_resume(build: Callable[[], ResumableSampler], num_samples: int, *, every: int = 1) -> None:
    """Asserts that a restored run delivers exactly the samples that were left when its state was taken.

    Args:
        build: Builds the same sampler at every call. Changes of its mix must follow from the sampler itself.
        num_samples: Samples of the run.
        every: Samples between two states from which the run is restored.

    Raises:
        AssertionError: A restored run differs; the message names the sample.
    """
    whole = sample_ids(build(), num_samples)
    running = build()
    stream = iter(running)
    for done in range(num_samples):
        if done % every == 0:
            state = json.loads(json.dumps(running.state_dict()))
            resumed = build()
            resumed.load_state_dict(state)
            left = sample_ids(resumed, num_samples - done)
            if left != whole[done:]:
                first = next(i for i, (a, b) in enumerate(zip(left, whole[done:], strict=False)) if a != b)
                raise AssertionError(
                    f"restored after {done} samples, sample {done + first} is {left[first]} instead of "
                    f"{whole[done + first]}"
                )
        next(stream)

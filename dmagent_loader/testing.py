"""Helpers for tests of code that uses this package: small shards, a small environment, a check of exact resumption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import webdataset

if TYPE_CHECKING:
    from dmagent_loader.sampler import AgentWeightedSampler


def write_toy_shards(
    folder: str | os.PathLike[str],
    rows: Mapping[str, int],
    *,
    rows_per_shard: int = 16,
    tokens: int | None = None,
    vocabulary: int = 64,
) -> dict[str, list[str]]:
    """Writes WebDataset shards with `webdataset.ShardWriter`.

    Args:
        folder: Where; each domain gets a folder of its own.
        rows: Domain -> number of rows.
        rows_per_shard: Rows of each shard.
        tokens: Length of packed token rows (member ``input_ids.npy``, uint16); None: text rows (member ``txt``).
        vocabulary: Token ids are below this.

    Returns:
        Domain -> list of paths: the `shards` argument of `AgentWeightedSampler`.
    """
    shards: dict[str, list[str]] = {}
    for number, (domain, count) in enumerate(rows.items()):
        home = Path(folder, *domain.split("/"))
        home.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        with webdataset.ShardWriter(str(home / "toy-%06d.tar"), maxcount=rows_per_shard, verbose=0) as writer:
            for row in range(count):
                sample: dict[str, Any] = {"__key__": f"{domain.replace('/', '_')}_{row:06d}"}
                if tokens is None:
                    sample["txt"] = f"row {row} of {domain}"
                else:
                    sample["input_ids.npy"] = generator.integers(0, vocabulary, tokens, dtype=np.uint16)
                writer.write(sample)
        shards[domain] = sorted(str(path) for path in home.glob("toy-*.tar"))
    return shards


def sample_ids(sampler: AgentWeightedSampler, count: int | None = None) -> list[tuple[int, str, str]]:
    """(global index, domain, key) of the next `count` samples, or of all that are left."""
    stream = iter(sampler) if count is None else islice(sampler, count)
    return [(sample["__index__"], sample["__domain__"], sample["__key__"]) for sample in stream]


def assert_same_after_resume(build: Callable[[], AgentWeightedSampler], num_samples: int, *, every: int = 1) -> None:
    """Asserts that a run restored at any sample gives exactly the samples that were left.

    Args:
        build: Builds the same sampler each time; whatever changes its mix must follow from the sampler itself.
        num_samples: Samples of the run.
        every: Restore after each so many samples.

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

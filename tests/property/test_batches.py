"""Batches that are read together are those that torch's loader makes of samples that are read one by one."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from reading import quiet
from torch.utils.data import DataLoader, default_collate

from benchmarks.far_server import FarServer
from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader.errors import DMAgentError
from dmagent_loader.transforms import ShiftedTokens, collate_packed, packed_tokens

LENGTH, END = 8, 3
DOMAINS = ("source/a", "source/b", "target/x")
KINDS = ("whole", "whole", "whole", "longer", "two members", "other type", "no array", "text")
"""Rows of a shard that are not like most: one of each kind in some shards."""


def rows_as_a_list(samples: list[Any]) -> list[dict[str, Any]]:
    """A collate function of the user: the samples themselves."""
    return [dict(sample) for sample in samples]


def masked(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A collate function that writes into its samples."""
    for sample in samples:
        if "labels" in sample:
            sample["labels"] = sample["labels"].clone()
            sample["labels"][:2] = -100
    return default_collate(samples)


LOADERS: list[tuple[Any, Callable[..., Any] | None]] = [
    (None, collate_packed),
    (None, functools.partial(collate_packed, labels=False, keys=False)),
    (None, functools.partial(collate_packed, narrow=True)),
    (None, functools.partial(collate_packed, end_token=END)),
    (None, None),
    (None, rows_as_a_list),
    (packed_tokens, None),
    (packed_tokens, masked),
    (packed_tokens, rows_as_a_list),
    (ShiftedTokens(length=LENGTH), None),
    (ShiftedTokens(length=LENGTH), rows_as_a_list),
    (ShiftedTokens(length=LENGTH - 1), None),
    (ShiftedTokens(length=LENGTH - 2), None),
]


def write_shards(folder: Path, kinds: dict[str, list[str]]) -> dict[str, list[str]]:
    """Shards of 6 packed rows, one of which is of the kind given for the shard."""
    random, shards = np.random.default_rng(0), {}
    for domain, listed in kinds.items():
        for number, kind in enumerate(listed):
            path = folder / f"{domain.replace('/', '-')}-{number}.tar"
            shards.setdefault(domain, []).append(str(path))
            with webdataset.TarWriter(str(path)) as writer:
                for row in range(6):
                    tokens = random.integers(0, 60, LENGTH + (row == 2 and kind == "longer")).astype(np.uint16)
                    members: dict[str, Any] = {"input_ids.npy": tokens}
                    if row == 2 and kind == "two members":
                        members["document_lengths.npy"] = np.array([3, LENGTH - 3], np.uint32)
                    if row == 2 and kind == "other type":
                        members["input_ids.npy"] = tokens.astype(np.int16)
                    if row == 2 and kind == "no array":
                        members["input_ids.npy"] = bytes(128 + 2 * LENGTH)
                    if row == 2 and kind == "text":
                        members = {"txt": "words"}
                    writer.write({"__key__": f"{domain}-{number}-{row}", **members})
    return shards


@contextlib.contextmanager
def served(folder: str) -> Iterator[FarServer]:
    server = FarServer(Path(folder), latency=0, rate=1e9)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def damage(path: str) -> None:
    """Changes a token of the second row, after its shard was indexed."""
    data = Path(path).read_bytes()
    at = data.index(b"\x93NUMPY", data.index(b"\x93NUMPY") + 1) + 128
    Path(path).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def plain(value: Any) -> Any:
    """A batch as values that can be compared: tensors with their type and contents."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist(), value.flags.writeable
    if isinstance(value, dict):
        return [(name, plain(inner)) for name, inner in value.items()]
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def record(sampler: AgentWeightedSampler, loader: MixingDataLoader, changes: dict[int, Any], one_by_one: bool) -> list:
    """What happens in a run: batches, errors, and where the run then stands."""

    def begin() -> Iterator[Any]:
        return DataLoader.__iter__(loader) if one_by_one else iter(loader)

    found: list[Any] = []
    batches = begin()
    for number in range(24):
        try:
            batch = next(batches, None)
            found.append(plain(batch))
            if batch is None:
                break
        except (DMAgentError, LookupError, ValueError, RuntimeError, TypeError) as error:
            found.append((type(error).__name__, str(error)))
        change = changes.get(number)
        found.append((sampler.frontier, sampler.bad_rows, sampler.achieved()))
        if change == "resume":
            sampler.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
            batches = begin()
        elif change == "again":
            batches = begin()
        elif change is not None:
            sampler.set_mix(dict(zip(DOMAINS, change, strict=True)))
    return [*found, sampler.state_dict()]


@settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_batch_is_the_same_whether_its_rows_are_read_together_or_one_by_one(data):
    draw = data.draw
    transform, collate = draw(st.sampled_from(LOADERS))
    kinds = {domain: draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)) for domain in DOMAINS}
    mixes = st.sampled_from([(0.5, 0.25, 0.25), (0.0, 0.0, 1.0), (0.1, 0.9, 0.0), (1.0, 0.0, 0.0)])
    changes = draw(st.dictionaries(st.integers(0, 9), st.sampled_from(["resume", "again"]) | mixes, max_size=5))
    rank, world_size = draw(st.sampled_from([(0, 1), (0, 3), (2, 3)]))
    batch_size, samples_per_step = draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 4]))
    options: dict[str, Any] = {
        "transform": transform,
        "on_bad_row": draw(st.sampled_from(["raise", "skip"])),
        "exhausted": draw(st.sampled_from([None, "repeat", "redistribute", "error"])),
        "decode": draw(st.sampled_from(["default", "default", "lazy"])),
        "seed": draw(st.integers(0, 3)),
    }
    remote = draw(st.sampled_from([(), (), DOMAINS[1:], DOMAINS]))
    reading = ReadingConfig(
        shuffle_window=draw(st.sampled_from([1, 5, 8192])),
        max_bad_rows=draw(st.sampled_from([0.5, 1])),
        block_cache_bytes=draw(st.sampled_from([None, 0])),
    )
    damaged = draw(st.none() | st.tuples(st.sampled_from(DOMAINS), st.just(0)))
    early = draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder, served(folder) as server:
        files = write_shards(Path(folder), kinds)
        shards = {
            domain: [server.url(Path(path).name) for path in paths] if domain in remote else paths
            for domain, paths in files.items()
        }
        runs = []
        for number in range(2):
            own = replace(quiet(folder, reading), block_cache_dir=Path(folder) / f"blocks-{number}")
            sampler = AgentWeightedSampler(shards, reading=own, rank=rank, world_size=world_size, **options)
            loader = MixingDataLoader(sampler, batch_size, samples_per_step=samples_per_step, collate_fn=collate)
            if early:  # the tables of the shards are in memory when their files change
                for domain, rows in enumerate(sampler.collection.num_rows):
                    assert rows
                    sampler.collection.missing_members(domain, 0, 0)
            runs.append((sampler, loader))
        if damaged is not None:
            damage(files[damaged[0]][damaged[1]])
        together, one_by_one = (record(*run, changes, single) for run, single in zip(runs, (False, True), strict=True))
        for sampler, _ in runs:
            sampler._feed.cursor.stream._close()  # it would go on fetching
    event(f"errors: {any(isinstance(one, tuple) and isinstance(one[0], str) for one in together)}")
    for one, other in zip(together, one_by_one, strict=True):
        assert one == other

"""Ranks that open the same shards: each reads its part, all see the same, and none waits longer than a heartbeat.

The group's timeout is a few seconds, the shards lie in a store on loopback that takes longer than that to send them.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.far_server import counts, serving
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader._loading import meeting
from dmagent_loader._loading.meeting import work_together
from dmagent_loader.shards.index.peers import Peers

pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")

TIMEOUT_SECONDS = 4.0
SHARDS, ROWS, ROW_BYTES = 6, 100, 10_000


def write_shards(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"s-{number:03d}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for row in range(ROWS):
                info = tarfile.TarInfo(f"{row:03d}.txt")
                info.size = ROW_BYTES
                tar.addfile(info, io.BytesIO(f"{number} {row} ".encode().ljust(ROW_BYTES, b"x")))
    return paths


def on_ranks(work: Callable[[int, Path], Any], folder: Path, size: int = 2) -> list[dict[str, Any]]:
    """What a function returns or raises on each rank of a group."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    group = Path(tempfile.mkdtemp(dir=folder)) / "group"  # with the file of an earlier group, ranks call dead ones
    ranks = [context.Process(target=_rank, args=(work, rank, size, folder, group, answers)) for rank in range(size)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=90) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(size)]


def _rank(work: Callable[[int, Path], Any], rank: int, size: int, folder: Path, group: Path, answers: Any) -> None:
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", f"file://{group}", rank=rank, world_size=size, timeout=timeout)
    try:
        answers.put((rank, {"result": work(rank, folder)}))
    except Exception as error:
        answers.put((rank, {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}))
    dist.destroy_process_group()


def opened(
    shards: str, cache: Path, *, then: Callable[[], object] = lambda: None, **reading: Any
) -> tuple[str, list[str]]:
    """The fingerprint of the shards, and keys of the first samples of this rank, which it reads after `then`."""
    config = ReadingConfig(cache_dir=cache, progress=False, num_threads=0, num_rows=1, **reading)
    sampler = AgentWeightedSampler({"source/a": shards}, samples_per_reweight=100, exhausted="repeat", reading=config)
    then()
    samples = [sample["txt"][:8] for sample, _ in zip(sampler, range(10), strict=False)]
    return sampler.collection.fingerprint, samples


@pytest.mark.parametrize("is_shared", [True, False], ids=["one cache", "a cache for each"])
def test_a_start_that_takes_longer_than_the_timeout_ends_no_run(tmp_path: Path, is_shared: bool) -> None:
    """Rank 0 alone indexed all shards while the others waited in a collective: a RankError after the timeout."""
    paths = write_shards(tmp_path / "store")
    size = paths[0].stat().st_size
    with serving(tmp_path / "store", rate=size / (1.5 * TIMEOUT_SECONDS)) as url:

        def work(rank: int, folder: Path) -> Any:
            sent: list[Any] = []

            def count() -> None:
                """What it took to index the shards: none of the ranks reads rows yet."""
                sent.append(counts(url))
                dist.barrier()

            cache = folder / ("cache" if is_shared else f"cache{rank}")
            return *opened(f"{url}/s-{{000..{SHARDS - 1:03d}}}.tar", cache, then=count), sent[0]

        ranks = on_ranks(work, tmp_path)
    assert all("error" not in rank for rank in ranks), ranks
    (first, ours, sent), (second, theirs, _) = (rank["result"] for rank in ranks)
    assert first == second
    assert not {*ours} & {*theirs}
    assert sent["bytes"]["GET .tar"] < 1.2 * SHARDS * size, "a shard was read through twice"
    assert sent["requests"]["HEAD .tar"] <= 2 * SHARDS, "one request for the version, one after the shard was read"


def test_known_shards_are_asked_for_by_one_rank(tmp_path: Path) -> None:
    write_shards(tmp_path / "store")
    with serving(tmp_path / "store", rate=0) as url:

        def work(rank: int, folder: Path) -> Any:
            return opened(f"{url}/s-{{000..{SHARDS - 1:03d}}}.tar", folder / "cache")

        on_ranks(work, tmp_path)
        before = counts(url)["requests"]["HEAD .tar"]
        on_ranks(work, tmp_path)
        assert counts(url)["requests"]["HEAD .tar"] - before == SHARDS


@pytest.mark.parametrize("damaged", [None, 0, 1])
def test_copies_on_the_disks_of_nodes_are_indexed_once_and_damage_of_one_is_found(
    tmp_path: Path, damaged: int | None
) -> None:
    """Each rank has a disk and a cache of its own; one copy is cut."""
    for rank in range(2):
        write_shards(tmp_path / f"disk{rank}")
    if damaged is not None:
        path = tmp_path / f"disk{damaged}" / "s-003.tar"
        path.write_bytes(path.read_bytes()[:500_000])

    def work(rank: int, folder: Path) -> Any:
        return opened(f"{folder}/disk{rank}/s-*.tar", folder / f"cache{rank}")

    ranks = on_ranks(work, tmp_path)
    if damaged is None:
        assert ranks[0]["result"][0] == ranks[1]["result"][0]
        entries = [len(list((tmp_path / f"cache{rank}" / "index").iterdir())) for rank in range(2)]
        assert entries == [SHARDS, SHARDS]
        return
    assert ranks[damaged]["error"] == "DamagedShardError", ranks
    assert "s-003.tar" in ranks[damaged]["message"]
    assert ranks[1 - damaged]["error"] == "RankError"


def test_a_copy_with_other_rows_is_not_taken_for_the_one_that_another_node_indexed(tmp_path: Path) -> None:
    """Of the same size: a few rows are compared before the index of another node is used."""
    for rank in range(2):
        write_shards(tmp_path / f"disk{rank}")
    path = tmp_path / "disk1" / "s-000.tar"
    path.write_bytes(path.read_bytes().replace(b"0 0 ", b"0 1 "))

    def work(rank: int, folder: Path) -> Any:
        return opened(f"{folder}/disk{rank}/s-*.tar", folder / f"cache{rank}")

    ranks = on_ranks(work, tmp_path)
    assert [rank["error"] for rank in ranks] == ["RankError"] * 2
    assert "differ in the contents of the shards" in ranks[0]["message"]


def test_a_cache_that_one_node_has_serves_the_others(tmp_path: Path) -> None:
    write_shards(tmp_path / "store")
    with serving(tmp_path / "store", rate=0) as url:
        shards = f"{url}/s-{{000..{SHARDS - 1:03d}}}.tar"

        def alone(rank: int, folder: Path) -> Any:
            return opened(shards, folder / "cache1")

        def work(rank: int, folder: Path) -> Any:
            return opened(shards, folder / f"cache{rank}")

        on_ranks(alone, tmp_path, size=1)
        before = counts(url)["bytes"]["GET .tar"]
        ranks = on_ranks(work, tmp_path)
        assert ranks[0]["result"][0] == ranks[1]["result"][0]
        assert counts(url)["bytes"]["GET .tar"] - before < 50 * ROW_BYTES


def test_ranks_with_other_lists_do_not_take_over_each_other_s_indexes(tmp_path: Path) -> None:
    for rank in range(2):
        write_shards(tmp_path / f"disk{rank}")
    (tmp_path / "disk1" / "s-005.tar").unlink()

    def work(rank: int, folder: Path) -> Any:
        return opened(f"{folder}/disk{rank}/s-*.tar", folder / "cache")

    ranks = on_ranks(work, tmp_path)
    assert [rank["error"] for rank in ranks] == ["RankError"] * 2
    assert "differ in the shards of 'source/a' (rank 0: 6 shards" in ranks[0]["message"]


def test_a_rank_with_other_settings_of_indexes_opens_the_same_shards(tmp_path: Path) -> None:
    """One looks for indexes in the store, the other does not: they do not wait for each other without end."""
    write_shards(tmp_path / "disk")

    def work(rank: int, folder: Path) -> Any:
        return opened(f"{folder}/disk/s-*.tar", folder / f"cache{rank}", indexes=rank == 0)

    ranks = on_ranks(work, tmp_path)
    assert ranks[0]["result"][0] == ranks[1]["result"][0]


def test_values_of_any_size_reach_all_ranks_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_BYTES_PER_BROADCAST", 1000)

    def together(peers: Peers) -> Any:
        rounds = [None, b"", bytes([peers.rank]) * 5000, peers.rank if peers.rank else None, {"a": [peers.rank]}]
        return [peers.gather(value) for value in rounds]

    ranks = on_ranks(lambda rank, folder: work_together("a test", together), tmp_path, size=3)
    expected = [
        [None] * 3,
        [b""] * 3,
        [bytes([rank]) * 5000 for rank in range(3)],
        [None, 1, 2],
        [{"a": [rank]} for rank in range(3)],
    ]
    assert [rank.get("result") for rank in ranks] == [expected] * 3, json.dumps(ranks, default=str)


def test_an_error_of_one_rank_ends_the_work_of_the_others(tmp_path: Path) -> None:
    def together(peers: Peers) -> Any:
        if peers.rank == 1:
            raise ValueError("no")
        return peers.gather("waits for rank 1")

    ranks = on_ranks(lambda rank, folder: work_together("a test", together), tmp_path)
    assert [rank["error"] for rank in ranks] == ["RankError", "ValueError"]
    assert "a test failed on 1 of 2 ranks; rank 1: ValueError: no" in ranks[0]["message"]

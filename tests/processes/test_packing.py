"""Packing on the fly in data workers and in several ranks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY, environment, python
from reading import quiet
from text_shards import byte_tokenizer, random_documents, write_documents

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, PackText
from dmagent_loader.transforms import collate_packed

RANK = """
import json, sys, time
from datetime import timedelta
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from reading import quiet
from text_shards import byte_tokenizer
from dmagent_loader import AgentWeightedSampler, PackText
from dmagent_loader._loading import count_tokens
from dmagent_loader.errors import RankError, ShardError
from dmagent_loader.shards.packed import counts
from dmagent_loader.shards.packed.encoder import DocumentEncoder

dist.init_process_group("gloo", timeout=timedelta(seconds=4 if sys.argv[4] == "slow" else 600))
counts.PIECE_DOCUMENTS, count_tokens.ROUND_SECONDS = 7, 0  # shards are divided, and each batch is exchanged
tokens, tokenised = DocumentEncoder.tokens, []
DocumentEncoder.tokens = lambda self, rows: tokenised.append(len(rows)) or tokens(self, rows)
rank, (folder, other, cache) = dist.get_rank(), sys.argv[2:]
length = 24 - (rank == int(other))
if cache == "fails" and rank == 1:
    DocumentEncoder.tokens = lambda self, rows: (_ for _ in ()).throw(ShardError("the disk is gone"))
if cache == "slow" and rank == 1:
    once = DocumentEncoder.tokens
    DocumentEncoder.tokens = lambda self, rows: (time.sleep(0 if tokenised else 8), once(self, rows))[1]
report = {}
try:
    sampler = AgentWeightedSampler(json.load(open(folder + "/shards.json")), pack=PackText(byte_tokenizer(), length),
                                   reading=quiet(f"{folder}/{cache.format(rank)}"), exhausted="repeat")
    report["counted"], report["fingerprint"] = sum(tokenised), sampler.collection.fingerprint
    report["rows"] = [[s["__index__"], s["input_ids.npy"].tolist()] for s, _ in zip(sampler, range(20))]
except (ShardError, RankError) as error:
    report["error"] = str(error)
json.dump(report, open(f"{folder}/rank{rank}.json", "w"))
dist.barrier(); sys.stdout.flush()
import os; os._exit(0)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    texts = {name: [random_documents(10 * n + s, 30, 60) for s in range(2)] for n, name in enumerate("ab")}
    folder = tmp_path_factory.mktemp("text")
    return write_documents(folder, {f"source/{name}": of_domain for name, of_domain in texts.items()})


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers_read_the_same_rows(shards, tmp_path, start):
    def batches(workers: int) -> torch.Tensor:
        sampler = AgentWeightedSampler(
            shards, pack=PackText(byte_tokenizer(), 24), reading=quiet(tmp_path), exhausted="stop"
        )
        context = {"multiprocessing_context": start} if workers else {}
        loader = MixingDataLoader(sampler, batch_size=4, num_workers=workers, collate_fn=collate_packed, **context)
        return torch.cat([batch["input_ids"] for batch in loader])

    assert torch.equal(batches(0), batches(2))


def ranks(folder: Path, shards: dict[str, list[str]], *, other: int = -1, cache: str = "cache") -> list[dict[str, Any]]:
    """The reports of two ranks.

    Args:
        folder: Folder of the run.
        shards: Domain -> shards.
        other: Rank that packs in another way.
        cache: Name of the cache folder; ``{}`` stands for the rank.
    """
    (folder / "shards.json").write_text(json.dumps(shards))
    (folder / "rank.py").write_text(RANK)
    command = [*python(2), str(folder / "rank.py"), str(REPOSITORY / "tests"), str(folder), str(other), cache]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("cache", ["cache", "cache{}", "shards.json/cache"])
def test_ranks_share_the_counting_and_the_rows(shards, tmp_path, cache):
    """With one cache, with a cache of each node, and without one: 4 shards of 30 documents, dealt in pieces of 7."""
    reports = ranks(tmp_path, shards, cache=cache)
    assert [report["counted"] for report in reports] == [4 * 14 + 2 * 2, 4 * 14 + 2 * 2]
    alone = AgentWeightedSampler(
        shards, pack=PackText(byte_tokenizer(), 24), reading=quiet(tmp_path / "alone"), exhausted="repeat"
    )
    assert {report["fingerprint"] for report in reports} == {alone.collection.fingerprint}
    whole = [[s["__index__"], s["input_ids.npy"].tolist()] for s, _ in zip(alone, range(40), strict=False)]
    assert sorted(reports[0]["rows"] + reports[1]["rows"]) == whole


def test_a_node_without_counts_makes_its_share_and_gets_the_others(shards, tmp_path):
    AgentWeightedSampler(shards, pack=PackText(byte_tokenizer(), 24), reading=quiet(tmp_path / "cache0"))
    reports = ranks(tmp_path, shards, cache="cache{}")
    assert [report["counted"] for report in reports] == [0, 60]
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]


def test_a_rank_that_packs_in_another_way_is_named(shards, tmp_path):
    reports = ranks(tmp_path, shards, other=1)
    for report in reports:
        assert "the ranks differ in the packing (rank 0: rows of 24 tokens" in report["error"]


def test_a_rank_that_fails_while_it_counts_ends_all(shards, tmp_path):
    first, second = ranks(tmp_path, shards, cache="fails")
    assert second["error"] == "the disk is gone"
    assert "counting tokens failed on 1 of 2 ranks; rank 1: ShardError: the disk is gone" in first["error"]


def test_documents_that_take_longer_than_the_timeout_end_no_run(shards, tmp_path):
    """Eight seconds for the first documents of one rank, and a process group that waits for four."""
    first, second = ranks(tmp_path, shards, cache="slow")
    assert first["fingerprint"] == second["fingerprint"]

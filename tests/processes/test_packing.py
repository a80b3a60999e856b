"""Packing on the fly in data workers and in several ranks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY, environment, python
from reading import quiet
from text_shards import byte_tokenizer, random_documents, write_documents

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, PackText
from dmagent_loader.transforms import collate_packed

RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from reading import quiet
from text_shards import byte_tokenizer
from dmagent_loader import AgentWeightedSampler, PackText
from dmagent_loader.shards.packed.encoder import DocumentEncoder

dist.init_process_group("gloo")
tokens, tokenised = DocumentEncoder.tokens, []
DocumentEncoder.tokens = lambda self, rows: tokenised.append(len(rows)) or tokens(self, rows)
length = 24 - (dist.get_rank() == int(sys.argv[3]))
sampler = AgentWeightedSampler(json.load(open(sys.argv[2] + "/shards.json")), pack=PackText(byte_tokenizer(), length),
                               reading=quiet(sys.argv[2] + "/cache"), exhausted="repeat")
counted = sum(tokenised)
rows = [[s["__index__"], s["input_ids.npy"].tolist()] for s, _ in zip(sampler, range(20))]
json.dump({"counted": counted, "rows": rows}, open(f"{sys.argv[2]}/rank{dist.get_rank()}.json", "w"))
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


def ranks(folder: Path, shards: dict[str, list[str]], other: int = -1) -> subprocess.CompletedProcess[str]:
    """Two ranks; `other`: the rank that packs in another way."""
    (folder / "shards.json").write_text(json.dumps(shards))
    (folder / "rank.py").write_text(RANK)
    command = [*python(2), str(folder / "rank.py"), str(REPOSITORY / "tests"), str(folder), str(other)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


def test_ranks_count_tokens_once_and_share_the_rows(shards, tmp_path):
    finished = ranks(tmp_path, shards)
    assert finished.returncode == 0, finished.stderr
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [report["counted"] for report in reports] == [120, 0]
    alone = AgentWeightedSampler(
        shards, pack=PackText(byte_tokenizer(), 24), reading=quiet(tmp_path / "cache"), exhausted="repeat"
    )
    whole = [[s["__index__"], s["input_ids.npy"].tolist()] for s, _ in zip(alone, range(40), strict=False)]
    assert sorted(reports[0]["rows"] + reports[1]["rows"]) == whole


def test_a_rank_that_packs_in_another_way_is_named(shards, tmp_path):
    finished = ranks(tmp_path, shards, other=1)
    assert finished.returncode != 0
    assert "the ranks differ in the packing (rank 0: rows of 24 tokens" in finished.stderr

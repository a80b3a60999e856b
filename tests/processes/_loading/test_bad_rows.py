"""Bad rows met by data workers and on other ranks: the same replacements, and every one counted once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import environment, python
from shard_fixtures import rewritten

from dmagent_loader.testing import write_toy_shards

BAD = ("source_web_000003", "source_web_000007", "target_math_000020")

PROGRAM = """
import json, os, sys
import torch.distributed as dist
from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader.policies import StaticPolicy


def ids(samples):
    return [(sample["__index__"], sample["__domain__"], sample["__key__"]) for sample in samples]


if __name__ == "__main__":
    folder, method, workers = sys.argv[1:]
    with open(f"{folder}/shards.json") as file:
        shards = json.load(file)
    dist.init_process_group("gloo")
    sampler = AgentWeightedSampler(
        shards,
        policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}),
        samples_per_reweight=64,
        on_bad_row="skip",
        exhausted="repeat",
        reading=ReadingConfig(cache_dir=f"{folder}/cache", progress=False, max_bad_rows=0.2),
    )
    workers = int(workers)
    loader = MixingDataLoader(
        sampler,
        batch_size=4,
        num_workers=workers,
        multiprocessing_context=method if workers else None,
        persistent_workers=True,
        collate_fn=ids,
    )
    sampler.reweight({"general": -1.0}, consumed=0)
    taken, consumed = [], 0
    for _ in range(2):  # two passes over the loader: what was read ahead in the first is read again
        for batch in loader:
            taken += batch
            consumed += 8
            if sampler.reweight_due(consumed):
                sampler.reweight({"general": -1.0}, consumed=consumed)
            if consumed in (128, 320):
                break
    found = {"taken": taken, "bad": sampler.state_dict(consumed=consumed)["bad_rows"]}
    with open(f"{folder}/{method}{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


@pytest.mark.parametrize(("method", "workers"), [("none", 0), ("fork", 2), ("spawn", 2)])
def test_workers_and_ranks_replace_the_same_rows_and_count_each_once(tmp_path: Path, method: str, workers: int) -> None:
    shards = write_toy_shards(tmp_path / "shards", {"source/web": 60, "target/math": 60})
    for one in [*shards["source/web"], *shards["target/math"]]:
        rewritten(one, lambda key, members: {"txt": b"\xe9"} if key in BAD else members)
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [*python(2), str(tmp_path / "program.py"), str(tmp_path), method, str(workers)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[:3000]
    one, other = (json.loads((tmp_path / f"{method}{rank}.json").read_text()) for rank in range(2))
    assert one["bad"] == other["bad"]
    taken = sorted(one["taken"] + other["taken"])
    assert [index for index, _, _ in taken] == list(range(320))
    assert not {key for _, _, key in taken} & set(BAD)
    replaced = [index for index, _ in one["bad"]["replaced"]]
    assert sum(one["bad"]["counts"].values()) == len(replaced) == len(set(replaced))
    # In 320 samples of two domains of 60 rows: each bad row in two whole passes, and in the part of a third.
    assert 6 <= len(replaced) <= 9
    messages = done.stderr.count("takes its place")
    assert 3 <= messages <= (3 if workers == 0 else 6) * 2

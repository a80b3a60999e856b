"""One resumption in a new process, for `benchmarks/resume.py`: seconds of each step, as JSON.

python benchmarks/resume_child.py SHARDS.json STATE.json CACHE_DIR
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path


def main() -> None:
    shards, state, cache = (Path(word) for word in sys.argv[1:])
    times = [time.perf_counter()]
    from dmagent_loader import AgentWeightedSampler, ReadingConfig

    times.append(time.perf_counter())
    sampler = AgentWeightedSampler(
        json.loads(shards.read_text()),
        samples_per_reweight=64_000,
        exhausted="repeat",
        rank=0,
        world_size=1,
        reading=ReadingConfig(cache_dir=cache, progress=False),
    )
    times.append(time.perf_counter())
    sampler.load_state_dict(json.loads(state.read_text()))
    times.append(time.perf_counter())
    sample = next(iter(sampler))
    times.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(times)]
    names = ("import", "open", "load", "first")
    print(json.dumps({**dict(zip(names, steps, strict=True)), "index": sample["__index__"]}))


if __name__ == "__main__":
    main()

"""How other loaders find their place again; for `benchmarks/resume.py`.

Each function takes a number of consumed samples and returns the seconds from there to the next sample. Opening the data
is not counted for anybody. The text rows are left as bytes where a loader can leave them, which is its quickest way.

Run as a program by the Python of another environment, this file is the peer that lives there:

    PYTHON benchmarks/resume_peers.py streaming SETTINGS.json
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Shards = Mapping[str, Sequence[str]]
BATCH_SIZE = 16


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def webdataset_skipping(shards: Shards, consumed: int) -> float:
    """RandomMix has no state: a run goes through what it has consumed again."""
    import webdataset

    pipes = [webdataset.WebDataset(list(urls), shardshuffle=False).repeat() for urls in shards.values()]
    stream = iter(webdataset.RandomMix(pipes, [1 / len(pipes)] * len(pipes)))

    def resume() -> None:
        for _ in range(consumed):
            next(stream)
        next(stream)

    return timed(resume)


def _interleaved(shards: Shards) -> Any:
    import datasets

    datasets.disable_progress_bars()
    parts = [
        datasets.load_dataset("webdataset", data_files=list(urls), split="train", streaming=True)
        for urls in shards.values()
    ]
    shares = [1 / len(parts)] * len(parts)
    return datasets.interleave_datasets(parts, probabilities=shares, seed=0, stopping_strategy="all_exhausted")


def datasets_skipping(shards: Shards, consumed: int) -> float:
    """`IterableDataset.skip` on interleaved datasets."""
    dataset = _interleaved(shards)
    return timed(lambda: next(iter(dataset.skip(consumed))))


def datasets_state(shards: Shards, consumed: int) -> float:
    """`IterableDataset.load_state_dict`: finds the shard again and skips inside it. The mix cannot change."""
    dataset = _interleaved(shards)
    stream = iter(dataset)
    for _ in range(consumed):
        next(stream)
    state = dataset.state_dict()
    again = _interleaved(shards)

    def resume() -> None:
        again.load_state_dict(state)
        next(iter(again))

    return timed(resume)


def accelerate_skipping(shards: Shards, consumed: int) -> float:
    """What the Hugging Face Trainer does when it resumes: `accelerate.skip_first_batches` on its loader."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    loader = DataLoader(_interleaved(shards), batch_size=BATCH_SIZE, collate_fn=list)
    return timed(lambda: next(iter(skip_first_batches(loader, consumed // BATCH_SIZE))))


IN_THIS_ENVIRONMENT: dict[str, Callable[[Shards, int], float]] = {
    "webdataset RandomMix, skipping": webdataset_skipping,
    "datasets, skip()": datasets_skipping,
    "accelerate, skip_first_batches()": accelerate_skipping,
    "datasets, load_state_dict()": datasets_state,
}


def streaming(folder: Path, domains: int, rows: int, consumed: int) -> float:
    """mosaicml-streaming: `load_state_dict`, then the sample ids of the whole epoch are drawn and shuffled again.

    The epoch holds twice what was consumed: its `epoch_size` is fixed before the run, and so are the proportions.
    """
    from streaming import MDSWriter, Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for domain in range(domains):
            with MDSWriter(out=str(folder / str(domain)), columns={"txt": "str"}) as writer:
                for row in range(rows):
                    writer.write({"txt": f"row {row} of domain {domain}"})
        (folder / "complete").touch()
    clean_stale_shared_memory()
    streams = [Stream(local=str(folder / str(domain)), proportion=1 / domains) for domain in range(domains)]
    dataset = StreamingDataset(
        streams=streams, epoch_size=2 * consumed, shuffle=True, batch_size=BATCH_SIZE, num_canonical_nodes=1
    )
    state = {
        "epoch": 0,
        "sample_in_epoch": consumed,
        "num_canonical_nodes": 1,
        "shuffle_seed": dataset.shuffle_seed,
        "initial_physical_nodes": 1,
        "epoch_size": 2 * consumed,
    }

    def resume() -> None:
        dataset.load_state_dict(state)
        next(iter(dataset))

    return timed(resume)


def main() -> None:
    settings = json.loads(Path(sys.argv[2]).read_text())
    seconds = streaming(Path(settings["folder"]), settings["domains"], settings["rows"], settings["consumed"])
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()

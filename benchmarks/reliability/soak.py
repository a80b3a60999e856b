"""Draws very many samples from very many domains, with decisions, and writes down memory, open files and threads.

    python -m benchmarks.reliability.soak FOLDER [--samples 10_000_000] [--domains 1000] [--seconds 200]

The samples go through a torch DataLoader; the bundled agent decides every 64,000 of them on made-up feedback. A call
that runs out of time is continued by the next, from the run's own state file. In FOLDER: ``soak.json`` (points over
time, and a summary), ``soak.png``. At the end the samples of each domain are counted against the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader._files import write_atomically
from dmagent_loader._run.state import load_state, save_state
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import collate_packed

BATCH = 200
POINTS = 200
"""Measured over the whole run."""

MEGABYTE = 1 << 20
WARM_UP = 0.25
"""Part of a process's points that does not count: caches fill, torch and numpy allocate for the first time."""


def usage() -> dict[str, int]:
    """Of this process: resident bytes, open files, threads."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "rss": int(fields["VmRSS"].split()[0]) * 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def shards_of(folder: Path, domains: int, rows: int) -> dict[str, list[str]]:
    """Small shards, two for each domain; made once."""
    listing = folder / "shards.json"
    if not listing.exists():
        names = [f"{'source' if d % 2 == 0 else 'target'}/d{d:04}" for d in range(domains)]
        found = write_toy_shards(folder / "shards", dict.fromkeys(names, 2 * rows), rows_per_shard=rows, tokens=16)
        write_atomically(listing, json.dumps(found).encode())
    return json.loads(listing.read_text())


def soak(folder: Path, *, samples: int, domains: int, rows: int, per_reweight: int, seconds: float) -> dict[str, Any]:
    """Goes on with a run for so many seconds; returns all that is known of it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = shards_of(folder, domains, rows)
    sampler = AgentWeightedSampler(
        shards,
        agent="dmagent-rl",
        samples_per_reweight=per_reweight,
        seed=1,
        exhausted="repeat",
        reading=ReadingConfig(progress=False, cache_dir=folder / "cache"),
    )
    report = folder / "soak.json"
    state = folder / "state.json"
    saved = json.loads(report.read_text()) if report.exists() else {"processes": []}
    consumed, given = 0, np.zeros(domains, dtype=np.int64)
    if state.exists():
        found = load_state(state)
        sampler.load_state_dict(found["sampler"])
        consumed, given = found["sampler"]["consumed"], np.array(found["given"])
    place = {name: number for number, name in enumerate(sampler.space.names)}
    points: list[dict[str, Any]] = []
    if consumed < samples:
        saved["processes"].append(points)
    started, every = time.monotonic(), samples // POINTS
    measured = consumed

    def measure() -> None:
        points.append({"samples": consumed, "seconds": round(time.monotonic() - started, 2), **usage()})

    batches = iter(MixingDataLoader(sampler, batch_size=BATCH, collate_fn=collate_packed))
    while consumed < samples and time.monotonic() - started < seconds:
        if sampler.reweight_due(consumed):
            steps = len(sampler.measurements)
            sampler.reweight({"general": -3.0 + 0.1 * np.sin(steps), "math": -4.0 + 0.01 * steps}, consumed=consumed)
        batch = next(batches)
        indices = batch["__index__"].numpy()
        if not np.array_equal(indices, np.arange(consumed, consumed + BATCH)):
            raise SystemExit(f"sample {consumed} was due, and {indices[0]} came")
        np.add.at(given, [place[name] for name in batch["__domain__"]], 1)
        consumed += BATCH
        if consumed - measured >= every:
            measure()
            measured = consumed
    if consumed > measured:
        measure()
    if not np.array_equal(given, list(sampler.achieved(0, consumed).values())):
        raise SystemExit("the samples that came are not those of the plan")
    save_state(state, {"sampler": sampler.state_dict(consumed=consumed), "given": given.tolist()})
    saved["summary"] = {
        "samples": consumed,
        "domains": domains,
        "shards": 2 * domains,
        "decisions": len(sampler.measurements),
        "fewest_samples_of_a_domain": int(given.min()),
        "state_bytes": state.stat().st_size,
        **summary(saved["processes"]),
    }
    write_atomically(report, json.dumps(saved, indent=1).encode())
    return saved


def summary(processes: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Growth over all processes, each after its warm-up."""
    settled = [points[int(WARM_UP * len(points)) :] for points in processes]
    settled = [points for points in settled if len(points) > 2]
    growth = sum(points[-1]["rss"] - points[0]["rss"] for points in settled)
    drawn = sum(points[-1]["samples"] - points[0]["samples"] for points in settled)
    spans = [[max(p[what] for p in points) - min(p[what] for p in points) for points in settled] for what in USAGE]
    return {
        "processes": len(processes),
        "samples_after_warm_up": drawn,
        "rss_megabytes": round(max(p["rss"] for points in processes for p in points) / MEGABYTE, 1),
        "growth_megabytes_per_million": round(growth / MEGABYTE / max(drawn, 1) * 1e6, 3),
        **{f"most_{what}": max(p[what] for points in processes for p in points) for what in USAGE},
        **{f"{what}_come_and_go": max(span, default=0) for what, span in zip(USAGE, spans, strict=True)},
    }


USAGE = ("files", "threads")


def chart(saved: dict[str, Any]) -> bytes:
    """Memory, open files and threads over the samples."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained", facecolor="white")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[1.6, 1, 0.7])
    shown = (("rss", MEGABYTE, "resident memory, MB"), ("files", 1, "open files"), ("threads", 1, "threads"))
    for panel, (what, unit, label), color in zip(panels, shown, ("#0b3c6f", "#b3541e", "#00785a"), strict=True):
        for number, points in enumerate(saved["processes"]):
            drawn = [point["samples"] / 1e6 for point in points]
            panel.plot(drawn, [point[what] / unit for point in points], color=color, linewidth=1.6)
            if number:
                panel.axvline(drawn[0], color="#cccccc", linewidth=0.8, zorder=0)
        panel.set_ylabel(label)
        panel.set_ylim(0, 1.15 * max(point[what] / unit for points in saved["processes"] for point in points))
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    found = saved["summary"]
    panels[0].set_title(
        f"{found['samples'] / 1e6:g} million samples, {found['domains']:,} domains, {found['decisions']} decisions; "
        "a grey line is a new process",
        loc="left",
        fontsize=11,
    )
    panels[-1].set_xlabel("million samples")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=30, help="of each shard (default: %(default)s)")
    parser.add_argument("--per-reweight", type=int, default=64_000)
    parser.add_argument("--seconds", type=float, default=200.0, help="of this call (default: %(default)s)")
    args = parser.parse_args()
    saved = soak(
        args.folder,
        samples=args.samples,
        domains=args.domains,
        rows=args.rows,
        per_reweight=args.per_reweight,
        seconds=args.seconds,
    )
    write_atomically(args.folder / "soak.png", chart(saved))
    print(json.dumps(saved["summary"], indent=1))


if __name__ == "__main__":
    main()

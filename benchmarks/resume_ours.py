"""How long our own runs take to go on; for `benchmarks/resume.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measuring import median, profiled, say, seconds

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader._run.decisions import Measurement
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.testing import write_toy_shards

INTERVAL = 64_000
ROWS = {52: 2000, 1000: 100}
"""Rows of each domain, by the number of domains; they repeat."""

CONSUMED = tuple(10**power for power in range(3, 10))
MOST_DECISIONS = 80
"""The paper's number of decisions; a decision every 64,000 samples until then."""

LONG_LEDGERS = (80, 1000, 10_000)
"""Decisions of runs of 1e9 samples."""

TOO_LONG = 20.0
"""Seconds of a single resumption beyond which nobody is asked for ten times as much."""

_CHILD = Path(__file__).parent / "resume_child.py"


class Ours:
    """Real shards of so many domains, and states of runs over them.

    Args:
        folder: For shards, states and the index cache.
        domains: Number of domains.
        quick: Few rows.
    """

    def __init__(self, folder: Path, domains: int, quick: bool) -> None:
        self.domains = domains
        rows = 20 if quick else ROWS[domains]
        self._folder = folder / f"domains-{domains}-{rows}"
        self._cache = folder / "cache"
        self._listing = self._folder / "shards.json"
        if not self._listing.exists():
            counts = {f"source/d{number:04d}": rows for number in range(domains)}
            shards = write_toy_shards(self._folder / "shards", counts, rows_per_shard=max(20, rows // 2))
            self._listing.write_text(json.dumps(shards))
        self.shards: dict[str, list[str]] = json.loads(self._listing.read_text())
        self.sampler()  # indexes

    def sampler(self) -> AgentWeightedSampler:
        """A new sampler over the shards."""
        return AgentWeightedSampler(
            self.shards,
            samples_per_reweight=INTERVAL,
            exhausted="repeat",
            rank=0,
            world_size=1,
            reading=ReadingConfig(cache_dir=self._cache, progress=False),
        )

    def state(self, consumed: int, decisions: int) -> Path:
        """The state of a run with so many decisions behind it, evenly spaced, at most one every 64,000 samples."""
        sampler, generator = self.sampler(), np.random.default_rng(0)
        measurements = sampler._deciding().decider.measurements
        apart = max(INTERVAL, consumed // decisions)
        for start in range(0, min(decisions * apart, consumed), apart):
            mix = generator.dirichlet(np.ones(self.domains))
            feedback = {"general": -3.0 - generator.random(), "math": -4.0 - generator.random()}
            measurements.append(Measurement(start, feedback))
            sampler.plan.append(
                LedgerEntry(
                    start=start, mix=tuple(mix.tolist()), decided_by="bench", decided_at=start, feedback=feedback
                )
            )
        path = self._folder / f"state-{consumed}-{decisions}.json"
        path.write_text(json.dumps(sampler.state_dict(consumed)))
        return path

    def whole_run(self, repeats: int, quick: bool) -> list[dict[str, Any]]:
        """Resuming after ever more samples."""
        return [self.measure(consumed, MOST_DECISIONS, repeats) for consumed in (CONSUMED[::3] if quick else CONSUMED)]

    def long_ledgers(self, repeats: int, quick: bool) -> list[dict[str, Any]]:
        """Resuming after ever more decisions, until ten times as many would take too long; with a profile of each."""
        found: list[dict[str, Any]] = []
        for decisions in LONG_LEDGERS[: 1 if quick else None]:
            if not found or median(found[-1]["inside"]) < TOO_LONG / 10:
                found.append(self.measure(CONSUMED[-1], decisions, repeats, profile=True))
        return found

    def measure(self, consumed: int, decisions: int, repeats: int, *, profile: bool = False) -> dict[str, Any]:
        """Resuming inside a process and in a new one, `repeats` times each."""
        path = self.state(consumed, decisions)
        running = self.sampler()

        def resume() -> None:
            running.load_state_dict(json.loads(path.read_text()))
            found = next(iter(running))["__index__"]
            assert found == consumed, f"resumed at sample {found} instead of {consumed}"

        inside, fresh = [], []
        for _ in range(repeats):
            inside.append(seconds(resume))
            command = [sys.executable, str(_CHILD), str(self._listing), str(path), str(self._cache)]
            fresh.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        found = {
            "domains": self.domains,
            "consumed": consumed,
            "decisions": len(running.ledger),
            "state_bytes": path.stat().st_size,
            "inside": inside,
            "fresh": fresh,
            **({"profile": profiled(resume)} if profile else {}),
        }
        path.unlink()
        say(f"{self.domains} domains, {consumed:.0e} consumed, {found['decisions']} decisions: {median(inside):.3f} s")
        return found

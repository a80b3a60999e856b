"""First stream number of each kind of run, so that no two kinds read the same rows.

The order in which a stream reads a domain is drawn from its seed and number (`training.data.streams.MixStream`).
Recorded trajectories are numbered from 0, base models from `training.proxies.bases.FIRST_STREAM`.
"""

from __future__ import annotations

TRIAL = 3_000_000
"""Runs of `benchmarks.agent.trial`: one number for each seed, which all its policies share."""
NOISE = 4_000_000
"""Runs of `benchmarks.agent.noise`."""
SEARCH = 6_000_000
"""Runs of `benchmarks.agent.agent_search`."""

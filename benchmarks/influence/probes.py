"""Influence of the 52 domains on one environment's questions, by the package's ways and by training clones.

Kept in files: a second call reads them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.influence.environments import Setting, probe_rows
from dmagent_loader._files import write_atomically
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.proxies.language_model import ProxyModel
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.tasks.library import proxy_config

CLONE_ROWS = 32
"""Rows that a clone is trained on: 8 updates of 4 rows."""
CLONE_RATE = 1e-3
NAMES = DomainSpace.canonical().names


def measured(
    setting: Setting, weights: dict[str, Tensor], work: Path, *, size: str, stream: int, rows: int, **settings: Any
) -> Influence:
    """`Environment.influence` on rows of one stream."""
    label = "-".join(f"{name}={value}" for name, value in settings.items()) or "default"
    path = work / "probes" / f"{setting.name}-{size}-{stream}-{rows}-{label}.json"
    if not path.exists():
        found = probe_rows(setting.corpus, rows=rows, number=stream, domains=setting.domains)
        influence = setting.environment.influence(
            ProxyModel(proxy_config(size), weights),
            {NAMES[domain]: list(listed) for domain, listed in found.items()},
            **settings,
        )
        _write(path, influence)
    return Influence.from_json(json.loads(path.read_text()))


def clone_gains(setting: Setting, weights: dict[str, Tensor], work: Path, *, size: str, stream: int) -> FloatArray:
    """Gain of each field from training a clone of the model on one domain alone: (domains with rows, K), in nats.

    On the questions that policies read.
    """
    path = work / "probes" / f"{setting.name}-{size}-{stream}-clone.json"
    if not path.exists():
        started = time.perf_counter()
        rows = probe_rows(setting.corpus, rows=CLONE_ROWS, number=stream, domains=setting.domains)
        gains = trained_on_each(setting, weights, rows.values(), size=size)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"gains": gains, "seconds": time.perf_counter() - started})
        write_atomically(path, text.encode())
    return np.array(json.loads(path.read_text())["gains"])


def trained_on_each(
    setting: Setting, weights: dict[str, Tensor], rows: Iterable[np.ndarray[Any, Any]], *, size: str
) -> list[list[float]]:
    """Gains of clones of a model, each trained on the rows of one domain: domains x K."""
    config = ProxyConfig(
        **{**vars(proxy_config(size)), "learning_rate": CLONE_RATE, "warmup_updates": 1, "averaging": 0.0}
    )
    base = setting.steering.feedback(ProxyModel(proxy_config(size), weights).proxies)[0]
    gains = []
    for listed in rows:
        trainer = ProxyTrainer(1, config, start=weights)
        trainer.train(torch.from_numpy(listed[None]))
        gains.append((setting.steering.feedback(trainer.model)[0] - base).tolist())
    return gains


def clone_seconds(setting: Setting, work: Path, *, size: str, stream: int) -> float:
    """Time that `clone_gains` took."""
    path = work / "probes" / f"{setting.name}-{size}-{stream}-clone.json"
    return float(json.loads(path.read_text())["seconds"])


def cloned(
    setting: Setting, weights: dict[str, Tensor], work: Path, *, size: str, streams: tuple[int, int]
) -> Influence:
    """The clones' gains as an influence: the mean of two streams, whose differences say how noisy it is.

    The unit is nats for 8 updates at the clones' learning rate, not nats per unit of learning rate.
    """
    first, second = (clone_gains(setting, weights, work, size=size, stream=stream) for stream in streams)
    return mean_of_clones(setting, [NAMES[domain] for domain in setting.domains.tolist()], first, second)


def mean_of_clones(setting: Setting, domains: list[str], first: FloatArray, second: FloatArray) -> Influence:
    """An influence from the gains of two streams of clones, (domains, K) each; see `cloned`."""
    error = np.sqrt(((first - second) ** 2).mean(axis=0) / 4)
    values = (first + second).T / 2
    tokens = 2 * len(domains) * 3 * (CLONE_ROWS * ROW_TOKENS) + 2 * len(domains) * setting.steering.num_tokens
    return Influence(
        scores=scores_from(setting.fields, domains, values, np.repeat(error[:, None], len(domains), axis=1)),
        way="clone",
        rows=dict.fromkeys(domains, 2 * CLONE_ROWS),
        tokens=tokens,
    )


def _write(path: Path, influence: Influence) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(influence.to_json()).encode())

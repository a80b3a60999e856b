"""One run: a base model trained on under a mix or a policy, and what it gained on questions that nothing read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.influence.environments import Setting
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import Policy
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.data.streams import MixStream
from dmagent_loader.training.proxies.language_model import ProxyModel
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.tasks.library import proxy_config

STEPS, TOKENS_PER_STEP = 80, 2048
ROWS_PER_STEP = TOKENS_PER_STEP // ROW_TOKENS
SPREADS = (0.0578, 0.7291)
"""Spread of the feedback in the bundled record, general and math: units of the objective (docs/agent-training.md)."""
STREAMS = 4_000_000
"""Streams of runs are numbered from here on: other rows than any proxy's."""


class Rows(Protocol):
    """Rows of tokens for one mix after another, as `MixStream` reads them."""

    def next(self, mix: FloatArray) -> npt.NDArray[np.int64]:
        """Tokens of the next step: (D,) -> (`ROWS_PER_STEP`, `ROW_TOKENS` + 1)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a run.

    Attributes:
        objective: Mean over the fields of gain / spread.
        gains: (K,) of the scored questions, in nats.
        mix: (D,) mean of the mixes that were trained on.
        seconds: Of training and scoring.
    """

    objective: float
    gains: FloatArray
    mix: FloatArray
    seconds: float


def run(
    setting: Setting,
    weights: dict[str, Tensor],
    choose: FloatArray | Policy,
    *,
    size: str,
    stream: int,
    steps: int = STEPS,
    rows: Rows | None = None,
) -> Result:
    """Trains for some steps; runs of one stream read the same rows of a domain first.

    Args:
        setting: The environment.
        weights: Of the base model.
        choose: A mix (D,) for all steps, or a policy that is asked before each, on the steering questions.
        size: Of the model.
        stream: Number of the repetition.
        steps: Of `TOKENS_PER_STEP` tokens.
        rows: Rows of other domains than the 52, for mixes over those; None: the corpus of the environment.
    """
    started = time.perf_counter()
    trainer = ProxyTrainer(1, proxy_config(size), start=weights)
    rows = rows or MixStream(
        setting.corpus,
        rows_per_step=ROWS_PER_STEP,
        row_tokens=ROW_TOKENS,
        seed=1,
        number=STREAMS + stream,
    )
    base = ProxyModel(proxy_config(size), weights).proxies
    before = setting.scored.feedback(base)[0]
    next_mix = _steered(setting, trainer, choose, base) if not isinstance(choose, np.ndarray) else lambda: choose
    used = []
    for _ in range(steps):
        used.append(next_mix())
        trainer.train(torch.from_numpy(rows.next(used[-1])[None]))
    gains = setting.scored.feedback(trainer.averaged)[0] - before
    return Result(
        objective=float(np.mean(gains / SPREADS)),
        gains=gains,
        mix=np.mean(used, axis=0),
        seconds=time.perf_counter() - started,
    )


def _steered(setting: Setting, trainer: ProxyTrainer, policy: Policy, base: object) -> Callable[[], FloatArray]:
    """The policy's next mix, on the feedback of the model as it is."""
    history: list[History] = []
    mixes: list[FloatArray] = [setting.corpus.start_state]

    def next_mix() -> FloatArray:
        model = trainer.averaged if history else base
        feedback = setting.asked.feedback(model)  # type: ignore[arg-type]
        if history:
            history[0] = history[0].extended(mixes[-1], feedback[0])
        else:
            names = DomainSpace.canonical().names
            history.append(History(domains=names, fields=setting.fields, mixes=mixes[0][None], feedback=feedback))
        mixes.append(np.asarray(policy.propose(history[0]), dtype=np.float64))
        return mixes[-1]

    return next_mix

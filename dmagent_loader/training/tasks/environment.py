"""Tasks as a `gymnasium` environment: one decision a step, the reward at the end of the run.

Real proxies are one `Simulator`; any other one can stand behind the environment, too.

Shapes: K = 2 fields of questions, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.tasks.episode import RANGE_SHARES, attainable, range_gains, reward
from dmagent_loader.training.tasks.simulator import Simulator, Start
from dmagent_loader.training.tasks.spec import TaskSpec

__all__ = ["MixingEnv"]

STREAMS = 1_000_000
"""Streams that seeds are mapped to."""


class MixingEnv(gymnasium.Env[dict[str, Any], Any]):
    """One task, or one of several tasks with equally many domains, drawn at each reset.

    Action: (D,) weights between 0 and 1, scaled to a sum of 1; all zero: the natural mix with 30% target.

    Observation, all of it known to a policy in a real run:

    | key | shape | |
    |---|---|---|
    | ``natural`` | (D,) | natural share of each domain, half of the weight in each field of the data |
    | ``is_target`` | (D,) | 1 for domains of the target field |
    | ``rows`` | (D,) | log10 of 1 + the number of rows |
    | ``mix`` | (D,) | mix of the last step, at first that of the base model |
    | ``exposure`` | (D,) | passes over each domain so far, as the mixes asked for them |
    | ``influence``, ``influence_error`` | (K, D) | influence on the start model, each field divided by its spread |
    | ``feedback`` | (K,) | feedback minus that of the base model, in nats |
    | ``progress`` | (1,) | part of the run that is done |
    | ``balance`` | (1,) | weight of the field to acquire in the reward |

    The reward is 0 but for the last step of a run, whose reward is that of `episode.reward`; `info` then has ``gains``
    in nats and ``shares`` of the attainable ranges.

    Args:
        simulator: Simulator. It holds one run, so each environment needs one of its own.
        specs: The task, or tasks with equally many domains.
        ranges: Function from a task to the attainable range of each field, (K,); None: three static runs of the
            simulator, once for each task.

    Raises:
        ConfigurationError: `specs` is empty, or a task that is drawn has another number of domains than the first.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(
        self,
        simulator: Simulator,
        specs: TaskSpec | Sequence[TaskSpec],
        *,
        ranges: Callable[[TaskSpec], FloatArray] | None = None,
    ) -> None:
        self._simulator = simulator
        self._specs = [specs] if isinstance(specs, TaskSpec) else list(specs)
        self._ranges_of, self._known = ranges or self._measured_ranges, dict[str, FloatArray]()
        if not self._specs:
            raise ConfigurationError("specs is empty; give a task, or several with equally many domains")
        self._spec = self._specs[0]
        self._start = simulator.reset(self._spec, 0)
        self._step = self._spec.steps  # no run has begun
        self._num_domains = count = len(self._start.natural)
        self.action_space = spaces.Box(0.0, 1.0, (count,), np.float64)
        unit = spaces.Box(0.0, 1.0, (count,), np.float64)
        positive = spaces.Box(0.0, np.inf, (count,), np.float64)
        any_value = spaces.Box(-np.inf, np.inf, (2, count), np.float64)
        one = spaces.Box(0.0, 1.0, (1,), np.float64)
        self.observation_space = spaces.Dict(
            {
                "natural": unit,
                "is_target": unit,
                "rows": positive,
                "mix": unit,
                "exposure": positive,
                "influence": any_value,
                "influence_error": any_value,
                "feedback": spaces.Box(-np.inf, np.inf, (2,), np.float64),
                "progress": one,
                "balance": one,
            }
        )

    @property
    def spec_of_task(self) -> TaskSpec:
        """The task of the present run."""
        return self._spec

    @property
    def start(self) -> Start:
        """What is known before the first decision of the present run."""
        return self._start

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins a run of a drawn task on a drawn stream; ``options={"task": NUMBER}`` chooses among the tasks.

        Raises:
            ConfigurationError: There is no task of that number, or it has another number of domains than the first.
        """
        super().reset(seed=seed)
        number = whole_number(
            "options['task']", (options or {}).get("task", int(self.np_random.integers(len(self._specs)))), least=0
        )
        if number >= len(self._specs):
            raise ConfigurationError(
                f"options['task'] is {number}, but the tasks are numbered 0 to {len(self._specs) - 1}"
            )
        self._spec = self._specs[number]
        if self._spec.id not in self._known:
            self._known[self._spec.id] = self._ranges_of(self._spec)
        self._start = self._simulator.reset(self._spec, int(self.np_random.integers(STREAMS)))
        count = len(self._start.natural)
        if count != self._num_domains:
            raise ConfigurationError(
                f"task {number} has {count} domains, but the first of specs has {self._num_domains}: make an "
                "environment for each number of domains"
            )
        self._step = 0
        self._mix, self._feedback = self._start.mix, self._start.feedback
        self._samples = np.zeros(len(self._mix))
        influence = self._simulator.influence()
        values, errors = (np.zeros((2, len(self._mix))) for _ in range(2))
        places = [self._start.space.index(name) for name in influence.domains]
        spread = influence.values().std(axis=1, keepdims=True)
        spread = np.where(spread > 0, spread, 1.0)
        values[:, places], errors[:, places] = influence.values() / spread, influence.errors() / spread
        self._influence = values, errors
        return self._observation(), {"task": self._spec.id}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Trains for a step on a mix.

        Raises:
            ConfigurationError: No run has begun or the run has ended, or the action is not one finite number for each
                domain.
        """
        if self._step >= self._spec.steps:
            raise ConfigurationError(
                "there is no run to go on with: call reset before the first step and after the last"
            )
        weights = np.asarray(action, dtype=np.float64)
        if weights.shape != (self._num_domains,) or not np.isfinite(weights).all():
            raise ConfigurationError(
                f"the action is {shown(weights.tolist())}; it must be a finite weight for each of "
                f"{self._num_domains} domains"
            )
        weights = np.clip(weights, 0.0, 1.0)
        weights = np.where(self._start.length.rows > 0, weights, 0.0)
        self._mix = weights / weights.sum() if weights.sum() > 0 else self._start.at(0.3)
        self._feedback = self._simulator.step(self._mix)
        self._step += 1
        limit = self._start.length.limit
        assert limit is not None
        self._samples += self._mix * limit / self._spec.steps
        if self._step < self._spec.steps:
            return self._observation(), 0.0, False, False, {}
        gains, ranges = self._simulator.finish(), self._known[self._spec.id]
        return (
            self._observation(),
            reward(gains, ranges, self._spec.balance),
            True,
            False,
            {"gains": gains, "shares": gains / ranges},
        )

    def _measured_ranges(self, spec: TaskSpec) -> FloatArray:
        return attainable([range_gains(self._simulator, spec, share) for share in RANGE_SHARES])

    def _observation(self) -> dict[str, Any]:
        start = self._start
        return {
            "natural": start.natural,
            "is_target": np.array([float(domain.field == TARGET) for domain in start.space.domains]),
            "rows": np.log10(1.0 + start.length.rows),
            "mix": self._mix,
            "exposure": self._samples / np.maximum(start.length.rows, 1),
            "influence": self._influence[0],
            "influence_error": self._influence[1],
            "feedback": self._feedback - start.feedback,
            "progress": np.array([self._step / self._spec.steps]),
            "balance": np.array([self._spec.balance]),
        }

"""One continual run of the base model, by the same way for every method: shards -> sampler -> HF Trainer with callback.

The methods differ in their policy alone: same first weights, same token budget, same learning rate, same seed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmagent_loader import ReadingConfig
from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.progress import Phase
from dmagent_loader._demo.records import FeedbackPoint, MixStep, RunRecord
from dmagent_loader.agent import MixingAgent
from dmagent_loader.environment import Environment
from dmagent_loader.errors import require_extra
from dmagent_loader.mixture.domains import SOURCE, TARGET, DomainSpace
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.transforms import packed_tokens

if TYPE_CHECKING:
    from transformers import TrainerCallback

_WARMUP_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the mix of a run is chosen.

    Args:
        name: As the report shows it.
        mix: Held for the whole run; None: `agent` decides.
        agent: The agent that decides.
    """

    name: str
    mix: Mapping[str, float] | None = None
    agent: MixingAgent | None = None


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What one run used and came to.

    Attributes:
        record: Mix and feedback over the run, against thousands of tokens.
        model: The trained model.
        tokens: Domain -> tokens trained on.
        seconds: Of the whole run.
        evaluation_seconds: Of all evaluations of the environment.
        decision_seconds: Of each decision of the policy.
        problems: Decisions in which the policy failed, and why.
    """

    record: RunRecord
    model: Any
    tokens: dict[str, int]
    seconds: float
    evaluation_seconds: float
    decision_seconds: list[float]
    problems: list[str]


def methods(space: DomainSpace, rows: Mapping[str, int], agent: MixingAgent) -> list[Method]:
    """Target only, half and half, agent; inside a field the static mixes follow the natural shares.

    Args:
        space: The domains.
        rows: Domain -> rows in its shards.
        agent: The agent.
    """
    shares = np.array([float(rows[name]) for name in space.names])

    def mix(weights: Mapping[str, float]) -> dict[str, float]:
        return space.as_dict(space.mix(weights, shares=shares))

    return [
        Method(name="target only", mix=mix({TARGET: 1.0})),
        Method(name="half and half", mix=mix({SOURCE: 0.5, TARGET: 0.5})),
        Method(name="agent", agent=agent),
    ]


def run_method(
    method: Method,
    base: Any,
    shards: Mapping[str, Sequence[str]],
    environment: Environment,
    config: DemoConfig,
    folder: Path,
) -> MethodResult:
    """Trains a copy of the base model.

    Args:
        method: Chooses the mix.
        base: The base model; left as it is.
        shards: Domain -> packed shards.
        environment: Its feedback is measured before the first step and after every reweighting step.
        config: Sizes.
        folder: For the Trainer and the index of the shards.

    Raises:
        MissingExtraError: transformers or accelerate is not installed.
    """
    transformers = require_extra("transformers", "demo")
    # Here, because it needs transformers, whose absence should be reported as above.
    from dmagent_loader.integrations.huggingface import DataMixingCallback

    started = time.perf_counter()
    sampler = AgentWeightedSampler(
        shards,
        agent=method.agent,
        policy=None if method.mix is None else StaticPolicy(method.mix, name=method.name),
        samples_per_reweight=config.samples_per_reweight,
        seed=config.seed,
        initial_mix=method.mix,
        exhausted="repeat",
        transform=packed_tokens,
        reading=ReadingConfig(cache_dir=folder / "shard_index", progress=False),
    )
    callback = DataMixingCallback(sampler, environment)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=config.run_steps,
        per_device_train_batch_size=config.batch_rows,
        learning_rate=config.run_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=_WARMUP_STEPS,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        # One CPU is enough for this model, and gives the same numbers on machines with and without a GPU.
        use_cpu=True,
        disable_tqdm=True,
        seed=config.seed,
    )
    model = copy.deepcopy(base)
    with Phase(f"run: {method.name}", total=config.run_steps) as phase:
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=sampler,
            callbacks=[callback, _progress_callback(transformers.TrainerCallback, phase, sampler)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "dmagent/evaluation_seconds" in entry]
    return MethodResult(
        record=RunRecord(name=method.name, mix=_mix_steps(sampler, config), feedback=_feedback(sampler, config)),
        model=model,
        tokens={n: count * config.row_tokens for n, count in sampler.achieved(0, callback.consumed).items()},
        seconds=time.perf_counter() - started,
        evaluation_seconds=sum(entry["dmagent/evaluation_seconds"] for entry in logs),
        decision_seconds=[entry["dmagent/decision_seconds"] for entry in logs],
        problems=[f"{entry.decided_at} samples: {entry.note}" for entry in sampler.ledger if not entry.accepted],
    )


def _thousand_tokens(samples: int, config: DemoConfig) -> float:
    return samples * config.row_tokens / 1000


def _mix_steps(sampler: AgentWeightedSampler, config: DemoConfig) -> list[MixStep]:
    """What was trained on between two evaluations, from the sampler's own counts."""
    consumed = [measurement.consumed for measurement in sampler.measurements]
    steps = []
    for start, stop in pairwise(consumed):
        counts = sampler.achieved(start, stop)
        steps.append(
            MixStep(
                start=_thousand_tokens(start, config),
                stop=_thousand_tokens(stop, config),
                mix={name: count / (stop - start) for name, count in counts.items()},
            )
        )
    return steps


def _feedback(sampler: AgentWeightedSampler, config: DemoConfig) -> list[FeedbackPoint]:
    return [
        FeedbackPoint(at=_thousand_tokens(measurement.consumed, config), feedback=dict(measurement.feedback))
        for measurement in sampler.measurements
    ]


def _progress_callback(kind: type[TrainerCallback], phase: Phase, sampler: AgentWeightedSampler) -> TrainerCallback:
    """Shows the newest feedback and the target field's share; the class exists only where transformers does."""

    class Progress(kind):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            phase.update()
            newest = sampler.measurements[-1].feedback
            target = sampler.space.field_mass(sampler.ledger.last.weights())[TARGET]
            phase.note(" ".join(f"{f} {v:.2f}" for f, v in newest.items()) + f", target {target:.0%}")

    return Progress()

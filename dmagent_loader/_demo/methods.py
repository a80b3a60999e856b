"""One continual run of the base model, the same for every method: shards -> sampler -> HF Trainer with callback.

The methods differ only in their policy: same first weights, same token budget, same learning rate, same seed.
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
from dmagent_loader._report.records import FeedbackPoint, MixStep, RunRecord
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
    """A way to choose the mix of a run.

    Args:
        name: Name in the report.
        mix: Fixed mix for the whole run; None: `agent` or `policy` decides.
        agent: Agent that decides, or the name of its checkpoint.
        policy: Name of the policy that decides.
    """

    name: str
    mix: Mapping[str, float] | None = None
    agent: MixingAgent | str | None = None
    policy: str | None = None


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """Model, history and costs of one run.

    Attributes:
        record: Mix and feedback over the run, against thousands of tokens.
        model: The trained model.
        tokens: Domain -> tokens trained on.
        seconds: Duration of the whole run.
        evaluation_seconds: Duration of all evaluations of the environment.
        decision_seconds: Duration of each decision of the policy.
        problems: Decisions at which the policy failed, with the reasons.
    """

    record: RunRecord
    model: Any
    tokens: dict[str, int]
    seconds: float
    evaluation_seconds: float
    decision_seconds: list[float]
    problems: list[str]


def methods(space: DomainSpace, rows: Mapping[str, int], agent: MixingAgent | str) -> list[Method]:
    """Four methods: target only, half and half, agent, influence.

    Inside a field the static mixes follow the natural shares.

    Args:
        space: The domains.
        rows: Domain -> rows in its shards.
        agent: Agent of the third method.
    """
    shares = np.array([float(rows[name]) for name in space.names])

    def mix(weights: Mapping[str, float]) -> dict[str, float]:
        return space.as_dict(space.mix(weights, shares=shares))

    return [
        Method(name="target only", mix=mix({TARGET: 1.0})),
        Method(name="half and half", mix=mix({SOURCE: 0.5, TARGET: 0.5})),
        Method(name="agent", agent=agent),
        Method(name="influence", policy="influence"),
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
        method: Method that chooses the mix.
        base: Base model; left unchanged.
        shards: Domain -> packed shards.
        environment: Question sets, evaluated before the first step and after every reweighting step.
        config: Sizes.
        folder: Folder for the Trainer and the index of the shards.

    Raises:
        MissingExtraError: transformers or accelerate is not installed.
    """
    transformers = require_extra("transformers", "demo")
    # Imported here, after the check above: the module needs transformers.
    from dmagent_loader.integrations.huggingface import DataMixingCallback

    started = time.perf_counter()
    sampler = AgentWeightedSampler(
        shards,
        agent=method.agent,
        policy=method.policy if method.mix is None else StaticPolicy(method.mix, name=method.name),
        decisions=config.decisions,
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
        # A CPU is enough for this model, and gives the same numbers on machines with and without a GPU.
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
    """The mix trained on between two evaluations, from the counts of the sampler."""
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
    """A callback that shows the newest feedback and the target field's share.

    The class is made here, because its base exists only if transformers is installed.
    """

    class Progress(kind):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            phase.update()
            newest = sampler.measurements[-1].feedback
            target = sampler.space.field_mass(sampler.ledger.last.weights())[TARGET]
            phase.note(" ".join(f"{f} {v:.2f}" for f, v in newest.items()) + f", target {target:.0%}")

    return Progress()

"""Description of one task: a model, the data that it may be trained on, and the questions that it is to answer.

A task is a run of continual pre-training in small. Its policy decides a mix before each of `steps` steps; the model
should acquire one field and keep another. A spec holds all that a result depends on besides policy and stream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError

Schedule = Literal["constant", "linear", "cosine", "rewarm", "wsd"]
Kind = Literal["none", "noise", "runs_out", "stale_probe", "noisy_questions", "bad_base"]
Noise = Literal["random", "shuffled", "repeated"]
NUMBERED_SPACES = ("merged", "parts", "clusters")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that a run starts from, pre-trained on the source field.

    Args:
        size: Name of a size in `library.SIZES`.
        tokens: Tokens that it was pre-trained on.
        seed: Seed of its weights, its rows and its source mix.
        sharpness: Concentration of its source mix around the natural one, see `BaseConfig`; None: the natural mix.
    """

    size: str = "0.16M"
    tokens: int = 1_500_000
    seed: int = 0
    sharpness: float | None = None


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A fault of the data, the questions or the model that the policy is not told of.

    Args:
        kind: ``"noise"``: text of one topic of the source field turns to noise; of the topic that the questions to keep
            are most about. ``"runs_out"``: the largest domain of the target field has rows for a tenth of the run, and
            its weight then goes to the rest of the field. ``"stale_probe"``: influence is measured on a model that was
            pre-trained on a fifth of the tokens. ``"noisy_questions"``: feedback and influence read 8 questions to keep
            and 4 to acquire. ``"bad_base"``: the base model saw few topics.
        noise: ``"random"`` tokens, the tokens of the row ``"shuffled"``, or the first row of the topic ``"repeated"``.
        onset: Part of the run, and of the rows that a measurement reads, after which there is noise.
    """

    kind: Kind = "none"
    noise: Noise | None = None
    onset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or (self.noise is not None) != (self.kind == "noise"):
            raise ConfigurationError(
                f"a perturbation of kind {shown(self.kind)} with noise {shown(self.noise)}: choose a kind among "
                f"{', '.join(get_args(Kind))}, and noise for the kind 'noise' alone"
            )

    @property
    def label(self) -> str:
        """Short name for tables."""
        if self.kind != "noise":
            return self.kind
        return f"{self.noise} noise" + (f" from {self.onset:.0%}" if self.onset else "")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task.

    Args:
        number: Number in its split; the seed of all that is random about the task itself, such as the partition of its
            domains.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        keep: Question set of what the model must not forget, a key of `library.QUESTIONS`, or ``"text"``.
        target: Target field: ``"math"``, ``"code"`` or the source topic whose documents are the target field.
        acquire: Question set of what it should learn; ``"text"``: held-out documents of the target field.
        base: The model that the run starts from.
        steps: Number of decisions.
        tokens_per_step: Tokens between two decisions.
        learning_rate: Peak learning rate.
        schedule: Course of the learning rate, see `learning_rate_factor`.
        target_passes: Passes over the target field if it gets 30% of the run, because it holds so few rows; None: it
            keeps all its rows.
        space: ``"canonical"`` (the 52 domains by name), ``"merged-N"`` (N unnamed domains of random topics; 2: one for
            each field), ``"parts-N"`` (each of the 52 in N random parts) or ``"clusters-N"`` (N clusters by words).
        perturbation: What goes wrong.
        balance: Weight of the field to acquire in the reward; the policy may be told.
    """

    number: int
    split: str
    keep: str
    target: str
    acquire: str
    base: BaseModel = field(default_factory=BaseModel)
    steps: int = 80
    tokens_per_step: int = 2048
    learning_rate: float = 1.5e-3
    schedule: Schedule = "constant"
    target_passes: float | None = None
    space: str = "canonical"
    perturbation: Perturbation = field(default_factory=Perturbation)
    balance: float = 0.5

    def __post_init__(self) -> None:
        whole_number("steps", self.steps, least=1)
        whole_number("tokens_per_step", self.tokens_per_step, least=1)
        if self.schedule not in get_args(Schedule):
            raise ConfigurationError(
                f"unknown schedule {shown(self.schedule)}; choose among {', '.join(get_args(Schedule))}"
            )
        if not is_finite_number(self.balance) or not 0 <= self.balance <= 1:
            raise ConfigurationError(f"balance is {shown(self.balance)}; it must lie between 0 and 1")
        kind, _, count = self.space.partition("-")
        is_numbered = kind in NUMBERED_SPACES and count.isdecimal() and int(count) > 0
        if self.space != "canonical" and not is_numbered:
            raise ConfigurationError(
                f"unknown domain space {shown(self.space)}; choose 'canonical', or 'merged', 'parts' or 'clusters' "
                "with a number, such as 'merged-7'"
            )

    @property
    def id(self) -> str:
        """Hex digits that name the task in records."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def fields(self) -> tuple[str, str]:
        """Names of the fields of the feedback: keep, acquire."""
        return f"keep {self.keep}", f"acquire {self.target if self.acquire == 'text' else self.acquire}"

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; `from_json` makes an equal one of them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskSpec:
        """Rebuilds a spec from `to_json`.

        Raises:
            ConfigurationError: A value is missing, unknown or invalid.
        """
        known = {f.name for f in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != known:
            raise ConfigurationError(
                f"a task has the values {sorted(known)}, not {shown(value)}: write it with to_json"
            )
        try:
            base, perturbation = BaseModel(**value["base"]), Perturbation(**value["perturbation"])
        except TypeError as error:
            raise ConfigurationError(f"the task cannot be read ({error}): write it with to_json") from error
        return cls(**{**value, "base": base, "perturbation": perturbation})


def learning_rate_factor(schedule: Schedule, progress: float) -> float:
    """Learning rate as a part of its peak.

    Args:
        schedule: ``"constant"``; ``"linear"``: falls to 0; ``"cosine"``: falls to a tenth; ``"rewarm"``: rises over the
            first tenth of the run, then as cosine; ``"wsd"``: constant, then falls to 0 over the last fifth. All of
            them are scaled down during the first 20 updates, see `ProxyConfig.warmup_updates`.
        progress: Part of the run that is done, 0 to 1.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "wsd":
        return min(1.0, (1.0 - progress) / 0.2)
    start = 0.1 if schedule == "rewarm" else 0.0
    if progress < start:
        return progress / start
    fall = (progress - start) / (1.0 - start)
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * fall))

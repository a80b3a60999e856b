"""Shape of an agent, its domains and its feedback statistics, with their JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, MixError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS, DomainSpace
from dmagent_loader.mixture.history import STANDARDIZATIONS, FeedbackStatistics, Standardization
from dmagent_loader.mixture.simplex import validate_mix

SCHEMA_VERSION = 1
"""Version of the JSON form; increased when an older reader would misunderstand a newer file."""

MAX_LAYERS = 128
"""Limit on the depth, so that building the model of a hostile config.json does not take hours."""

MAX_WIDTH = 1 << 26
"""Limit on widths, beyond which the number of weights overflows the integers of tensor libraries."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Everything that defines an agent except its weights.

    The paper gives 2 decoder layers and 2.1M parameters; width, heads and block are reconstructed (LLaMA-style).

    Args:
        d_model: Width of the residual stream.
        num_layers: Number of decoder blocks.
        num_heads: Number of attention heads; the width of a head must be even (rotary embedding).
        d_ff: Inner width of the SwiGLU feed-forward layer.
        max_steps: Longest history in the training, in reweighting steps (80 in the paper).
        rope_theta: Base of the rotary embedding.
        norm_eps: Epsilon of RMSNorm.
        domains: Names of the domains of a mix, in order; the 52 canonical ones for every bundled agent.
        feedback_roles: Role of each feedback value, in order: the field to keep, the field to acquire.
        standardization: Default mode of standardising feedback; see `mixture.history.standardize`.
        prior_weight: Number of observations that the training spread counts for in mode ``anchored``.
        statistics: Statistics of the training trajectories' feedback. An agent without them can be trained, but can
            neither propose nor be saved.
        keep_topics: (26,) shares of the canonical topics among the questions to keep, by the bundled classifier. With
            questions of other topics the agent may do harm, so its policy warns. None: unknown.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    d_model: int = 256
    num_layers: int = 2
    num_heads: int = 4
    d_ff: int = 1024
    max_steps: int = 80
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    domains: tuple[str, ...] = DomainSpace.canonical().names
    feedback_roles: tuple[str, ...] = ("keep", "acquire")
    standardization: Standardization = "anchored"
    prior_weight: float = 10.0
    statistics: FeedbackStatistics | None = None
    keep_topics: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "d_ff", "max_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
            most = MAX_LAYERS if name == "num_layers" else MAX_WIDTH
            if value > most:
                raise ConfigurationError(f"{name} is {shown(value)}; at most {most} is supported")
        for name in ("rope_theta", "norm_eps", "prior_weight"):
            value = getattr(self, name)
            if not is_finite_number(value) or value <= 0:
                raise ConfigurationError(f"{name} is {shown(value)}; it must be a positive finite number")
        if self.d_model % self.num_heads or self.head_dim % 2:
            raise ConfigurationError(
                f"d_model {self.d_model} over {self.num_heads} heads gives no even head width, which the rotary "
                "embedding needs: choose d_model as a multiple of 2 * num_heads"
            )
        for name in ("domains", "feedback_roles"):
            names = getattr(self, name)
            if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
                raise ConfigurationError(f"{name} must be distinct non-empty names, got {shown(names)}")
        if self.standardization not in STANDARDIZATIONS:
            raise ConfigurationError(
                f"unknown standardization {shown(self.standardization)}; choose one of {', '.join(STANDARDIZATIONS)}"
            )
        if self.statistics is not None and len(self.statistics.mean) != self.num_fields:
            raise ConfigurationError(
                f"statistics are for {len(self.statistics.mean)} feedback values, but the roles are "
                f"{self.feedback_roles}"
            )

        if self.keep_topics is not None:
            try:
                validate_mix(self.keep_topics, CANONICAL_TOPICS)
            except MixError as error:
                raise ConfigurationError(f"keep_topics are not shares of the {NUM_TOPICS} topics: {error}") from error

    @property
    def num_domains(self) -> int:
        """D, the length of a mix."""
        return len(self.domains)

    @property
    def num_fields(self) -> int:
        """K, the number of feedback values of a step."""
        return len(self.feedback_roles)

    @property
    def input_dim(self) -> int:
        """Width of one step's input: the mix joined with the feedback (54 = 52 + 2)."""
        return self.num_domains + self.num_fields

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, including the schema version."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AgentConfig:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigurationError: The schema version differs, keys are missing or unknown, or a value is outside its
                range.
        """
        values = dict(values)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            remedy = "install a newer dmagent-loader" if newer else "save the agent again with this version"
            raise ConfigurationError(
                f"the agent's config has schema version {shown(version)}, but this version reads {SCHEMA_VERSION}: "
                f"{remedy}"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise ConfigurationError(
                f"the agent's config lacks {missing} and has unknown {shown(unknown)}: it was edited, or belongs to "
                "another model"
            )
        try:
            for name in ("domains", "feedback_roles"):
                values[name] = tuple(_list(name, values[name]))
            if (statistics := values["statistics"]) is not None:
                count = statistics["count"]
                if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < 1 << 63:
                    raise ConfigurationError(f"the statistics' count is {shown(count)}; it must be a whole number")
                mean, std = (_list(name, statistics[name]) for name in ("mean", "std"))
                if not all(map(is_finite_number, [*mean, *std])):
                    raise ConfigurationError(f"the statistics are not finite numbers: {shown([mean, std])}")
                values["statistics"] = FeedbackStatistics(
                    mean=tuple(map(float, mean)), std=tuple(map(float, std)), count=count
                )
            if (topics := values["keep_topics"]) is not None:
                if not all(map(is_finite_number, _list("keep_topics", topics))):
                    raise ConfigurationError(f"keep_topics are not finite numbers: {shown(topics)}")
                values["keep_topics"] = tuple(map(float, topics))
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"the agent's config has a value of the wrong kind: {shown(error)}") from error


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigurationError(f"{name} is {shown(value)}; it must be a list")
    return list(value)

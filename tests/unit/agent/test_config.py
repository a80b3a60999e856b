"""The agent's configuration: what is refused, and the JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dmagent_loader.agent.config import SCHEMA_VERSION, AgentConfig
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import FeedbackStatistics

STATISTICS = FeedbackStatistics(mean=(-5.25, -4.0), std=(0.1, 0.3), count=77)


def test_defaults_are_the_papers_agent() -> None:
    config = AgentConfig()
    assert config.domains == DomainSpace.canonical().names
    assert (config.num_domains, config.num_fields, config.input_dim) == (52, 2, 54)
    assert config.standardization == "anchored"


def test_json_round_trip_is_exact() -> None:
    config = AgentConfig(d_model=32, num_heads=2, statistics=STATISTICS, rope_theta=123.456, standardization="running")
    assert AgentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AgentConfig().d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"d_model": 256.0}, "d_model is 256.0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 10**9}, "at most 128"),
        ({"d_model": 250}, "250 over 4 heads"),
        ({"d_model": 20, "num_heads": 4}, "no even head width"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"domains": ()}, "domains must be distinct"),
        ({"domains": ("a", "a")}, "domains must be distinct"),
        ({"feedback_roles": ("keep", "")}, "feedback_roles must be distinct"),
        ({"standardization": "batch"}, "unknown standardization 'batch'"),
        ({"feedback_roles": ("keep",), "statistics": STATISTICS}, "statistics are for 2 feedback values"),
    ],
)
def test_settings_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AgentConfig(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "install a newer dmagent-loader"),
        ({"schema_version": 0}, "save the agent again"),
        ({"schema_version": None}, "schema version None"),
        ({"dropout": 0.1}, r"unknown \['dropout'\]"),
        ({"domains": 3}, "domains is 3; it must be a list"),
        ({"statistics": {"mean": [1, 2]}}, "wrong kind"),
        ({"statistics": {"mean": [1, 2], "std": [1, 0], "count": 3}}, "positive std"),
        ({"statistics": [1, 2]}, "wrong kind"),
        ({"d_model": "256"}, "d_model is '256'"),
        ({"standardization": []}, "unknown standardization"),
    ],
)
def test_json_of_another_kind_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AgentConfig.from_dict({**AgentConfig().to_dict(), **change})


def test_a_missing_key_is_refused_rather_than_defaulted() -> None:
    """Filling in today's default would change an old agent when a default changes."""
    values = AgentConfig().to_dict()
    del values["rope_theta"]
    with pytest.raises(ConfigurationError, match=r"lacks \['rope_theta'\]"):
        AgentConfig.from_dict(values)

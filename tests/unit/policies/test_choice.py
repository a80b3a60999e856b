"""The policy of a run: by name, as an object, or from a function of the domains and their natural shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.policies import (
    InfluencePolicy,
    LinearSchedule,
    OnlineDataMixing,
    RecordedPath,
    ReplayPolicy,
    StaticPolicy,
    TwoPhaseSchedule,
    make_policy,
)

SPACE = DomainSpace.from_names(["source/web", "source/wiki", "target/math", "target/code"])
NATURAL = np.array([0.1, 0.2, 0.3, 0.4])
START = History(domains=SPACE.names, fields=("general",), mixes=NATURAL[None], feedback=np.zeros((1, 1)))


def chosen(policy: Any) -> Any:
    return make_policy(None, policy, SPACE, NATURAL)


@pytest.mark.parametrize(
    ("name", "mix"), [("natural", [0.1, 0.2, 0.3, 0.4]), ("uniform", [0.25] * 4), ("odm", [0.25] * 4)]
)
def test_baselines_by_name(name: str, mix: list[float]) -> None:
    policy = chosen(name)
    assert policy.name == name
    assert policy.propose(START) == pytest.approx(mix)


def test_a_class_with_settings_is_built_for_the_run() -> None:
    policy = chosen(partial(InfluencePolicy, balance=0.25, name="mine"))
    assert isinstance(policy, InfluencePolicy)
    assert (policy.name, policy.space, policy.natural.tolist()) == ("mine", SPACE, NATURAL.tolist())
    assert isinstance(chosen(OnlineDataMixing), OnlineDataMixing)


def test_a_function_may_use_the_natural_shares() -> None:
    """The natural mix with 30% of the target field, a baseline of every comparison."""
    policy = chosen(
        lambda space, natural: StaticPolicy(space.mix({"source": 0.7, "target": 0.3}, shares=natural), name="30%")
    )
    assert policy.propose(START) == pytest.approx([0.7 / 3, 1.4 / 3, 0.9 / 7, 1.2 / 7])


@pytest.mark.parametrize(
    "policy",
    [
        StaticPolicy({"source/wbe": 1.0}),
        StaticPolicy({"source": 0.7, "target": 0.3}),
        StaticPolicy([0.5, 0.5]),
        LinearSchedule({"source/web": 1.0}, {"target/maths": 1.0}, steps=4),
        TwoPhaseSchedule({"source/web": 1.0}, {"target/maths": 1.0}, steps=4),
        ReplayPolicy(RecordedPath(domains=("source/other",), mixes=np.array([[1.0]]), samples=[8])),
        lambda space, natural: StaticPolicy({"source/wbe": 1.0}),
    ],
    ids=lambda policy: getattr(policy, "name", "made"),
)
def test_a_mix_for_other_domains_is_refused_at_once(policy: Any) -> None:
    """At a decision, the guard would log it and keep the initial mix, at every decision of the run."""
    with pytest.raises(ConfigurationError, match=r"unknown domains|shape"):
        chosen(policy)


def test_a_policy_that_can_be_called_is_not_called() -> None:
    class Both:
        name = "both"

        def propose(self, history: History) -> Any:
            return NATURAL

        def __call__(self, space: Any, natural: Any) -> Any:
            raise AssertionError

    both = Both()
    assert chosen(both) is both


def test_an_error_inside_the_function_is_not_hidden() -> None:
    with pytest.raises(ConfigurationError, match="balance is 7"):
        chosen(partial(InfluencePolicy, balance=7))

    def broken(space: Any, natural: Any) -> Any:
        raise TypeError("from inside")

    with pytest.raises(TypeError, match="from inside"):
        chosen(broken)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: None, "cannot be called with the domains and their natural shares"),
        (lambda space, natural: natural, r"propose\(history\)"),
        (lambda space, natural: OnlineDataMixing, r"propose\(history\)"),
        (5, "policy is 5; it must be 'influence'"),
        ("dbl", "no policy named 'dbl'"),
        ("dmagent-plus", "or pass an agent as agent="),
    ],
)
def test_what_makes_no_policy_is_refused(policy: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        chosen(policy)

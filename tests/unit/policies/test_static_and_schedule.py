"""The policies that do not look at the feedback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, DomainError, MixError
from dmagent_loader.mixture.history import History
from dmagent_loader.policies import LinearSchedule, Policy, StaticPolicy, TwoPhaseSchedule

MakeHistory = Callable[..., History]
DOMAINS = ("source/web", "source/books", "target/math")


def test_all_are_policies() -> None:
    assert isinstance(TwoPhaseSchedule([1.0], [1.0], 10), Policy)
    assert isinstance(StaticPolicy([1.0]), Policy)
    assert isinstance(LinearSchedule([1.0], [1.0], 1), Policy)


def test_a_static_mix_by_name_follows_the_order_of_the_run(make_history: MakeHistory) -> None:
    policy = StaticPolicy({"target/math": 0.75, "source/web": 0.25})
    assert policy.propose(make_history(DOMAINS)).tolist() == [0.25, 0.0, 0.75]
    assert policy.propose(make_history(DOMAINS[::-1], 5)).tolist() == [0.75, 0.0, 0.25]


def test_a_static_mix_by_position(make_history: MakeHistory) -> None:
    policy = StaticPolicy(np.array([0.5, 0.25, 0.25]))
    assert policy.propose(make_history(DOMAINS)).tolist() == [0.5, 0.25, 0.25]
    with pytest.raises(MixError, match="2 domains"):
        policy.propose(make_history(DOMAINS[:2]))


def test_changing_the_weights_or_a_proposal_afterwards_changes_no_policy(make_history: MakeHistory) -> None:
    weights, array = {"source/web": 1.0}, np.array([1.0, 0.0, 0.0])
    by_name, by_position = StaticPolicy(weights), StaticPolicy(array)
    weights["source/web"] = 0.1
    array[0] = 0.1
    by_position.propose(make_history(DOMAINS))[0] = 9.0
    for policy in (by_name, by_position):
        assert policy.propose(make_history(DOMAINS)).tolist() == [1.0, 0.0, 0.0]


def test_a_wrong_mix_is_refused_at_construction_and_a_wrong_name_at_use(make_history: MakeHistory) -> None:
    with pytest.raises(MixError, match=r"sums to 0\.9"):
        StaticPolicy({"source/web": 0.9})
    with pytest.raises(MixError, match="negative"):
        LinearSchedule([1.0, 0.0], [1.5, -0.5], 4)
    with pytest.raises(DomainError, match="unknown domains 'source/wev'"):
        StaticPolicy({"source/wev": 1.0}).propose(make_history(DOMAINS))


def test_a_schedule_goes_from_its_start_to_its_end_and_stays(make_history: MakeHistory) -> None:
    """The first decision has a history of one row and is step 1: off by one gives the start mix there."""
    policy = LinearSchedule({"source/web": 1.0}, {"target/math": 1.0}, steps=4)
    shares = [policy.propose(make_history(DOMAINS, steps))[2] for steps in range(1, 8)]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_every_mix_of_a_schedule_sums_to_one(make_history: MakeHistory) -> None:
    rng = np.random.default_rng(0)
    policy = LinearSchedule(rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3)), steps=7)
    for steps in range(1, 10):
        assert abs(policy.propose(make_history(DOMAINS, steps)).sum() - 1.0) < 1e-12


@pytest.mark.parametrize("steps", [0, 10.5, float("nan"), "ten", True])
def test_steps_that_are_no_number_of_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"steps is {steps!r}"):
        LinearSchedule([1.0], [1.0], steps)
    with pytest.raises(ConfigurationError, match=f"steps is {steps!r}"):
        TwoPhaseSchedule([1.0], [1.0], steps)


@pytest.mark.parametrize("switch", ["x", float("nan"), None])
def test_a_switch_that_is_no_number_is_refused(switch: Any) -> None:
    with pytest.raises(ConfigurationError, match="switch is"):
        TwoPhaseSchedule([1.0], [1.0], 10, switch=switch)


def test_two_phases_by_hand(make_history: MakeHistory) -> None:
    """0.75 of 8 steps are 6: the first 6 decisions have the first mix, whatever comes after the 8th."""
    policy = TwoPhaseSchedule({"source/web": 1.0}, {"target/math": 1.0}, 8, switch=0.75)
    shares = [policy.propose(make_history(DOMAINS, steps))[2] for steps in range(1, 11)]
    assert shares == [0.0] * 6 + [1.0] * 4


@pytest.mark.parametrize(("steps", "switch"), [(1, 0.5), (8, 0.0), (8, 1.0), (8, 1.5), (4, 0.9)])
def test_a_phase_without_a_step_is_refused(steps: int, switch: float) -> None:
    with pytest.raises(ConfigurationError, match="each phase needs a step"):
        TwoPhaseSchedule([1.0], [1.0], steps, switch=switch)

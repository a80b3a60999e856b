"""DBL, Velocitune and ODM: a step of each by hand, and what they share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.policies import (
    LOSSES,
    DynamicBatchLoading,
    InformedPolicy,
    OnlineDataMixing,
    Policy,
    Velocitune,
    power_law_loss,
)

Start = Callable[..., History]
NATURAL = np.array([0.8, 0.2])
DBL = partial(DynamicBatchLoading, reference={"target/math": 2.0})
VELOCITUNE = partial(Velocitune, target={"source/web": 2.0, "target/math": 1.0})
MAKERS = {"dbl": DBL, "velocitune": VELOCITUNE, "odm": OnlineDataMixing}


def inform(policy: Any, *losses: tuple[float, float], first: int = 0) -> None:
    """As integrations do, before one decision after another."""
    for decision, (web, math) in enumerate(losses, first):
        assert policy.needed(decision) == {LOSSES}
        policy.inform(LOSSES, {"target/math": math, "source/web": web})
        assert policy.needed(decision) == frozenset()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_each_is_an_informed_policy_that_answers_directly(maker: Any, two: DomainSpace) -> None:
    policy = maker(two, NATURAL)
    assert isinstance(policy, Policy)
    assert isinstance(policy, InformedPolicy)
    assert vars(type(policy))["always_answers"] is True


def test_a_step_of_dbl_by_hand(two: DomainSpace, start: Start) -> None:
    """Base loss 3.0 on the web, now 3.1: excess 0.1. Reference 2.0 on math, now 2.7: excess 0.7.

    0.8 e^0.1 = 0.8841367 and 0.2 e^0.7 = 0.4027505, together 1.2868872: 0.687035 and 0.312965.
    """
    policy = DBL(two, NATURAL, smoothing=0.0)
    inform(policy, (3.0, 4.0))
    assert policy.propose(start()).tolist() == [0.8, 0.2], "the base model's losses update nothing"
    inform(policy, (3.1, 2.7), first=1)
    assert policy.propose(start()) == pytest.approx([0.687035, 0.312965], abs=1e-6)


def test_dbl_ignores_losses_below_the_reference_and_smooths(two: DomainSpace, start: Start) -> None:
    """Both are below: weights stay, then a tenth of the mix becomes uniform: 0.9 x 0.8 + 0.05 = 0.77."""
    policy = DBL(two, NATURAL, smoothing=0.1)
    inform(policy, (3.0, 4.0), (2.9, 1.5))
    assert policy.propose(start()) == pytest.approx([0.77, 0.23])


def test_dbl_begins_with_the_initial_mix_by_field(two: DomainSpace, start: Start) -> None:
    policy = DBL(two, NATURAL, initial={"source": 0.4, "target": 0.6}, proxy_tokens=7)
    assert policy.propose(start()).tolist() == [0.4, 0.6]
    assert policy.proxy_tokens == 7


def test_a_step_of_velocitune_by_hand(two: DomainSpace, start: Start) -> None:
    """The web is half of its way from 4 to 2 (velocity 0.5), math has not moved from 3 (velocity 1).

    0.8 e^0.5 = 1.3189770 and 0.2 e^1 = 0.5436564, together 1.8626334: 0.708125 and 0.291875.
    """
    policy = VELOCITUNE(two, NATURAL)
    inform(policy, (4.0, 3.0), (3.0, 3.0))
    assert policy.propose(start()) == pytest.approx([0.708125, 0.291875], abs=1e-6)


def test_velocities_are_bounded_and_a_domain_beyond_its_target_has_none(two: DomainSpace, start: Start) -> None:
    """The web has passed its target (velocity 0); math has got worse (1.5, above the limit 1.2): e^1.2 = 3.320117."""
    policy = VELOCITUNE(two, np.array([0.5, 0.5]), max_velocity=1.2)
    inform(policy, (4.0, 3.0), (1.9, 4.0))
    assert policy.propose(start()) == pytest.approx([1 / 4.320117, 3.320117 / 4.320117], abs=1e-6)


def test_velocitune_needs_all_targets(two: DomainSpace) -> None:
    with pytest.raises(ConfigurationError, match="target has no loss for"):
        Velocitune(two, NATURAL, target={"source/web": 2.0})


def test_two_rounds_of_odm_by_hand(two: DomainSpace, start: Start) -> None:
    """Losses 2 and 4, alpha 0.9, from the uniform mix; e_1 = 0.5, e_2 = sqrt(log 2 / 4), e_3 = sqrt(log 2 / 6).

    Round 1: R = 0.1 (2 / 0.5, 4 / 0.5) = (0.4, 0.8); scores e_1 R differ by 0.2, so the second has 0.549834 of the
    exponentials; weight (1 - 2 x 0.416277) x 0.549834 + 0.416277 = 0.508344.
    Round 2: R = (0.36 + 0.2 / 0.491656, 0.72 + 0.4 / 0.508344) = (0.766788, 1.506869); scores e_2 R differ by 0.308079;
    0.576416 of the exponentials; weight (1 - 2 x 0.339889) x 0.576416 + 0.339889 = 0.524470.
    """
    for rounds, expected in ((1, 0.508344), (2, 0.524470)):
        policy = OnlineDataMixing(two, NATURAL, alpha=0.9, rounds_per_decision=rounds)
        inform(policy, (9.0, 9.0))
        assert policy.propose(start()).tolist() == [0.5, 0.5]
        inform(policy, (2.0, 4.0), first=1)
        assert policy.propose(start())[1] == pytest.approx(expected, abs=2e-6)


def test_two_decisions_of_odm_are_as_many_rounds_as_one_of_twice_as_many(two: DomainSpace) -> None:
    """Catches a round counter that begins anew with each decision."""
    one, other = (OnlineDataMixing(two, NATURAL, rounds_per_decision=n) for n in (40, 20))
    inform(one, (1.0, 1.0), (2.0, 4.0))
    inform(other, (1.0, 1.0), (2.0, 4.0), (2.0, 4.0))
    assert np.allclose(one.mix, other.mix, atol=1e-12)
    assert one.mix[1] > 0.54, "the domain of larger loss"


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_restored_policy_continues_as_if_nothing_had_happened(maker: Any, two: DomainSpace) -> None:
    steps = [(4.0, 3.0), (3.5, 2.9), (3.4, 2.2), (3.6, 2.1)]
    whole, first = maker(two, NATURAL), maker(two, NATURAL)
    inform(whole, *steps)
    inform(first, *steps[:2])
    second = maker(two, NATURAL)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.needed(1) == frozenset(), "its losses are in the state"
    inform(second, *steps[2:], first=2)
    assert second.mix.tolist() == whole.mix.tolist()
    assert second.mix.tolist() != first.mix.tolist()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_loop_that_gives_no_losses_is_warned_of_once(
    maker: Any, two: DomainSpace, start: Callable[..., History], caplog: pytest.LogCaptureFixture
) -> None:
    """A loop with a bare `sampler.reweight` kept the first mix to its end, without a word."""
    policy = maker(two, NATURAL)
    for _ in range(2):
        policy.propose(start(two))
    assert caplog.text.count("nobody gives it the loss on each domain") == 1
    caplog.clear()
    informed, asked = maker(two, NATURAL), maker(two, NATURAL)
    informed.inform("losses", {"source/web": 4.0, "target/math": 3.0})
    asked.needed(0)
    for other in (informed, asked):
        other.propose(start(two))
    assert not caplog.records


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_damaged_state_is_refused(maker: Any, two: DomainSpace) -> None:
    policy = maker(two, NATURAL)
    inform(policy, (4.0, 3.0))
    good = policy.state_dict()
    bad: list[Any] = [{}, {**good, "mix": None}, {**good, "mix": 3}, {**good, "updates": "x"}]
    bad += [{**good, "informed": float("inf")}]
    bad += [{**good, "base_losses": dict.fromkeys(two.names, float("nan"))}]
    bad += [{**good, "mix": {"source/web": 0.9, "target/math": 0.9}}]
    for state in bad:
        with pytest.raises(StateError, match="cannot be read"):
            maker(two, NATURAL).load_state_dict(state)


def test_a_state_of_other_domains_begins_anew_with_a_warning(
    two: DomainSpace, caplog: pytest.LogCaptureFixture
) -> None:
    policy = OnlineDataMixing(two, NATURAL)
    inform(policy, (4.0, 3.0), (4.0, 3.0))
    wider = DomainSpace.from_names([*two.names, "target/code"])
    other = OnlineDataMixing(wider, np.full(3, 1 / 3))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(policy.state_dict())
    assert "begins anew" in caplog.text
    assert "target/code" in caplog.text
    assert other.needed(2) == {LOSSES}
    assert other.base_losses is None
    assert other.updates == 0


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_used_policy_begins_anew_for_another_run(
    maker: Any, two: DomainSpace, caplog: pytest.LogCaptureFixture
) -> None:
    """It never asked again, and kept the last mix of the first run."""
    policy, fresh = maker(two, NATURAL), maker(two, NATURAL)
    inform(policy, (4.0, 3.0), (3.5, 2.9), (3.4, 2.2))
    assert not caplog.records
    inform(policy, (5.0, 3.0), (4.5, 2.0))
    assert "asked for decision 0 after decision 2" in caplog.text
    inform(fresh, (5.0, 3.0), (4.5, 2.0))
    assert json.dumps(policy.state_dict()) == json.dumps(fresh.state_dict())


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_used_policy_that_loads_a_state_of_other_domains_begins_anew(maker: Any, two: DomainSpace) -> None:
    policy, fresh = maker(two, NATURAL), maker(two, NATURAL)
    state = fresh.state_dict()
    inform(policy, (4.0, 3.0), (3.5, 2.9))
    policy.load_state_dict({**state, "mix": {"source/web": 0.5, "target/code": 0.5}})
    assert json.dumps(policy.state_dict()) == json.dumps(state)


def test_losses_of_the_base_model_that_come_late_are_warned_of(
    two: DomainSpace, caplog: pytest.LogCaptureFixture
) -> None:
    policy = DBL(two, NATURAL)
    policy.needed(0)
    policy.inform(LOSSES, None)
    assert not caplog.records
    inform(policy, (3.0, 4.0), (3.0, 4.0), first=1)
    assert len(caplog.records) == 1
    assert "has no losses of the base model, and takes those before decision 1 instead" in caplog.text


def test_without_losses_the_mix_stays_and_the_next_ones_are_used(two: DomainSpace) -> None:
    policy = DBL(two, NATURAL)
    inform(policy, (3.0, 4.0))
    policy.needed(1)
    policy.inform(LOSSES, None)
    assert policy.needed(1) == frozenset()
    assert policy.mix.tolist() == [0.8, 0.2]
    inform(policy, (3.0, 4.0), first=2)
    assert policy.mix[1] > 0.2


@pytest.mark.parametrize(
    ("need", "evidence"),
    [
        ("influence", {}),
        (LOSSES, 3.0),
        (LOSSES, {"source/web": 1.0}),
        (LOSSES, {"source/web": 1.0, "target/math": float("nan")}),
    ],
)
def test_other_evidence_is_refused(need: str, evidence: Any, two: DomainSpace) -> None:
    with pytest.raises(PolicyError, match="needs"):
        OnlineDataMixing(two, NATURAL).inform(need, evidence)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (partial(DBL, eta=0), "eta is 0"),
        (partial(DBL, smoothing=1.0), "smoothing is 1.0"),
        (partial(DBL, proxy_tokens=-1), "proxy_tokens is -1"),
        (partial(DBL, proxy_tokens="many"), "proxy_tokens is 'many'"),
        (partial(DynamicBatchLoading, reference={"target/math": "low"}), "reference is"),
        (partial(DynamicBatchLoading, reference=None), "reference is None"),
        (partial(VELOCITUNE, max_velocity=float("inf")), "max_velocity is inf"),
        (partial(VELOCITUNE, proxy_tokens=0.5), "proxy_tokens is 0.5"),
        (partial(OnlineDataMixing, alpha=1.0), "alpha is 1.0"),
        (partial(OnlineDataMixing, rounds_per_decision=0), "rounds_per_decision is 0"),
    ],
)
def test_wrong_settings_are_refused(wrong: Any, message: str, two: DomainSpace) -> None:
    with pytest.raises(ConfigurationError, match=message):
        wrong(two, NATURAL)


def test_a_reference_for_an_unknown_domain_is_refused(two: DomainSpace) -> None:
    with pytest.raises(DomainError, match="'target/maths'"):
        DynamicBatchLoading(two, NATURAL, reference={"target/maths": 2.0})


def test_a_history_of_other_domains_is_refused(two: DomainSpace, start: Start) -> None:
    other = DomainSpace.from_names(["source/a", "target/b"])
    with pytest.raises(DomainError, match="source/a"):
        OnlineDataMixing(two, NATURAL).propose(start(other))


def test_a_curve_that_does_not_fall_has_no_scaling_law() -> None:
    with pytest.raises(ConfigurationError, match="do not fall"):
        power_law_loss([1e6, 2e6, 4e6], [2.0, 2.1, 2.3], 1e8)
    for at in (float("nan"), 0, -1e6):
        with pytest.raises(ConfigurationError, match=f"at is {at}"):
            power_law_loss([1e6, 2e6, 4e6], [2.3, 2.1, 2.0], at)
    with pytest.raises(ConfigurationError, match="at least 3"):
        power_law_loss([1e6, 2e6], [2.0, 1.9], 1e8)
    for tokens, losses in (([1e6, 2e6, float("inf")], [2.0, 1.9, 1.8]), ([1e6, 2e6, 4e6], [float("inf"), 2.0, 1.9])):
        with pytest.raises(ConfigurationError, match="needs positive, finite"):
            power_law_loss(tokens, losses, 1e8)

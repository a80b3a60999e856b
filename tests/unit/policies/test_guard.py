"""The guard: what a bad policy can do to a run (nothing), and how loudly."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, total_variation
from dmagent_loader.policies import AgentPolicy, Guard, GuardConfig, LinearSchedule, StaticPolicy, propose_guarded

MakeHistory = Callable[..., History]
DOMAINS = ("source/web", "source/books", "target/math", "target/code")
EVEN = np.full(4, 0.25)


class Calls:
    """A policy that does whatever the test says."""

    def __init__(self, propose: Callable[[History], Any]) -> None:
        self.name = "calls"
        self._propose = propose

    def propose(self, history: History) -> FloatArray:
        return self._propose(history)  # type: ignore[no-any-return]


def guard(**settings: Any) -> Guard:
    return Guard(GuardConfig(**settings), DOMAINS)


def test_a_good_proposal_passes_unchanged_and_without_notes() -> None:
    mix, notes = guard().check(np.array([0.1, 0.2, 0.3, 0.4]), EVEN)
    np.testing.assert_allclose(mix, [0.1, 0.2, 0.3, 0.4], atol=1e-15)
    assert notes == ()


def test_float32_tensors_and_lists_are_proposals_too() -> None:
    for proposed in (torch.tensor([0.1, 0.2, 0.3, 0.4]), [0.1, 0.2, 0.3, 0.4], (1, 0, 0, 0)):
        mix, _ = guard().check(proposed, EVEN)
        assert mix.dtype == np.float64
        assert abs(mix.sum() - 1.0) < 1e-15


def test_the_mix_is_a_copy() -> None:
    """A policy that goes on writing into its array must not reach the ledger."""
    proposed = np.array([0.25, 0.25, 0.25, 0.25])
    mix, _ = guard().check(proposed, EVEN)
    proposed[:] = 0
    assert mix.sum() == 1.0


@pytest.mark.parametrize(
    ("proposed", "message"),
    [
        ([np.nan, 0.5, 0.25, 0.25], "not finite: source/web=nan"),
        ([np.inf, 0.5, 0.25, 0.25], "not finite"),
        ([-0.1, 0.6, 0.25, 0.25], "negative: source/web=-0.1"),
        ([0.3, 0.3, 0.2, 0.19], "sum to 0.99"),
        ([0.0, 0.0, 0.0, 0.0], "sum to 0"),
        ([0.5, 0.5], r"shape \(2,\), but there are 4"),
        ([[0.25, 0.25, 0.25, 0.25]], r"shape \(1, 4\)"),
        (1.0, r"shape \(\)"),
        (None, "NoneType of object"),
        ("mix", "str of"),
        ({"source/web": 1.0}, "dict of object"),
        ([1 + 1j, 0, 0, 0], "complex128"),
        ([True, False, False, False], "bool"),
        ([[0.5], [0.25, 0.25]], "not an array"),
    ],
)
def test_nonsense_is_named(proposed: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        guard().check(proposed, EVEN)


def test_a_tensor_that_needs_grad_is_named() -> None:
    with pytest.raises(PolicyError, match="not an array"):
        guard().check(torch.full((4,), 0.25, requires_grad=True), EVEN)


def test_rounding_is_forgiven_but_no_more() -> None:
    mix, notes = guard().check(np.array([0.25, 0.25, 0.25, 0.2505]), EVEN)
    assert abs(mix.sum() - 1.0) < 1e-15
    assert notes == ()
    mix, _ = guard().check(np.array([-1e-12, 0.5, 0.5, 0.0]), EVEN)
    assert mix[0] == 0.0


def test_a_floor_lifts_and_takes_from_the_others_in_proportion() -> None:
    mix, notes = guard(floor={"source/web": 0.2}).check([0.0, 0.5, 0.25, 0.25], EVEN)
    np.testing.assert_allclose(mix, [0.2, 0.4, 0.2, 0.2])
    assert notes == ("moved by 0.2 to keep floor and ceiling (source/web)",)


def test_a_ceiling_cuts_and_gives_to_the_others_in_proportion() -> None:
    mix, _ = guard(ceiling=0.4).check([0.7, 0.0, 0.2, 0.1], EVEN)
    np.testing.assert_allclose(mix, [0.4, 0.0, 0.4, 0.2])


def test_weight_that_fits_nowhere_else_goes_to_domains_of_weight_zero() -> None:
    """Scaling alone cannot reach a sum of 1 here."""
    mix, _ = guard(ceiling={"source/web": 0.4, "source/books": 0.1}).check([1.0, 0.0, 0.0, 0.0], EVEN)
    assert mix[0] == pytest.approx(0.4)
    assert mix.sum() == pytest.approx(1.0)
    assert mix[2] == pytest.approx(mix[3])
    assert mix[1] < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floor": 0.3}, "floors sum to 1.2"),
        ({"ceiling": 0.2}, "ceilings to 0.8"),
        (
            {"floor": {"source/web": 0.5}, "ceiling": {"source/web": 0.4}},
            "has floor 0.5 above its ceiling",
        ),
        ({"floor": -0.1}, "lies between 0 and 1"),
        ({"ceiling": float("nan")}, "lies between 0 and 1"),
    ],
)
def test_bounds_that_no_mix_satisfies_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        guard(**settings)


def test_tight_bounds_leave_one_mix() -> None:
    """0.1 * 10 is not exactly 1 in floating point, and still feasible."""
    names = [f"target/{i}" for i in range(10)]
    tight = Guard(GuardConfig(floor=0.1), names)
    mix, _ = tight.check(np.eye(10)[3], np.full(10, 0.1))
    np.testing.assert_allclose(mix, 0.1)


@pytest.mark.parametrize("bound", ["floor", "ceiling"])
def test_a_bound_for_no_domain_is_refused(bound: str) -> None:
    with pytest.raises(DomainError, match=rf"the {bound} names \['web'\]"):
        guard(**{bound: {"web": 0.5}})


@pytest.mark.parametrize(
    "settings", [{"max_change": 0.0}, {"max_change": 1.5}, {"timeout_seconds": 0}, {"timeout_seconds": float("nan")}]
)
def test_limits_that_make_no_sense_are_refused(settings: Mapping[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        GuardConfig(**settings)


def test_a_large_change_is_cut_along_the_straight_line() -> None:
    mix, notes = guard(max_change=0.15).check([1.0, 0.0, 0.0, 0.0], EVEN)
    np.testing.assert_allclose(mix, [0.4, 0.2, 0.2, 0.2])
    assert notes == ("change of 0.75 cut to 0.15",)
    assert guard(max_change=0.8).check([1.0, 0.0, 0.0, 0.0], EVEN)[1] == ()


def test_from_outside_the_bounds_the_mix_walks_into_them_at_the_allowed_pace() -> None:
    limited = guard(floor={"target/code": 0.4}, max_change=0.1)
    mix = np.array([0.5, 0.25, 0.25, 0.0])
    path = []
    for _ in range(5):
        mix, _ = limited.check([0.5, 0.25, 0.25, 0.0], mix)
        path.append(round(float(mix[3]), 12))
    assert path == [0.1, 0.2, 0.3, 0.4, 0.4]


def test_a_good_policy_is_accepted(make_history: MakeHistory) -> None:
    outcome = propose_guarded(StaticPolicy({"target/math": 1.0}), make_history(DOMAINS), EVEN, guard(max_change=0.3))
    assert outcome.accepted
    assert outcome.error is None
    assert total_variation(outcome.mix, EVEN) == pytest.approx(0.3)
    assert outcome.notes == ("change of 0.75 cut to 0.3",)
    assert 0 < outcome.seconds < 5


def raises(history: History) -> FloatArray:
    raise RuntimeError("no such luck")


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (raises, "RuntimeError: no such luck"),
        (lambda history: np.full(4, np.nan), "not finite"),
        (lambda history: np.full(3, 1 / 3), r"shape \(3,\)"),
        (lambda history: None, "NoneType"),
    ],
)
def test_a_failing_policy_leaves_the_previous_mix_in_force_loudly(
    propose: Callable[[History], Any],
    message: str,
    timeout: float | None,
    make_history: MakeHistory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    previous = np.array([0.4, 0.3, 0.2, 0.1])
    outcome = propose_guarded(Calls(propose), make_history(DOMAINS, 3), previous, guard(timeout_seconds=timeout))
    assert not outcome.accepted
    np.testing.assert_array_equal(outcome.mix, previous)
    assert outcome.mix is not previous
    assert outcome.error is not None
    assert re.search(rf"policy 'calls' failed at step 3: .*{message}.*; the previous mix stays in force", outcome.error)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in errors] == [outcome.error]


def test_a_policy_within_its_time_runs_in_a_thread_and_is_accepted(make_history: MakeHistory) -> None:
    seen = []

    def propose(history: History) -> FloatArray:
        seen.append(threading.current_thread())
        return np.array([1.0, 0.0, 0.0, 0.0])

    outcome = propose_guarded(Calls(propose), make_history(DOMAINS), EVEN, guard(timeout_seconds=30.0))
    assert outcome.accepted
    assert seen[0] is not threading.current_thread()


def test_a_policy_that_always_answers_is_called_directly(make_history: MakeHistory) -> None:
    """To wake another core for the agent, with nothing of it in its caches, can take longer than the agent. But a class
    that inherits from one that always answers may do something else."""
    seen = []

    class Inherits(StaticPolicy):
        def propose(self, history: History) -> FloatArray:
            seen.append(threading.current_thread())
            return super().propose(history)

    class Answers(Inherits):
        always_answers = True

    for policy in (Answers, Inherits):
        outcome = propose_guarded(
            policy([1.0, 0.0, 0.0, 0.0]), make_history(DOMAINS), EVEN, guard(timeout_seconds=30.0)
        )
        assert outcome.accepted
    assert seen[0] is threading.current_thread()
    assert seen[1] is not threading.current_thread()
    assert AgentPolicy.always_answers
    assert LinearSchedule.always_answers


def test_a_late_policy_is_left_behind_and_not_called_again_until_it_has_ended(
    make_history: MakeHistory, caplog: pytest.LogCaptureFixture
) -> None:
    """Waiting for it would hold up every rank, two calls at once would mix up its state, and its late answer belongs to
    no later step."""
    release, calls = threading.Event(), []

    def propose(history: History) -> FloatArray:
        calls.append(len(history))
        if len(calls) == 1:
            release.wait(30)
            return np.array([1.0, 0.0, 0.0, 0.0])
        return np.array([0.0, 1.0, 0.0, 0.0])

    policy, limited = Calls(propose), guard(timeout_seconds=0.2)
    late = propose_guarded(policy, make_history(DOMAINS, 1), EVEN, limited)
    busy = propose_guarded(policy, make_history(DOMAINS, 2), EVEN, limited)
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 2
    release.set()
    assert limited._caller._late.done.wait(20)
    good = propose_guarded(policy, make_history(DOMAINS, 3), EVEN, limited)
    assert not late.accepted
    assert late.error is not None
    assert "no answer within 0.2 s" in late.error
    assert 0.2 <= late.seconds < 10
    assert not busy.accepted
    assert busy.error is not None
    assert "still busy" in busy.error
    assert calls == [1, 3]
    assert good.accepted
    assert good.mix.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_policy_cannot_rewrite_the_history(make_history: MakeHistory) -> None:
    def propose(history: History) -> FloatArray:
        history.mixes[:] = 0.0
        return EVEN

    history = make_history(DOMAINS, 3)
    before = history.mixes.copy()
    outcome = propose_guarded(Calls(propose), history, EVEN, guard())
    np.testing.assert_array_equal(history.mixes, before)
    assert not outcome.accepted
    assert history.mixes.flags.writeable


def test_the_users_interrupt_is_not_swallowed(make_history: MakeHistory) -> None:
    def interrupt(history: History) -> FloatArray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        propose_guarded(Calls(interrupt), make_history(DOMAINS), EVEN, guard())

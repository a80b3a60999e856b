"""Decisions: when they are due, what the policy sees, and what becomes of its answer."""

from __future__ import annotations

import copy
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from samplers import logged

from dmagent_loader import DecisionConfig, MixingAgent
from dmagent_loader.agent import AgentConfig
from dmagent_loader.errors import ConfigurationError, DomainError, FeedbackError, StateError
from dmagent_loader.mixture.history import FeedbackStatistics, History
from dmagent_loader.policies import GuardConfig, StaticPolicy
from dmagent_loader.testing import sample_ids


class Scripted:
    """A policy that returns what it is told and remembers what it saw."""

    def __init__(self, *proposals):
        self.name, self.proposals, self.seen = "scripted", list(proposals), []

    def propose(self, history: History):
        self.seen.append(history)
        proposal = self.proposals.pop(0)
        if isinstance(proposal, Exception):
            raise proposal
        return proposal


def test_decisions_are_due_before_the_first_sample_and_every_interval(build):
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    due = []
    for consumed in range(0, 100, 4):
        if sampler.reweight_due(consumed):
            due.append(consumed)
            list(itertools.islice(sampler, consumed - sampler.state_dict()["consumed"]))
            sampler.reweight({"general": -2.0, "math": -1.0}, consumed=consumed)
    assert due == [0, 32, 64, 96]


def test_feedback_on_the_wrong_number_of_fields_stops_at_the_first_call(build):
    """Each decision would fail in the policy, and the run would go to its end on the first mix."""
    sampler = build(agent="dmagent-rl")
    with pytest.raises(ConfigurationError, match=r"1 field\(s\) \['general'\], but agent 'dmagent-rl' reads 2"):
        sampler.reweight({"general": -2.0}, consumed=0)
    assert not sampler.measurements
    assert sampler.reweight({"general": -2.0, "math": -1.0}, consumed=0).in_force


def test_the_policy_sees_the_achieved_mixes_and_all_feedback(build):
    policy = Scripted([0.5, 0, 0.5, 0], [0, 0, 0, 1.0], [0.25] * 4)
    sampler = build(policy=policy, start_state={"source/web": 1.0}, exhausted="repeat")
    for consumed, feedback in ((0, -3.0), (32, -2.5), (64, -2.0)):
        sample_ids(sampler, consumed - sampler.state_dict()["consumed"])
        sampler.reweight({"general": feedback, "math": feedback - 1}, consumed=consumed)
    history = policy.seen[-1]
    assert history.fields == ("general", "math")
    assert history.mixes[0].tolist() == [1, 0, 0, 0]
    assert history.mixes[1].tolist() == [0.5, 0, 0.5, 0]
    assert history.mixes[2].tolist() == [0, 0, 0, 1]
    assert history.feedback.tolist() == [[-3.0, -4.0], [-2.5, -3.5], [-2.0, -3.0]]


def test_fields_keep_their_order_where_json_is_sorted(build):
    """As the Trainer writes it: the agent reads the field to keep from the first column, by whatever name."""

    def run(sampler, steps):
        for consumed in steps:
            sample_ids(sampler, consumed - sampler.state_dict()["consumed"])
            sampler.reweight({"general": -2.0, "code": -5.0 + consumed / 100}, consumed=consumed)

    straight, resumed = Scripted(*[[0.25] * 4] * 4), Scripted(*[[0.25] * 4] * 4)
    run(build(policy=straight), (0, 32, 64))
    first, second = build(policy=resumed), build(policy=resumed)
    run(first, (0, 32))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), sort_keys=True)))
    run(second, (64,))
    assert resumed.seen[-1].fields == straight.seen[-1].fields == ("general", "code")
    assert resumed.seen[-1].feedback.tolist() == straight.seen[-1].feedback.tolist()


def test_a_decision_asks_the_plan_only_for_counts_it_does_not_know(build, monkeypatch):
    """Asking for the counts of all steps anew makes the 80th decision take 160 times as long as the first."""
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    asked, counts, stream = [], sampler.plan.counts, iter(sampler)
    monkeypatch.setattr(sampler.plan, "counts", lambda index: asked.append(index) or counts(index))
    for step in range(6):
        sampler.reweight({"general": -2.0}, consumed=4 * step)
        list(itertools.islice(stream, 4))
    assert max(asked.count(index) for index in asked) <= 2


def test_a_policy_needs_no_name(build):
    class Even:
        def propose(self, history):
            return np.full(len(history.domains), 1 / len(history.domains))

    class Broken:
        def propose(self, history):
            raise RuntimeError("no idea")

    assert build(policy=Even()).reweight({"general": -4.0}, consumed=0).entry.decided_by == "Even"
    assert not build(policy=Broken()).reweight({"general": -4.0}, consumed=0).in_force


def test_a_failing_policy_leaves_the_last_good_mix_and_says_so(build, caplog):
    good = {"source/web": 0.5, "target/math": 0.5}
    policy = Scripted([0.5, 0, 0.5, 0], [np.nan] * 4, RuntimeError("out of ideas"), [0.9, 0.9, 0, 0])
    sampler = build(policy=policy)
    for consumed in (0, 32, 64, 96):
        sample_ids(sampler, consumed - sampler.state_dict()["consumed"])
        decision = sampler.reweight({"general": -3.0, "math": -2.0}, consumed=consumed)
        assert decision.in_force == (consumed == 0)
        assert {d: w for d, w in sampler.mix.items() if w} == good
    assert [entry.accepted for entry in sampler.ledger] == [True, False, False, False]
    assert "out of ideas" in sampler.ledger[2].note
    assert caplog.text.count("the previous mix stays in force") == 3


def test_shadow_mode_logs_and_keeps_the_mix(build):
    sampler = build(policy=Scripted([0.0, 0.0, 1.0, 0.0]), deciding=DecisionConfig(shadow=True))
    before = sampler.mix
    decision = sampler.reweight({"general": -3.0, "math": -2.0}, consumed=0)
    assert decision.proposed["target/math"] == 1.0
    assert not decision.in_force
    assert sampler.mix == before
    assert len(sampler.ledger) == 1


def test_the_guard_limits_what_a_policy_may_do(build):
    guard = GuardConfig(floor={"source/web": 0.3}, max_change=0.2)
    sampler = build(
        policy=Scripted([0.0, 0.0, 1.0, 0.0]), initial_mix={"source/web": 1.0}, deciding=DecisionConfig(guard=guard)
    )
    sampler.reweight({"general": -3.0, "math": -2.0}, consumed=0)
    assert sampler.mix["source/web"] == pytest.approx(0.8)


def test_an_agent_decides_and_a_restored_run_decides_the_same(build):
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(statistics=FeedbackStatistics(mean=(-3.0, -3.0), std=(0.5, 0.5), count=9)))

    def run(sampler, consumed, until):
        while consumed < until:
            if sampler.reweight_due(consumed):
                sampler.reweight({"general": -3 - 0.01 * consumed, "math": -4 + 0.02 * consumed}, consumed=consumed)
            sample_ids(sampler, 8)
            consumed += 8
        return sampler.ledger.to_json()

    whole = run(build(agent=agent), 0, 120)
    assert len({tuple(entry["mix"]) for entry in whole}) == 4
    half = build(agent=agent)
    run(half, 0, 56)
    resumed = build(agent=agent)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert run(resumed, 56, 120) == whole


def test_a_policy_that_is_never_asked_is_warned_of(build, caplog):
    """A forgotten callback, or loop without decisions, would train on the initial mix in silence."""
    policy = StaticPolicy({"source/web": 0.5, "target/math": 0.5})
    with caplog.at_level(logging.WARNING):
        sampler = build(policy=policy)
        sample_ids(sampler, 5)
        sample_ids(sampler, 5)
    assert caplog.text.count("before its first decision") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sampler = build(policy=policy)
        sampler.reweight({"general": -2.0}, consumed=0)
        sample_ids(sampler, 5)
        sample_ids(build(), 5)
    assert caplog.text == ""


def test_losses_in_the_place_of_log_probabilities_are_warned_of(build, caplog):
    build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5})).reweight({"general": 6.9}, consumed=0)
    assert logged(caplog, "pass -loss")


def test_feedback_that_names_no_fields_is_refused(build):
    with pytest.raises(FeedbackError, match="must map each field to a number"):
        build(policy=Scripted([0.25] * 4)).reweight([-2.0, -3.0], consumed=0)


def test_bad_feedback_and_consumed_are_refused(build):
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    with pytest.raises(FeedbackError, match=r"not finite.*math"):
        sampler.reweight({"general": -1.0, "math": float("nan")}, consumed=0)
    sampler.reweight({"general": -1.0, "math": -2.0}, consumed=0)
    sample_ids(sampler, 10)
    with pytest.raises(ConfigurationError, match="only 10 samples were handed out"):
        sampler.reweight({"general": -1.0, "math": -2.0}, consumed=11)
    with pytest.raises(FeedbackError, match=r"\['general', 'code'\]"):
        sampler.reweight({"general": -1.0, "code": -2.0}, consumed=10)
    with pytest.raises(ConfigurationError, match="train between"):
        sampler.reweight({"general": -1.0, "math": -2.0}, consumed=0)
    with pytest.raises(ConfigurationError, match="needs a policy"):
        build().reweight({"general": -1.0, "math": -2.0}, consumed=0)
    with pytest.raises(DomainError, match="target/x"):
        sampler.set_mix({"target/x": 1.0})


@pytest.mark.parametrize("consumed", [-1, 1.5, 2**63, True])
def test_an_impossible_number_of_consumed_samples_is_refused(build, consumed):
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    for call in (
        lambda: sampler.seek(consumed),
        lambda: sampler.reweight_due(consumed),
        lambda: sampler.state_dict(consumed),
        lambda: sampler.reweight({"general": -4.0}, consumed=consumed),
    ):
        with pytest.raises((ConfigurationError, StateError), match="consumed"):
            call()
    assert len(sampler.ledger) == 1


def test_a_copy_for_workers_does_not_decide(build):
    with pytest.raises(StateError, match="kept by the original in the main process"):
        copy.deepcopy(build()).reweight({"a": 1.0}, consumed=0)

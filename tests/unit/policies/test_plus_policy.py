"""`PlusPolicy`: the influence policy exactly before training, any domains, and the same after a restart."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.agent.plus.observation import Memory
from dmagent_loader.errors import CheckpointError, ConfigurationError, PolicyError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.policies import InfluencePolicy, InformedPolicy, PlusPolicy, make_policy
from dmagent_loader.policies.passes import PassLimitedPolicy

FIELDS = ("general", "math")
SPACE = DomainSpace.from_names(["source/a", "source/b", "source/c", "target/x", "target/y"])
NATURAL = np.array([0.3, 0.2, 0.1, 0.25, 0.15])


def scores(space=SPACE, seed=0, error=0.1):
    values = np.random.default_rng(seed).normal(size=(2, len(space)))
    return Influence(scores=scores_from(FIELDS, space.names, values, np.full_like(values, error)), way="gradient")


def history(space=SPACE, steps=12, keep=-0.01, seed=1):
    rng = np.random.default_rng(seed)
    feedback = np.stack([-4 + keep * np.arange(steps), -3 + 0.1 * np.arange(steps)], axis=1)
    return History(
        domains=space.names, fields=FIELDS, mixes=rng.dirichlet(np.ones(len(space)), steps), feedback=feedback
    )


def trained(seed=3, scale=0.3):
    """A network whose output weights are not 0, as after training."""
    network = PlusNetwork.untrained(seed)
    return network.with_vector(
        network.vector() + scale * np.random.default_rng(seed).normal(size=len(network.vector()))
    )


def length(limit=8_000, interval=100, repeats=True):
    rows = np.array([3000, 2000, 1000, 250, 150])
    return RunLength(rows=rows, repeats=np.full(5, repeats), limit=limit, ending=(), interval=interval)


def informed(policy, evidence=None, run=None):
    for need in sorted(policy.needed(0)):
        if need == "questions":
            policy.inform(need, {name: [f"{name} question"] for name in FIELDS})
        else:
            policy.inform(need, {"influence": evidence or scores(), "length": run or length()}[need])
    return policy


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("seed", range(5))
def test_untrained_it_is_the_influence_policy_exactly(steps, seed):
    plus = informed(PlusPolicy(PlusNetwork.untrained(seed), SPACE, NATURAL), scores(seed=seed))
    influence = informed(InfluencePolicy.configured(SPACE, NATURAL), scores(seed=seed))
    assert plus.propose(history(steps=steps)).tolist() == influence.propose(history(steps=steps)).tolist()


def unmeasured(policy):
    policy.needed(0)
    policy.inform("influence", None)
    return informed(policy)


@pytest.mark.parametrize("network", [PlusNetwork.untrained(), trained()], ids=["untrained", "trained"])
def test_without_a_measurement_it_is_the_influence_policy_too(network):
    """A trained network has never seen a run without one, so what it returns there is not to be relied on."""
    plus = unmeasured(PlusPolicy(network, SPACE, NATURAL)).propose(history())
    influence = unmeasured(InfluencePolicy.configured(SPACE, NATURAL)).propose(history())
    assert plus.tolist() == influence.tolist()
    kept = unmeasured(PlusPolicy(network, SPACE, NATURAL, balance=0.2)).propose(history())
    assert kept[3:].sum() < influence[3:].sum()
    assert kept[:3] / kept[:3].sum() == pytest.approx(influence[:3] / influence[:3].sum())


def test_exchanged_fields_are_reported_with_a_remedy_that_the_sampler_takes(caplog):
    space = DomainSpace.from_names(["source/web", "target/math"])
    PlusPolicy(trained(), space, np.array([0.5, 0.5])).check_fields(("math", "web"))
    assert "pass deciding=DecisionConfig(roles={'keep': 'web', 'acquire': 'math'})" in caplog.text


def test_settings_beside_a_plus_policy_are_refused_with_a_way_that_works(caplog):
    """The form with a schedule is policy=, which does not take the settings of an agent."""
    space, natural = DomainSpace.from_names(["source/web", "target/math"]), np.array([0.5, 0.5])
    linear = partial(PlusPolicy.from_pretrained, "dmagent-plus", learning_rate=lambda progress: 1 - progress)
    exchanged = {"keep": "web", "acquire": "math"}
    make_policy(None, linear, space, natural).check_fields(("math", "web"))
    assert "or roles= to a PlusPolicy of your own" in caplog.text
    for settings in ({"roles": exchanged}, {"balance": 0.4}, {"floor": 0.02}):
        with pytest.raises(ConfigurationError, match=f"PlusPolicy as policy= takes .*{next(iter(settings))}="):
            make_policy(None, linear, space, natural, **settings)
        assert isinstance(make_policy(None, partial(linear, **settings), space, natural), PlusPolicy)


def test_a_measurement_with_other_questions_is_refused_by_name():
    plus = informed(PlusPolicy(trained(), SPACE, NATURAL))
    other = History(domains=SPACE.names, fields=("general", "code"), mixes=NATURAL[None], feedback=np.zeros((1, 2)))
    with pytest.raises(PolicyError, match=r"influence on \['code'\] was not measured, only that on"):
        plus.propose(other)


def test_a_trained_network_moves_the_mix_and_it_stays_a_mix():
    plus = informed(PlusPolicy(trained(), SPACE, NATURAL))
    mix = plus.propose(history())
    assert mix.sum() == pytest.approx(1.0)
    assert (mix >= 0).all()
    assert np.abs(mix - informed(InfluencePolicy.configured(SPACE, NATURAL)).propose(history())).max() > 0.01


def test_feedback_and_progress_reach_the_mix():
    plus = informed(PlusPolicy(trained(), SPACE, NATURAL))
    assert np.abs(plus.unlimited(history(keep=-0.05)) - plus.unlimited(history(keep=0.05))).max() > 1e-3
    early = informed(PlusPolicy(trained(), SPACE, NATURAL, decisions=1000)).unlimited(history())
    late = informed(PlusPolicy(trained(), SPACE, NATURAL, decisions=13)).unlimited(history())
    assert np.abs(early - late).max() > 1e-3


def test_progress_follows_from_the_length_of_the_run():
    """80 decisions by `decisions=` and by 8,000 samples with 100 between decisions are the same."""
    stated = informed(PlusPolicy(trained(), SPACE, NATURAL, decisions=80), run=length(interval=100))
    derived = informed(PlusPolicy(trained(), SPACE, NATURAL), run=length(interval=100))
    unknown = informed(PlusPolicy(trained(), SPACE, NATURAL), run=length(interval=None))
    assert np.allclose(stated.unlimited(history()), derived.unlimited(history()))
    assert not np.allclose(unknown.unlimited(history()), derived.unlimited(history()))


def test_the_length_of_the_run_is_asked_for_without_a_limit_on_passes_too():
    without = InfluencePolicy.configured(SPACE, NATURAL, most_passes=None)
    plus = PlusPolicy(trained(), SPACE, NATURAL, prior=without)
    assert "length" in plus.needed(0)
    informed(plus)
    assert not plus.needed(0)
    assert np.allclose(plus.unlimited(history()), informed(PlusPolicy(trained(), SPACE, NATURAL)).unlimited(history()))
    assert plus.needed(1) == {"length"}


def test_more_weight_on_acquiring_never_lowers_the_target_share_of_the_untrained_network():
    shares = []
    for balance in (0.0, 0.2, 0.5, 0.8, 1.0):
        plus = informed(PlusPolicy(PlusNetwork.untrained(), SPACE, NATURAL, balance=balance))
        shares.append(plus.propose(history())[3:].sum())
    assert shares == sorted(shares)
    assert shares[2] == pytest.approx(0.3)
    assert shares[0] < 0.2
    assert shares[-1] > 0.5


@pytest.mark.parametrize("settings", [{"balance": 0.4}, {"floor": 0.02}])
@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["target/x", "target/y"], "a field other than 'target'"),
        (["source/a", "source/b"], "the field 'target'"),
        (["source/a", "target/x"], None),
    ],
)
def test_a_balance_or_floor_without_two_fields_to_weigh_is_warned_of(settings, names, missing, caplog):
    """It was accepted without a word, and nobody saw that it could not keep more of anything."""
    natural, space = np.array([0.5, 0.5]), DomainSpace.from_names(names)
    PlusPolicy(PlusNetwork.untrained(), space, natural)
    assert not caplog.records
    PlusPolicy(PlusNetwork.untrained(), space, natural, **settings)
    expected = [] if missing is None else [f"but the data have no domains of {missing}, so their weight cannot change"]
    assert len(caplog.records) == len(expected)
    assert all(text in caplog.text for text in expected)


def test_a_floor_lowers_the_target_share_while_the_field_to_keep_is_below_it():
    below = informed(PlusPolicy(PlusNetwork.untrained(), SPACE, NATURAL, floor=0.02)).propose(history(keep=-0.01))
    above = informed(PlusPolicy(PlusNetwork.untrained(), SPACE, NATURAL, floor=0.02)).propose(history(keep=0.01))
    assert below[3:].sum() < 0.3 < above[3:].sum()


def test_the_floor_recovers_after_a_loss_is_made_good():
    """An unlimited integral would stay at its end for as long as the loss has lasted."""
    policy = PlusPolicy(PlusNetwork.untrained(), SPACE, NATURAL, floor=0.02)
    lost, good = np.tile([[-0.2, 0.0]], (200, 1)), np.tile([[0.1, 0.0]], (60, 1))
    assert policy.balances(lost, 5.0) < 0.05
    assert policy.balances(np.vstack([lost, good]), 5.0) > 0.7


def test_roles_exchange_the_fields():
    plain = informed(PlusPolicy(trained(), SPACE, NATURAL))
    exchanged = informed(PlusPolicy(trained(), SPACE, NATURAL, roles={"keep": "math", "acquire": "general"}))
    assert not np.allclose(plain.unlimited(history()), exchanged.unlimited(history()))
    with pytest.raises(ConfigurationError, match=r"roles names \['maths'\]"):
        PlusPolicy(trained(), SPACE, NATURAL, roles={"keep": "maths", "acquire": "general"}).check_fields(FIELDS)


def test_a_restored_policy_proposes_the_same():
    plus = informed(PlusPolicy(trained(), SPACE, NATURAL))
    restored = PlusPolicy(trained(), SPACE, NATURAL)
    restored.load_state_dict(json.loads(json.dumps(plus.state_dict())))
    for need in restored.needed(12):
        restored.inform(need, length())
    assert restored.propose(history()).tolist() == plus.propose(history()).tolist()
    for damaged in ({}, {"prior": {}, "measured_at": 0}, {**plus.state_dict(), "measured_at": "x"}):
        with pytest.raises(StateError):
            PlusPolicy(trained(), SPACE, NATURAL).load_state_dict(damaged)


def test_it_is_what_the_integrations_and_combinations_know():
    plus = PlusPolicy(trained(), SPACE, NATURAL)
    assert isinstance(plus, InformedPolicy)
    assert isinstance(plus, PassLimitedPolicy)


@pytest.mark.parametrize(
    "settings", [{"balance": 1.5}, {"floor": -0.1}, {"balance": 0.5, "floor": 0.1}, {"roles": {"keep": "general"}}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ConfigurationError):
        PlusPolicy(trained(), SPACE, NATURAL, **settings)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (3e-4, "learning_rate is 0.0003; pass a function"),
        (lambda progress: None, "learning_rate returned None at 0 of the run"),
        (lambda progress: float("nan"), "learning_rate returned nan"),
        (lambda progress: 100 * (1 - progress), "between 0 and 1"),
        (lambda progress: 0.5 - progress, r"returned -0.01\d* at 0.51 of the run"),
        (lambda progress: 3e-4 * (1 - progress), "divide it by the peak learning rate"),
    ],
)
def test_a_schedule_that_is_no_part_of_the_maximum_is_refused(schedule, message):
    """It would fail at every decision, or silently count as a learning rate near 0."""
    with pytest.raises(ConfigurationError, match=message):
        PlusPolicy(trained(), SPACE, NATURAL, learning_rate=schedule)


def test_the_learning_rate_reaches_the_mix():
    def cosine(progress):
        return np.float32(0.5 + 0.5 * np.cos(np.pi * progress))

    unknown, late = (informed(PlusPolicy(trained(), SPACE, NATURAL, learning_rate=rate)) for rate in (None, cosine))
    assert np.abs(unknown.unlimited(history()) - late.unlimited(history())).max() > 1e-4


def test_a_decision_does_not_depend_on_later_ones():
    """Compressed history, step by step, equals the closed form on every prefix."""
    whole = history(steps=30)
    gains = whole.feedback - whole.feedback[0]
    memory = Memory.empty((), len(SPACE))
    for step in range(1, 30):
        memory = memory.after(whole.mixes[step], gains[step], 4.0)
        closed = Memory.of(whole.mixes[1 : step + 1], gains[1 : step + 1], 4.0)
        assert np.allclose(memory.gains(), closed.gains())
        assert np.allclose(memory.exposure, closed.exposure)
        assert memory.steps == closed.steps


def test_a_checkpoint_round_trip_and_loading_by_agent(tmp_path):
    checkpoint.save(trained(), tmp_path / "mine", card="A card")
    network, name = checkpoint.load(tmp_path / "mine")
    assert name == "mine"
    assert np.allclose(network.vector(), trained().vector(), atol=1e-6)
    policy = make_policy(tmp_path / "mine", None, SPACE, NATURAL, roles={"keep": "math", "acquire": "general"})
    assert isinstance(policy, PlusPolicy)
    assert policy.name == "mine"
    floored = make_policy(tmp_path / "mine", None, SPACE, NATURAL, floor=0.1)
    assert isinstance(floored, PlusPolicy)
    assert floored.balances(np.full((50, 2), -0.5), 5.0) < 0.1
    for agent, policy in (("dmagent-rl", None), (None, "influence")):
        with pytest.raises(ConfigurationError, match="balance and floor are for agent='dmagent-plus'"):
            make_policy(agent, policy, SPACE, NATURAL, balance=0.3)
    with pytest.raises(ConfigurationError, match="topics and standardization"):
        make_policy(tmp_path / "mine", None, SPACE, NATURAL, topics="influence")
    with pytest.raises(CheckpointError, match=r"PlusPolicy\.from_pretrained"):
        MixingAgent.from_pretrained(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"MixingAgent\.from_pretrained"):
        checkpoint.load("dmagent-rl")


@pytest.mark.parametrize(
    "change",
    [{"width": 0}, {"width": 10, "queries": 3}, {"run_features": ["other"]}, {"run_features": None}, {"width": "12"}],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, change):
    checkpoint.save(trained(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path)


def test_a_checkpoint_of_a_later_kind_is_refused_with_its_kind(tmp_path):
    checkpoint.save(trained(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "dmagent-plus-2"}))
    with pytest.raises(CheckpointError, match=r"has the kind 'dmagent-plus-2', .*install a newer one"):
        make_policy(tmp_path, None, SPACE, NATURAL)


def test_fields_of_other_names_are_decided_too():
    space = DomainSpace.from_names(["a", "b", "c"], fields={"a": "web", "b": "web", "c": "books"})
    natural = np.array([0.5, 0.2, 0.3])
    plus = informed(
        PlusPolicy(trained(), space, natural),
        scores(space),
        replace(length(), rows=np.array([9, 9, 9]), repeats=np.full(3, True)),
    )
    assert plus.propose(history(space)).sum() == pytest.approx(1.0)

"""What informed policies are given between two steps, and what happens where it cannot be had."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dmagent_loader import AgentWeightedSampler, Environment, Mixing, ReadingConfig
from dmagent_loader.environment import RowEnvironment
from dmagent_loader.errors import ConfigurationError, InfluenceError
from dmagent_loader.policies import InfluencePolicy, Olmix, OnlineDataMixing, ProxyTable
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import ShiftedTokens, packed_tokens

DOMAINS = {"source/Science": 40, "source/Sports": 40, "target/Finance": 40, "target/Health": 40}
QUESTIONS = {
    "keep": [("Which planet orbits the sun fastest?", "Mercury"), ("What do cells divide by?", "Mitosis")],
    "acquire": [("The bank pays 5 percent interest on a loan of 100 dollars. How much?", "5 dollars")] * 2,
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(256, 256)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def mixing(tmp_path, policy, questions=QUESTIONS, domains=DOMAINS, **settings):
    sampler = AgentWeightedSampler(
        write_toy_shards(tmp_path, domains, tokens=16),
        policy=policy,
        **{"samples_per_reweight": 10, **settings},
        reading=ReadingConfig(progress=False),
    )
    environment = Environment.from_pairs(questions, lambda text: list(text.encode()), progress=False)
    return Mixing(sampler, environment)


def test_influence_is_measured_before_the_first_decision_only(tmp_path):
    run, model, asked = mixing(tmp_path, "influence"), Model(), []

    def measure(environment, rows, settings):
        asked.append({domain: len(listed) for domain, listed in rows.items()})
        return environment.influence(model, rows, **settings)

    run.begin()
    for consumed in (0, 10, 20):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        report = run.reweight(lambda environment: environment.evaluate(model), measure=measure)
        assert 0 < report.full["dmagent/evidence_share"] <= 1
        assert ("dmagent/influence_seconds" in report.full) == (consumed == 0)
        assert report.decision.outcome.accepted
    assert asked == [DOMAINS]  # all 40 rows of each, as they are stored, without transform=


@pytest.mark.parametrize(
    ("domains", "rows"),
    [({"source/a": 900, "target/b": 40}, [832, 40]), ({f"source/{i:02d}": 40 for i in range(60)}, [32] * 60)],
    ids=["few", "many"],
)
def test_few_domains_are_read_in_more_rows(tmp_path, domains, rows):
    """The scores of a few large domains differ less from each other than those of many, so noise must be smaller."""
    asked = []

    def measure(environment, rows, settings):
        asked.append([len(listed) for listed in rows.values()])
        raise InfluenceError("far enough")

    run = mixing(tmp_path, "influence", domains=domains)
    run.begin()
    run.reweight(lambda environment: environment.evaluate(Model()), measure=measure)
    assert asked == [rows]


@pytest.mark.parametrize("fails", [True, False])
def test_where_influence_cannot_be_had_the_topics_of_the_questions_decide_and_the_log_says_so(tmp_path, caplog, fails):
    run = mixing(tmp_path, "influence")

    def measure(environment, rows, settings):
        raise InfluenceError("no room at all")

    run.begin()
    with caplog.at_level(logging.WARNING):
        report = run.reweight(lambda environment: environment.evaluate(Model()), measure=measure if fails else None)
    assert "decides without influence" in caplog.text
    assert ("no room at all" in caplog.text) == fails
    mix = report.decision.proposed
    assert mix["source/Science"] > 2 * mix["source/Sports"]
    assert mix["target/Finance"] > 2 * mix["target/Health"]


def test_question_topics_needs_no_gradients(tmp_path, caplog):
    run = mixing(tmp_path, "question-topics")
    run.begin()
    mix = run.reweight(lambda environment: environment.evaluate(Model())).decision.proposed
    assert mix["source/Science"] > 2 * mix["source/Sports"]
    assert "without influence" not in caplog.text


def test_the_state_has_what_the_policy_learnt_and_another_policy_leaves_it_aside(tmp_path):
    run = mixing(tmp_path, "question-topics")
    run.begin()
    run.reweight(lambda environment: environment.evaluate(Model()))
    state = run.sampler.state_dict(consumed=0)
    assert set(state["policy_state"]["topics"]) == {"source", "target"}
    other = mixing(tmp_path, "influence")
    other.sampler.load_state_dict(state)
    assert other.sampler.policy.influence is None


def test_a_policy_that_asks_for_what_nobody_has_is_refused(tmp_path):
    class Wanting(InfluencePolicy):
        def needed(self, decision):
            return frozenset({"the moon"})

    run = mixing(tmp_path, None)
    space = run.sampler.space
    run = mixing(tmp_path, Wanting(space, np.full(len(space), 1 / len(space))))
    run.begin()
    with pytest.raises(ConfigurationError, match="the moon"):
        run.reweight(lambda environment: environment.evaluate(Model()))


@pytest.mark.parametrize("policy", ["question-topics", "odm"])
def test_evidence_about_former_questions_is_collected_again_after_a_resume(tmp_path, policy, caplog):
    """A corrected question set would otherwise have no effect. Losses on the domains do not depend on it."""
    first = mixing(tmp_path, policy)
    first.begin()
    first.reweight(lambda environment: environment.evaluate(Model()))
    state = first.state_dict()
    assert "policy_state" in state["sampler"]
    same, other = mixing(tmp_path, policy), mixing(tmp_path, policy, questions={**QUESTIONS, "keep": [("a", "b")] * 3})
    same.load_state_dict(state)
    assert same.sampler.policy.state_dict() == first.sampler.policy.state_dict()
    assert "cannot be compared" not in caplog.text
    other.load_state_dict(state)
    assert "cannot be compared" in caplog.text
    is_fresh = other.sampler.policy.state_dict() == mixing(tmp_path, policy).sampler.policy.state_dict()
    assert is_fresh == (policy == "question-topics")
    assert ("is about the questions before the checkpoint" in caplog.text) == is_fresh


def test_an_unknown_name_of_a_policy_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigurationError, match="'influence', 'question-topics', 'natural', 'uniform' or 'odm'"):
        mixing(tmp_path, "influenze")


def test_a_later_measurement_that_is_unavailable_is_not_tried_again_before_the_next_is_due(tmp_path, caplog):
    """Catches an endless loop: the policy has a measurement, so it has no reason to fall back."""
    space = mixing(tmp_path / "space", None).sampler.space
    run = mixing(tmp_path, InfluencePolicy(space, np.full(4, 0.25), every=1))
    model, tried = Model(), []

    def measure(environment, rows, settings):
        tried.append(run.consumed)
        if run.consumed == 10:
            raise InfluenceError("the model has diverged")
        return environment.influence(model, rows, **settings)

    run.begin()
    for consumed in (0, 10, 20):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        assert run.reweight(lambda environment: environment.evaluate(model), measure=measure).decision.outcome.accepted
    assert tried == [0, 10, 20]
    assert len(run.sampler.policy.state_dict()["measured"]) == 2


def test_documents_without_a_token_to_predict_are_left_out_of_the_measurement(tmp_path):
    """Training accepts empty documents; every restart of a run would fail at the same ones."""
    run, asked = mixing(tmp_path, "influence"), {}

    def empty_now_and_then(sample):
        row = int(sample["__key__"].rsplit("_", 1)[-1])
        return {"input_ids": sample["input_ids.npy"][: row % 3]}

    def measure(environment, rows, settings):
        asked.update({domain: len(listed) for domain, listed in rows.items()})
        return environment.influence(Model(), rows, **settings)

    run.sampler.bind(transform=empty_now_and_then)
    run.begin()
    assert run.reweight(lambda environment: environment.evaluate(Model()), measure=measure).decision.outcome.accepted
    assert all(0 < count < 16 for count in asked.values())


def test_domains_without_any_token_to_predict_fall_back_on_the_topics(tmp_path, caplog):
    run = mixing(tmp_path, "influence")
    run.sampler.bind(transform=lambda sample: {"input_ids": sample["input_ids.npy"][:1]})
    run.begin()
    report = run.reweight(
        lambda environment: environment.evaluate(Model()),
        measure=lambda environment, rows, settings: environment.influence(Model(), rows, **settings),
    )
    assert "none with a token to predict" in caplog.text
    assert report.decision.outcome.accepted


def test_the_agent_with_the_topics_of_influence_takes_the_share_and_not_the_topics_from_the_agent(tmp_path, caplog):
    """The agent's warning of questions on other topics does not apply: it no longer chooses the topics."""
    alone = mixing(tmp_path / "alone", None, agent="dmagent-rl")
    run = mixing(tmp_path / "both", None, agent="dmagent-rl", topics="influence")
    model = Model()
    agents = alone.reweight(lambda environment: environment.evaluate(model)).decision
    caplog.clear()
    run.begin()
    report = run.reweight(
        lambda environment: environment.evaluate(model),
        measure=lambda environment, rows, settings: environment.influence(model, rows, **settings),
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert report.decision.policy == "dmagent-rl+influence"
    assert report.short["mix/target"] == pytest.approx(
        agents.proposed["target/Finance"] + agents.proposed["target/Health"]
    )
    ratios = [mix["target/Finance"] / mix["target/Health"] for mix in (report.decision.proposed, agents.proposed)]
    assert ratios[0] < 0.5 * ratios[1]  # the toy rows are noise, and influence keeps a part of the natural mix
    alone.begin()
    assert "are mostly about" in caplog.text


def test_the_agent_with_other_topics_still_needs_its_fields(tmp_path):
    one_field = {"keep": QUESTIONS["keep"]}
    with pytest.raises(ConfigurationError, match="1 field"):
        mixing(tmp_path, None, questions=one_field, agent="dmagent-rl", topics="question-topics").begin()


def test_the_length_of_a_run_comes_with_the_interval_between_decisions(tmp_path):
    """Without it, `PlusPolicy` does not know the progress of the run."""
    received = []

    class Listening(InfluencePolicy):
        def needed(self, decision):
            return frozenset() if received else frozenset({"length"})

        def inform(self, need, evidence):
            received.append(evidence)

        def propose(self, history):
            return self.natural

    space = mixing(tmp_path, None).sampler.space
    run = mixing(tmp_path, Listening(space, np.full(len(space), 1 / len(space))))
    run.begin()
    run.reweight(lambda environment: environment.evaluate(Model()))
    assert received[0].interval == run.sampler.samples_per_reweight > 0


def test_the_first_decision_knows_the_planned_interval(tmp_path):
    """It is derived after the first decision; without a plan, `PlusPolicy` would take the length for unknown until
    then, a state that it was hardly trained on."""
    first = mixing(tmp_path, None, agent="dmagent-plus", samples_per_reweight=None, decisions=8)
    first.begin(samples=64)
    assert first.sampler.samples_per_reweight is None
    first.reweight(lambda environment: environment.evaluate(Model()))
    assert first.sampler.policy.passes.length.interval == 8
    first.sampler.begin_decisions()
    assert first.sampler.samples_per_reweight == 8


def test_a_policy_that_never_stops_asking_is_refused(tmp_path):
    class Insatiable(InfluencePolicy):
        def needed(self, decision):
            return frozenset({"length"})

    space = mixing(tmp_path, None).sampler.space
    run = mixing(tmp_path, Insatiable(space, np.full(len(space), 1 / len(space))))
    run.begin()
    with pytest.raises(ConfigurationError, match=r"still needs \['length'\] after 64 requests"):
        run.reweight(lambda environment: environment.evaluate(Model()))


@pytest.mark.parametrize(("samples", "times"), [(1_000, 1), (10_000_000, 3)], ids=["short", "long"])
def test_a_measurement_is_repeated_only_in_a_run_that_is_long_enough_for_its_cost(tmp_path, samples, times):
    domains = {f"source/{name}": 2000 for name in "ab"}
    space = mixing(tmp_path / "space", None, domains=domains).sampler.space
    policy = InfluencePolicy(space, np.full(2, 0.5), reliability=0.999999, max_measurements=3)
    run, model, asked = mixing(tmp_path, policy, domains=domains, exhausted="repeat"), Model(), []

    def measure(environment, rows, settings):
        asked.append(len(rows))
        return environment.influence(model, rows, **settings)

    run.begin(samples=samples)
    report = run.reweight(lambda environment: environment.evaluate(model), measure=measure)
    assert len(asked) == times
    assert report.full["dmagent/influence_tokens"] > 0


def test_a_measurement_is_repeated_although_some_rows_do_not_count(tmp_path):
    """Nearly any text has a few copies and empty documents, and a domain with some of them has more rows to read."""
    domains = dict.fromkeys(("source/a", "source/b"), 2000)
    space = mixing(tmp_path / "space", None, domains=domains).sampler.space
    policy = InfluencePolicy(space, np.full(2, 0.5), reliability=0.999999, max_measurements=3)
    run, model, asked = mixing(tmp_path, policy, domains=domains, exhausted="repeat"), Model(), []

    def transform(sample):
        if not sample["__key__"].endswith("0"):
            return {"input_ids": sample["input_ids.npy"]}
        return {"input_ids": np.arange(5 if sample["__domain__"] == "source/a" else 0)}

    def measure(environment, rows, settings):
        asked.append(len(rows))
        return environment.influence(model, rows, **settings)

    run.sampler.bind(transform=transform)
    run.begin(samples=10_000_000)
    run.reweight(lambda environment: environment.evaluate(model), measure=measure)
    assert len(asked) == 3


def test_a_repetition_that_fails_is_not_called_a_decision_without_influence(tmp_path, caplog):
    space = mixing(tmp_path / "space", None, domains=dict.fromkeys(("source/a", "source/b"), 2000)).sampler.space
    policy, model, asked = InfluencePolicy(space, np.full(2, 0.5), reliability=0.999999), Model(), []
    run = mixing(tmp_path, policy, domains=dict.fromkeys(("source/a", "source/b"), 2000), exhausted="repeat")

    def measure(environment, rows, settings):
        asked.append(len(rows))
        if len(asked) > 1:
            raise InfluenceError("no room any more")
        return environment.influence(model, rows, **settings)

    run.begin()
    run.reweight(lambda environment: environment.evaluate(model), measure=measure)
    assert len(asked) == 2
    assert "decides without another measurement of influence: no room any more" in caplog.text


def test_losses_are_measured_before_each_decision_on_the_same_rows(tmp_path):
    """The rows, scored apart, give what the policy received; the model changes in between, the rows do not."""
    run, model = mixing(tmp_path, "odm"), Model()
    run.begin()
    for consumed in (0, 10, 20):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        report = run.reweight(lambda environment: environment.evaluate(model))
        rows = {
            domain: [{"input_ids": row["input_ids.npy"].astype(int)} for row in listed]
            for domain, listed in run.sampler.probe_rows(1000).items()
        }
        expected = RowEnvironment(rows).evaluate(model)
        for domain in DOMAINS:
            assert report.full[f"loss/{domain}"] == pytest.approx(-expected[domain], abs=1e-5)
        assert report.full["dmagent/losses_tokens"] == 16 * sum(DOMAINS.values())
        assert report.full["dmagent/losses_seconds"] > 0
        assert report.decision.outcome.accepted
        with torch.no_grad():
            model.table.weight[:, consumed] += 2.0
    assert run.sampler.policy.updates == 2
    assert len({entry.mix for entry in run.sampler.ledger}) == 3


def test_a_resumed_run_makes_the_same_decisions_from_losses(tmp_path):
    def decide(run, consumed):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        return run.reweight(lambda environment: environment.evaluate(model)).decision.proposed

    model, first = Model(), mixing(tmp_path, "odm")
    first.begin()
    decide(first, 0)
    decide(first, 10)
    state = first.state_dict()
    second = mixing(tmp_path, "odm")
    second.load_state_dict(state)
    assert decide(second, 20) == decide(first, 20)


def test_where_losses_cannot_be_had_the_mix_stays_and_the_log_says_so(tmp_path, caplog):
    run = mixing(tmp_path, "odm")
    run.sampler.bind(transform=lambda sample: {"input_ids": sample["input_ids.npy"][:1]})
    run.begin()
    report = run.reweight(lambda environment: environment.evaluate(Model()))
    assert "decides without the domains' losses: none of the rows" in caplog.text
    assert report.decision.proposed == pytest.approx(dict.fromkeys(DOMAINS, 0.25))
    assert not any(name.startswith("loss/") for name in report.full)


@pytest.mark.parametrize("own_loop", [False, True], ids=["environment", "function"])
def test_a_loss_that_is_not_finite_leaves_the_mix_and_the_run_continues(tmp_path, caplog, own_loop):
    """A domain whose rows overflow once must not end a run of weeks."""

    def evaluate(environment):
        if isinstance(environment, RowEnvironment) and own_loop:
            return dict.fromkeys(environment.fields, float("nan"))
        model = Model()
        if isinstance(environment, RowEnvironment):
            with torch.no_grad():
                model.table.weight[:] = float("inf")
        return environment.evaluate(model)

    run = mixing(tmp_path, "odm")
    run.begin()
    report = run.reweight(evaluate)
    assert "decides without the domains' losses" in caplog.text
    assert "not finite" in caplog.text
    assert report.decision.outcome.accepted
    assert report.decision.proposed == pytest.approx(dict.fromkeys(DOMAINS, 0.25))
    assert not any(name.startswith("loss/") for name in report.full)


def test_rows_padded_on_the_left_have_the_losses_of_plain_rows(tmp_path):
    """The cut to 1,024 tokens left only padding, which ended the run."""
    model = Model()

    def losses(folder, transform):
        run = mixing(folder, "odm")
        run.sampler.bind(transform=transform)
        run.begin()
        full = run.reweight(lambda environment: environment.evaluate(model)).full
        return {domain: full[f"loss/{domain}"] for domain in DOMAINS}

    def padded(sample):
        tokens = sample["input_ids.npy"].astype(np.int64)
        return {
            "input_ids": np.concatenate([np.zeros(2000, np.int64), tokens]),
            "attention_mask": (np.arange(2000 + len(tokens)) >= 2000).astype(np.int64),
        }

    assert losses(tmp_path / "padded", padded) == pytest.approx(losses(tmp_path / "plain", packed_tokens), abs=1e-6)


def test_the_limit_on_the_length_of_questions_does_not_shorten_rows(tmp_path):
    run = mixing(tmp_path, "odm")
    environment = Environment.from_pairs(QUESTIONS, lambda text: list(text.encode()), progress=False, max_length=4)
    run = Mixing(run.sampler, environment)
    run.begin()
    full = run.reweight(lambda environment: environment.evaluate(Model())).full
    assert full["dmagent/losses_tokens"] == 16 * sum(DOMAINS.values())


@pytest.mark.parametrize(
    ("samples", "rows"),
    [(None, 40), (100, 8), (4_000_000, 12), (400_000_000, 40)],
    ids=["open", "short", "long", "huge"],
)
def test_losses_cost_at_most_a_hundredth_of_a_run_of_known_length(tmp_path, samples, rows):
    """Of 10 samples between two decisions, 1% of the cost is 0.3 rows read forward; of 1,600 of them, 48 rows: 12 of
    each of 4 domains."""
    run = mixing(
        tmp_path, "odm", samples_per_reweight=10 if samples == 100 else 1600 if samples == 4_000_000 else 160_000
    )
    run.begin(samples=samples)
    full = run.reweight(lambda environment: environment.evaluate(Model())).full
    assert full["dmagent/losses_tokens"] == 16 * 4 * rows


def test_the_cost_of_losses_is_limited_before_the_interval_is_derived_and_in_a_resumed_run(tmp_path):
    """Read without a limit before the first decision, the losses cost 50 times as much, until the run was resumed."""

    def decide(run, consumed):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        assert run.due()
        return run.reweight(lambda environment: environment.evaluate(model))

    def build():
        return mixing(tmp_path, "odm", samples_per_reweight=None, decisions=2500, exhausted="repeat")

    model, first, second = Model(), build(), build()
    first.begin(samples=4_000_000)
    assert first.sampler.samples_per_reweight is None
    assert decide(first, 0).full["dmagent/losses_tokens"] == 16 * 4 * 12
    first.consumed = 10
    assert not first.due()
    assert first.sampler.samples_per_reweight == 1600
    second.load_state_dict(first.state_dict())
    second.begin(samples=4_000_000)
    reports = [run.reweight(lambda environment: environment.evaluate(model)) for run in (first, second)]
    assert [report.full["dmagent/losses_tokens"] for report in reports] == [16 * 4 * 12] * 2
    assert reports[0].decision.proposed == reports[1].decision.proposed


def test_the_rows_of_losses_are_read_once(tmp_path, monkeypatch):
    run, model, read = mixing(tmp_path, "odm"), Model(), []
    probe_rows = run.sampler.probe_rows
    monkeypatch.setattr(
        run.sampler, "probe_rows", lambda *given, **more: (read.append(given), probe_rows(*given, **more))[1]
    )
    run.begin()
    for consumed in (0, 10, 20):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        assert run.reweight(lambda environment: environment.evaluate(model)).full["dmagent/losses_tokens"] > 0
    assert len(read) == 1


def test_an_evaluation_that_ignores_its_environment_cannot_give_losses(tmp_path):
    """Catches feedback of the fields taken for losses of the domains."""
    run = mixing(tmp_path, OnlineDataMixing)
    run.begin()
    with pytest.raises(ConfigurationError, match="must evaluate the environment that it is passed"):
        run.reweight(lambda _: {"keep": -3.0, "acquire": -4.0})


@pytest.mark.parametrize("length", [15, 16], ids=["longer by a token", "last position masked"])
def test_rows_shifted_for_megatron_have_the_losses_of_plain_rows(tmp_path, length):
    model = Model()

    def losses(folder, transform):
        run = mixing(folder, "odm")
        run.sampler.bind(transform=transform)
        run.begin()
        full = run.reweight(lambda environment: environment.evaluate(model)).full
        return {domain: full[f"loss/{domain}"] for domain in DOMAINS}

    shifted = losses(tmp_path / "shifted", ShiftedTokens(length=length))
    assert shifted == pytest.approx(losses(tmp_path / "plain", packed_tokens), abs=1e-6)


def test_olmix_learns_the_length_of_the_run_and_is_resumed(tmp_path):
    """The table wants all weight on one domain, whose 40 rows may be read 4 times in a run of 400 samples."""
    mixes = np.random.default_rng(0).dirichlet(np.ones(4), 60)
    losses = 2 + np.exp(-3 * mixes[:, :1])
    table = ProxyTable(domains=tuple(DOMAINS), metrics=("loss",), mixes=mixes, losses=losses)

    def decide(run, consumed):
        run.consumed = consumed
        list(zip(run.sampler, range(10), strict=False))
        return run.reweight(lambda environment: environment.evaluate(Model())).decision.proposed

    first, second = (mixing(tmp_path, partial(Olmix, table=table, kl=0.01), exhausted="repeat") for _ in range(2))
    first.begin(samples=400)
    assert decide(first, 0)["source/Science"] == pytest.approx(4 * 40 / 400, abs=1e-4)
    second.begin(samples=400)
    second.load_state_dict(first.state_dict())
    assert decide(second, 10) == decide(first, 10)

"""Tasks on real, tiny proxies: paired streams, evidence, rewards and the gymnasium environment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dmagent_loader.environment import Environment, EnvironmentSettings
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import History
from dmagent_loader.policies import INFLUENCE, LENGTH, QUESTIONS
from dmagent_loader.policies.choice import make_policy
from dmagent_loader.training.tasks.environment import MixingEnv
from dmagent_loader.training.tasks.episode import LEAST_RANGE, attainable, reward, run_episode
from dmagent_loader.training.tasks.library import TaskLibrary, held_out_pairs
from dmagent_loader.training.tasks.simulator import ProxySimulator, Start
from dmagent_loader.training.tasks.spec import Perturbation, TaskSpec


def test_a_run_is_a_function_of_task_stream_and_mixes(simulator: ProxySimulator, task: TaskSpec) -> None:
    runs = [run_episode(simulator, task, stream, lambda start: start.at(0.3)) for stream in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].feedback, runs[1].feedback)
    np.testing.assert_array_equal(runs[0].gains, runs[1].gains)
    assert (runs[0].gains != runs[2].gains).all()


def test_training_on_the_target_raises_the_field_to_acquire(simulator: ProxySimulator, task: TaskSpec) -> None:
    task = replace(task, steps=6)
    none, all_of_it = (run_episode(simulator, task, 0, lambda s, t=t: s.at(t)).gains for t in (0.0, 1.0))
    assert all_of_it[1] > none[1]
    assert none[0] > all_of_it[0]


def test_feedback_is_read_only_where_it_is_asked_for(simulator: ProxySimulator, task: TaskSpec) -> None:
    """The questions do not touch the model: its gains are the same."""
    every, last = (
        run_episode(simulator, task, 0, lambda start: start.at(0.3), feedback_every=every) for every in (1, 3)
    )
    assert np.isfinite(every.feedback).all()
    assert np.isnan(last.feedback[1:-1]).all()
    np.testing.assert_array_equal(every.gains, last.gains)


def test_the_model_is_the_one_that_is_scored(library: TaskLibrary, simulator: ProxySimulator, task: TaskSpec) -> None:
    """Catches: the weights of the last update instead of their average."""
    keep, acquire = library.of_task(task)
    asked = Environment(
        dict(zip(task.fields, (keep.scored, acquire.scored), strict=True)),
        library.corpus(task.target).tokenizer(),
        EnvironmentSettings(score="pair", progress=False),
    )
    simulator.reset(task, 0)
    before = asked.evaluate(simulator.model())
    gains = run_episode(simulator, task, 0, lambda start: start.at(0.3)).gains
    after = asked.evaluate(simulator.model())
    np.testing.assert_allclose([after[name] - before[name] for name in task.fields], gains, atol=1e-5)


class Curious:
    """Asks for everything before each decision; notes what it was told and shown."""

    name = "curious"
    needs = frozenset({INFLUENCE, LENGTH, QUESTIONS})
    always_answers = True

    def __init__(self, start: Start) -> None:
        self.mix = start.at(0.5)
        self.told: list[tuple[str, Any]] = []
        self.shown: list[History] = []
        self._decision = -1

    def needed(self, decision: int) -> frozenset[str]:
        if decision == self._decision:
            return frozenset()
        self._decision = decision
        return self.needs

    def inform(self, need: str, evidence: Any) -> None:
        self.told.append((need, evidence))

    def propose(self, history: History) -> np.ndarray:
        self.shown.append(history)
        return self.mix

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: object) -> None: ...


def test_a_policy_gets_its_evidence_and_the_history(simulator: ProxySimulator, task: TaskSpec) -> None:
    made: list[Curious] = []

    def choose(start: Start) -> Curious:
        made.append(Curious(start))
        return made[0]

    episode = run_episode(simulator, task, 0, choose)
    assert [need for need, _ in made[0].told] == sorted(Curious.needs) * task.steps
    assert [len(history) for history in made[0].shown] == [1, 2, 3]
    np.testing.assert_array_equal(made[0].shown[-1].feedback, episode.feedback[:-1])
    assert episode.influence is not None
    assert episode.influence.fields == task.fields
    measured = [evidence for need, evidence in made[0].told if need == INFLUENCE]
    assert measured[1:] == [None] * (task.steps - 1)
    other = simulator.influence(1)
    assert (measured[0].values() != other.values()).any(), "a repeated measurement must read other rows"

    made.clear()
    run_episode(simulator, task, 0, choose, frozen_feedback=True)
    assert (made[0].shown[-1].feedback == made[0].shown[0].feedback[0]).all()


def test_the_influence_policy_runs_by_name(simulator: ProxySimulator, task: TaskSpec) -> None:
    episode = run_episode(simulator, task, 0, lambda s: make_policy(None, "influence", s.space, s.natural))
    np.testing.assert_allclose(episode.mixes.sum(axis=1), 1)
    assert episode.influence is not None


@pytest.mark.parametrize("space", ["canonical", "merged-2", "parts-2", "clusters-12", "clusters-1"])
def test_every_space_runs(simulator: ProxySimulator, task: TaskSpec, space: str) -> None:
    task = replace(task, space=space, steps=1)
    episode = run_episode(simulator, task, 0, lambda start: start.at(0.3))
    assert np.isfinite(episode.gains).all()
    assert episode.mixes.shape[1] == len(simulator.reset(task, 0).space)


def test_a_target_topic_is_no_source_domain(library: TaskLibrary, task: TaskSpec, simulator: ProxySimulator) -> None:
    """Its held-out documents are the questions, as pairs that fit into a row."""
    task = replace(task, target="Health", acquire="text", space="canonical", steps=1)
    start = simulator.reset(task, 0)
    assert "source/Health" not in start.space.names
    assert task.fields == ("keep sciq", "acquire Health")
    assert all("healt" in text for text in start.questions["acquire Health"][:5])
    corpus = library.corpus("Health")
    assert len(held_out_pairs(corpus, "target", 1000)) >= len(held_out_pairs(corpus, "target", 4)) > 0


def test_a_question_set_without_pairs_is_named(library: TaskLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few documents none is held out: "none of the 0 pairs fits" sent the user to the length of the rows."""
    monkeypatch.setattr("dmagent_loader.training.tasks.library.held_out_pairs", lambda *_: [])
    with pytest.raises(ConfigurationError, match=r"'text' to acquire has 0 of 0 pairs .*: add documents to the field"):
        library._questions("math", "text", "acquire")


def test_few_questions_are_asked_if_they_are_noisy(simulator: ProxySimulator, task: TaskSpec) -> None:
    noisy = replace(task, perturbation=Perturbation(kind="noisy_questions"))
    assert [len(listed) for listed in simulator.reset(noisy, 0).questions.values()] == [8, 4]


def test_a_stale_probe_measures_another_model(simulator: ProxySimulator, task: TaskSpec) -> None:
    task = replace(task, base=replace(task.base, tokens=40_960))
    stale = replace(task, perturbation=Perturbation(kind="stale_probe"))
    starts, influences = [], []
    for spec in (task, stale):
        starts.append(simulator.reset(spec, 0))
        influences.append(simulator.influence())
    np.testing.assert_array_equal(starts[0].feedback, starts[1].feedback)
    assert (influences[0].values() != influences[1].values()).any()


def test_steps_must_divide_into_updates(simulator: ProxySimulator, task: TaskSpec) -> None:
    with pytest.raises(ConfigurationError, match="a step of 1000 tokens does not divide into updates of 512"):
        simulator.reset(replace(task, tokens_per_step=1000), 0)


def test_a_task_that_cannot_be_prepared_leaves_nothing_behind(simulator: ProxySimulator, task: TaskSpec) -> None:
    """The comparison goes on with the next run, which may be of the task before."""
    before = run_episode(simulator, task, 0, lambda start: start.at(0.3))
    with pytest.raises(ConfigurationError, match="no question set 'nothing'"):
        simulator.reset(replace(task, base=replace(task.base, seed=1), keep="nothing"), 0)
    after = run_episode(simulator, task, 0, lambda start: start.at(0.3))
    np.testing.assert_array_equal(after.feedback, before.feedback)


def test_reward_by_hand() -> None:
    ranges = attainable([np.array([0.1, 0.0]), np.array([0.0, 1.0]), np.array([-0.3, 2.0])])
    np.testing.assert_allclose(ranges, [0.4, 2.0])
    assert reward(np.array([-0.1, 1.0]), ranges, 0.25) == pytest.approx(0.75 * -0.25 + 0.25 * 0.5)
    np.testing.assert_allclose(attainable([np.array([0.3, 0.5]), np.array([0.2, 0.4])]), [0.3, 0.5])
    assert attainable([np.zeros(2)] * 3).tolist() == [LEAST_RANGE] * 2


def test_gymnasium_accepts_the_environment(simulator: ProxySimulator, task: TaskSpec) -> None:
    check_env(MixingEnv(simulator, task), skip_render_check=True)


def test_the_environment_refuses_what_it_cannot_run(simulator: ProxySimulator, task: TaskSpec) -> None:
    with pytest.raises(ConfigurationError, match="specs is empty"):
        MixingEnv(simulator, [])
    env = MixingEnv(simulator, [task, replace(task, space="merged-5")], ranges=lambda _: np.ones(2))
    with pytest.raises(ConfigurationError, match="task 1 has 5 domains, but the first of specs has 7"):
        env.reset(options={"task": 1})
    with pytest.raises(ConfigurationError, match="call reset before the first step"):
        MixingEnv(simulator, task).step(np.ones(7))
    for number in (2, -1, "a"):
        with pytest.raises(ConfigurationError, match=r"options\['task'\] is"):
            env.reset(options={"task": number})
    env.reset(options={"task": 0})
    for action in (np.full(7, np.nan), np.ones(6)):
        with pytest.raises(ConfigurationError, match="a finite weight for each of 7 domains"):
            env.step(action)


def test_the_reward_comes_at_the_end(simulator: ProxySimulator, task: TaskSpec) -> None:
    env = MixingEnv(simulator, [task, replace(task, number=1, balance=0.2)])
    observation, info = env.reset(seed=3, options={"task": 1})
    assert observation["balance"] == [0.2]
    assert info["task"] == env.spec_of_task.id
    rewards, ended = [], False
    while not ended:
        observation, value, ended, truncated, info = env.step(np.zeros(len(env.start.natural)))
        assert not truncated
        rewards.append(value)
    assert rewards[:-1] == [0.0] * (task.steps - 1)
    assert rewards[-1] == pytest.approx(np.array([0.8, 0.2]) @ info["shares"])
    with pytest.raises(ConfigurationError, match="and after the last"):
        env.step(np.zeros(len(env.start.natural)))
    np.testing.assert_allclose(observation["mix"], env.start.at(0.3))
    read = observation["exposure"] * np.maximum(env.start.length.rows, 1)
    assert read.sum() == pytest.approx(task.steps * task.tokens_per_step / 128)

"""Collection: complete, the same however it is cut up, and continued after a kill without doing a step again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_fixtures import ROW, Inputs

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.feedback import Collection, FeedbackConfig, collect_feedback
from dmagent_loader.training.proxies.model import StackedProxies
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.record import FeedbackRecord


def collection(inputs: Inputs, directory: Path, **changes: Any) -> Collection:
    names = ("trajectories", "corpus", "questions", "bases", "config")
    given = {**dict(zip(names, inputs, strict=True)), "directory": directory, "device": "cpu"}
    return Collection(**{**given, **changes})


def steps_of(done: Collection) -> list[int]:
    """Steps of each unit: those of its longest trajectory."""
    return [int(done.trajectories.lengths[members].max()) for members in done.groups]


@pytest.fixture
def trained_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the number of proxies, with each step that is trained in this process."""
    steps: list[int] = []
    train = ProxyTrainer.train

    def counting(self: ProxyTrainer, rows: Tensor) -> Tensor:
        steps.append(len(rows))
        return train(self, rows)

    monkeypatch.setattr(ProxyTrainer, "train", counting)
    return steps


def test_there_is_feedback_for_every_step_and_none_after_the_end(collected: FeedbackRecord) -> None:
    lengths = collected.trajectories.lengths
    assert len(set(lengths)) > 1
    finite = np.isfinite(collected.feedback).all(axis=-1)
    assert np.array_equal(finite.sum(axis=1), lengths + 1)
    assert all(row[: n + 1].all() for row, n in zip(finite, lengths, strict=True))
    assert np.array_equal(np.isfinite(collected.losses)[:, 1:], finite[:, 1:])
    assert collected.num_feedbacks == lengths.sum()


def test_a_start_state_has_the_feedback_of_its_own_base_model(
    collected: FeedbackRecord, bases: dict[str, Tensor], questions: ProxyQuestions, small: FeedbackConfig
) -> None:
    """Catches one base model for all, and base models in the order of the group."""
    model = StackedProxies(2, small.proxy)
    model.load_state_dict(bases)
    expected = questions.feedback(model)
    assert np.abs(expected[0] - expected[1]).max() > 0.005
    assert set(collected.trajectories.starts) == {0, 1}
    assert np.allclose(collected.feedback[:, 0], expected[collected.trajectories.starts], atol=1e-5)


def test_feedback_is_what_one_proxy_alone_gets_along_its_trajectory(collected: FeedbackRecord, inputs: Inputs) -> None:
    """By hand, for a group: catches rows or base of another one, a step off by one, scores of the weights and not of
    their average, and proxies that change places when a shorter neighbour leaves the batch."""
    trajectories, corpus, questions, bases, small = inputs
    differs = 0.0
    for number in collection(inputs, Path()).groups[1]:
        length = trajectories.lengths[number]
        stream = TrajectoryStream(
            corpus, trajectories.mixes[number], rows_per_step=8, row_tokens=ROW, seed=small.seed, number=number
        )
        start = {name: weights[trajectories.starts[number]][None] for name, weights in bases.items()}
        trainer = ProxyTrainer(1, small.proxy, start=start)
        average = [p.detach().clone() for p in trainer.model.parameters()]
        scored = StackedProxies(1, small.proxy)
        updates = 0
        for step in range(1, length + 1):
            losses = []
            for batch in torch.split(torch.from_numpy(stream.rows(step)[None]), small.proxy.rows_per_update, dim=1):
                losses.append(float(trainer.train(batch)))
                updates += 1
                keep = min(small.proxy.averaging, updates / (updates + 1))
                for mean, p in zip(average, trainer.model.parameters(), strict=True):
                    mean.mul_(keep).add_(p.detach(), alpha=1 - keep)
            with torch.no_grad():
                for p, mean in zip(scored.parameters(), average, strict=True):
                    p.copy_(mean)
            assert np.allclose(collected.feedback[number, step], questions.feedback(scored)[0], atol=1e-4)
            assert np.isclose(collected.losses[number, step], np.mean(losses), atol=1e-4)
        differs = max(differs, np.abs(questions.feedback(trainer.model) - questions.feedback(scored)).max())
    assert differs > 0.001, "averaging changes nothing here, so that the test could not see it"


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_the_result_does_not_depend_on_how_many_run_at_once(
    collected: FeedbackRecord, inputs: Inputs, tmp_path: Path, at_once: int
) -> None:
    other = dataclasses.replace(inputs[-1], proxies_at_once=at_once)
    record = collect_feedback(*inputs[:-1], other, tmp_path, progress=False)
    assert np.allclose(record.feedback, collected.feedback, atol=1e-4, equal_nan=True)
    assert np.allclose(record.losses, collected.losses, atol=1e-4, equal_nan=True)


def test_groups_hold_every_trajectory_once_and_deal_the_sets_in_turn(inputs: Inputs, tmp_path: Path) -> None:
    """What is done after a while must be a fair sample: catches one set after the other, and short ones first."""
    lengths = np.random.default_rng(0).integers(1, 7, size=4 * 24)
    many = dataclasses.replace(
        inputs[0],
        mixes=np.zeros((96, 7, 52)),
        lengths=lengths,
        candidates=np.repeat([1, 10, 100, 1000], 24),
        starts=np.arange(96) % 2,
        config=dataclasses.replace(inputs[0].config, candidates_per_step=(1, 10, 100, 1000), trajectories_per_set=24),
    )
    config = dataclasses.replace(inputs[-1], proxies_at_once=5)
    groups = collection(inputs, tmp_path, trajectories=many, config=config).groups
    assert sorted(np.concatenate(groups)) == list(range(96))
    assert max(len(group) for group in groups) == 5
    for i in range(0, len(groups), 4):
        assert [set(many.candidates[group]) for group in groups[i : i + 4]] == [{1}, {10}, {100}, {1000}]
    # Alike within a group: as a whole, groups take hardly more steps than their trajectories need.
    assert sum(len(group) * int(lengths[group].max()) for group in groups) < 1.2 * lengths.sum()
    means = [lengths[np.concatenate(groups[i : i + 4])].mean() for i in range(0, len(groups), 4)]
    assert means != sorted(means), "the short ones come first"


def test_a_unit_done_twice_gives_the_same_and_works_once(
    inputs: Inputs, tmp_path: Path, trained_steps: list[int]
) -> None:
    """Also into a folder of its own, as a worker on another machine has."""
    units = collection(inputs, tmp_path / "here")
    first = units.work(1)
    assert len(trained_steps) == steps_of(units)[1]
    again = units.work(1)
    assert len(trained_steps) == steps_of(units)[1], "a finished unit was trained again"
    elsewhere = collection(inputs, tmp_path / "not" / "there" / "yet").work(1)
    assert len(trained_steps) == 2 * steps_of(units)[1]
    for other in (again, elsewhere):
        assert other.keys() == first.keys()
        for name in ("feedback", "losses", "step"):
            assert torch.equal(torch.nan_to_num(other[name]), torch.nan_to_num(first[name])), name


def test_scoring_some_steps_only_changes_no_score(collected: FeedbackRecord, inputs: Inputs, tmp_path: Path) -> None:
    """Catches scores that change the training, and a last step that is left out."""
    units = collection(inputs, tmp_path, evaluate_every=4)
    for number, members in enumerate(units.groups):
        feedback = units.work(number)["feedback"].numpy()
        for row, m in enumerate(members):
            length = int(collected.trajectories.lengths[m])
            for step in {0, length} | ({4} if length >= 4 else set()):
                assert np.array_equal(feedback[row, step], collected.feedback[m, step])
    every = np.isfinite(feedback).all(axis=-1).sum()
    assert every < (collected.trajectories.lengths[members] + 1).sum()
    with pytest.raises(StateError, match="other evaluate_every"):
        collection(inputs, tmp_path, evaluate_every=2).work(0)


def test_a_directory_of_another_collection_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """By the process that collects, and by a worker elsewhere that finds an old folder at the same place."""
    trajectories, corpus, questions, bases, small = inputs
    collection(inputs, tmp_path).work(0)
    other = dataclasses.replace(small, seed=1)
    with pytest.raises(StateError, match="other collection"):
        collect_feedback(trajectories, corpus, questions, bases, other, tmp_path, progress=False)
    with pytest.raises(StateError, match="other collection"):
        collection(inputs, tmp_path, config=other).work(0)
    shifted = dataclasses.replace(trajectories, lengths=np.maximum(trajectories.lengths - 1, 1))
    with pytest.raises(StateError, match="other trajectories"):
        collect_feedback(shifted, corpus, questions, bases, small, tmp_path, progress=False)


def test_sizes_that_do_not_fit_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    small = inputs[-1]
    with pytest.raises(ConfigurationError, match="tokens_per_step 64 is not a multiple"):
        collect_feedback(*inputs[:-1], dataclasses.replace(small, row_tokens=7), tmp_path)
    tiny = dataclasses.replace(small, proxy=dataclasses.replace(small.proxy, vocab_size=50))
    with pytest.raises(ConfigurationError, match="104 tokens, the proxies 50"):
        collect_feedback(*inputs[:-1], tiny, tmp_path)

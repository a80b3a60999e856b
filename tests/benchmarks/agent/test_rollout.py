"""Closed loop: what policies propose is what the models are trained on, as in the recorded trajectories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.agent.rollout import ClosedLoop, LoopConfig, change_by_feedback
from dmagent_loader.errors import ConfigurationError, MixError
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.record import FeedbackRecord


class Replay:
    """Proposes the mixes of a recorded trajectory."""

    name = "replay"

    def __init__(self, mixes: FloatArray) -> None:
        self.mixes = mixes

    def propose(self, history: History) -> FloatArray:
        return self.mixes[len(history)]


def replay(
    record: FeedbackRecord, numbers: list[int], corpus: Corpus, bases: dict[str, torch.Tensor], small: FeedbackConfig
) -> ClosedLoop:
    """A loop along recorded trajectories of one start state."""
    trajectories = record.trajectories
    config = trajectories.config
    start = {name: tensor[trajectories.starts[numbers]] for name, tensor in bases.items()}
    return ClosedLoop(
        [Replay(trajectories.mixes[number]) for number in numbers],
        ProxyTrainer(len(numbers), small.proxy, start=start),
        corpus,
        LoopConfig(
            steps=config.steps,
            tokens_per_step=config.tokens_per_step,
            target_tokens=config.target_tokens,
            row_tokens=small.row_tokens,
            seed=small.seed,
        ),
        numbers=numbers,
        start_state=trajectories.mixes[numbers[0], 0],
        fields=record.fields,
        base_feedback=record.feedback[numbers, 0],
    )


def test_a_loop_along_recorded_mixes_gives_the_recorded_feedback_and_ends_with_the_trajectory(
    collected: FeedbackRecord,
    corpus: Corpus,
    questions: ProxyQuestions,
    bases: dict[str, torch.Tensor],
    small: FeedbackConfig,
) -> None:
    """The world that agents steer in is the one that they learn from. Two runs of different lengths: catches runs that
    change places when one ends, another stream, and an end one step early or late."""
    trajectories = collected.trajectories
    same_start = np.flatnonzero(trajectories.starts == trajectories.starts[0])
    by_length = same_start[np.argsort(trajectories.lengths[same_start], kind="stable")]
    numbers = [int(by_length[0]), int(by_length[-1])]
    assert trajectories.lengths[numbers[0]] < trajectories.lengths[numbers[1]]
    loop = replay(collected, numbers, corpus, bases, small)
    while loop.advance():
        loop.feedback[loop.active, loop.step] = questions.feedback(loop.trainer.averaged)
    assert np.allclose(loop.mixes, trajectories.mixes[numbers])
    assert np.allclose(loop.feedback, collected.feedback[numbers], atol=1e-4, equal_nan=True)


def test_a_restored_loop_goes_on_as_the_other_did(
    collected: FeedbackRecord, corpus: Corpus, bases: dict[str, torch.Tensor], small: FeedbackConfig
) -> None:
    """Catches streams that begin anew."""
    numbers = [int(np.argmax(collected.trajectories.lengths))]
    whole, broken, resumed = (replay(collected, numbers, corpus, bases, small) for _ in range(3))
    for _ in range(3):
        broken.advance()
    resumed.trainer.load_state(broken.trainer.state())
    resumed.restore(broken.mixes, broken.feedback, broken.step)
    assert len(resumed.staying) == 1
    for loop in (whole, resumed):
        while loop.advance():
            pass
    assert resumed.step == whole.step > 3
    assert torch.equal(resumed.trainer.model.embedding, whole.trainer.model.embedding)


def test_a_proposal_that_is_no_mix_is_refused(
    collected: FeedbackRecord, corpus: Corpus, bases: dict[str, torch.Tensor], small: FeedbackConfig
) -> None:
    half = dataclasses.replace(
        collected, trajectories=dataclasses.replace(collected.trajectories, mixes=collected.trajectories.mixes / 2)
    )
    with pytest.raises(MixError, match=r"sums to 0\.5"):
        replay(half, [0], corpus, bases, small).advance()
    with pytest.raises(ConfigurationError, match="one or more steps"):
        LoopConfig(steps=1, tokens_per_step=64, target_tokens=0, row_tokens=8, seed=0)


def test_the_change_by_feedback_is_none_for_a_policy_that_does_not_read_it(
    collected: FeedbackRecord,
) -> None:
    """And for one that does, it is the distance to its proposals on the base model's feedback."""

    class Trusting:
        """All weight on the first domain while feedback is as it was, on the second once it has risen."""

        name = "trusting"

        def propose(self, history: History) -> FloatArray:
            return np.eye(NUM_CANONICAL)[int(history.feedback[-1, 0] > history.feedback[0, 0])]

    mixes, feedback = collected.trajectories.mixes[0], np.array([[-2.0], [-1.0], [-3.0], [-1.5]])
    assert not change_by_feedback(Replay(mixes), ("general",), mixes[:4], feedback).any()
    assert change_by_feedback(Trusting(), ("general",), mixes[:4], feedback).tolist() == [0.0, 1.0, 0.0]

"""Readings of a trial, against a record made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.agent.trial_record import TrialRecord
from benchmarks.agent.trial_tables import feedback_table, readings, run_table
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.history import FeedbackStatistics

STATISTICS = FeedbackStatistics(mean=(-3.0, -3.0), std=(0.5, 0.25), count=10)


def record() -> TrialRecord:
    """Steps of 100 tokens; "all target" uses 100 a step and lasts 4, "half" 50 and lasts 8; no target in "none".

    General falls by 0.1 a step of target data, math rises by 0.5 times the root of the share of steps done; the second
    seed has a base model that is 1 nat better, and nothing else. Everything of "half" is measured at even steps only.
    """
    shares = {"all target": 1.0, "half": 0.5, "none": 0.0}
    lengths = np.array([[4, 4], [8, 8], [8, 8]])
    mixes = np.zeros((3, 2, 9, 52))
    feedback, unseen = np.full((3, 2, 9, 2), np.nan), np.full((3, 2, 9, 2), np.nan)
    held_out = np.full((3, 2, 9, 2), np.nan)
    for number, share in enumerate(shares.values()):
        length = lengths[number, 0]
        mixes[number, :, 0, 0] = 1.0
        mixes[number, :, 1 : length + 1, 0] = 1.0 - share
        mixes[number, :, 1 : length + 1, 26] = share
        for step in range(length + 1):
            if share == 0.5 and step % 2:
                continue
            for seed in range(2):
                feedback[number, seed, step] = [-3.0 - 0.1 * share * step + seed, -4.0 + 0.5 * share * step + seed]
                unseen[number, seed, step] = feedback[number, seed, step] - 0.5
                held_out[number, seed, step] = [4.0 + share * step, 5.0 - share * step]
    return TrialRecord(
        names=tuple(shares),
        fields=("general", "math"),
        tokens_per_step=100,
        mixes=mixes,
        lengths=lengths,
        feedback=feedback,
        unseen=unseen,
        held_out=held_out,
        seconds=1.0,
    )


def test_at_the_end_each_run_is_read_at_its_own_last_step() -> None:
    whole = record().read("all target", STATISTICS)
    assert whole.steps.tolist() == [4, 4]
    assert whole.target_tokens.tolist() == [400, 400]
    assert whole.source_tokens.tolist() == [0, 0]
    assert np.allclose(whole.feedback, [[-3.4, -2.0], [-2.4, -1.0]])
    # (-0.4 / 0.5 + 2 / 0.25) / 2; the better base of the second seed is no merit of the policy.
    assert np.allclose(whole.objective, 3.6)
    assert np.allclose(whole.unseen_objective, 3.6)
    assert np.allclose(whole.held_out, [8.0, 1.0])
    half = record().read("half", STATISTICS)
    assert half.steps.tolist() == [8, 8]
    assert np.allclose(half.target_share, 0.5)
    assert np.allclose(half.effective_domains, 2.0)
    none = record().read("none", STATISTICS)
    assert none.steps.tolist() == [8, 8]
    assert np.allclose(none.objective, 0.0)


def test_at_equal_target_tokens_each_run_is_read_where_it_had_used_so_many() -> None:
    """Catches readings at equal steps, and values taken from the next measurement."""
    trial = record()
    level = trial.target_tokens(["all target", "half"])
    assert level == 400
    shorter = dataclasses.replace(trial, lengths=np.array([[4, 3], [8, 8], [8, 8]]), mixes=trial.mixes.copy())
    shorter.mixes[0, 1, 4:] = 0
    assert shorter.target_tokens(["all target", "half"]) == 300
    for name, step in (("all target", 2.5), ("half", 5.0)):
        read = trial.read(name, STATISTICS, target_tokens=250)
        assert np.allclose(read.steps, step)
        assert np.allclose(read.target_tokens, 250)
        assert np.allclose(read.source_tokens, step * 100 - 250)
        assert np.allclose(read.feedback[0], [-3.25, -2.75])
        assert np.allclose(read.unseen[0], [-3.75, -3.25])
        assert np.allclose(read.held_out[0], [6.5, 2.5])
    with pytest.raises(ConfigurationError, match="ended after 0 target tokens, so it cannot be read at 250"):
        trial.read("none", STATISTICS, target_tokens=250)
    with pytest.raises(ConfigurationError, match="no run of 'some'"):
        trial.read("some", STATISTICS)


def test_the_best_is_chosen_on_the_feedback_and_not_on_the_unseen_questions() -> None:
    trial = record()
    assert trial.best(["all target", "half", "none"], STATISTICS) in ("all target", "half")
    better = trial.feedback.copy()
    better[1, :, 8] += 0.1
    worse = trial.unseen.copy()
    worse[1, :, 8] -= 5.0
    trial = dataclasses.replace(trial, feedback=better, unseen=worse)
    assert trial.best(["all target", "half", "none"], STATISTICS) == "half"
    better[1, 0, 8] += 1.0
    better[1, 1, 8] -= 3.0
    assert trial.best(["all target", "half"], STATISTICS) == "all target", "one lucky seed decided"
    with pytest.raises(ConfigurationError, match="no policy to choose from"):
        trial.best([], STATISTICS)


def test_a_difference_is_paired_by_seed() -> None:
    """The base models differ by 1 nat, the differences do not spread at all; catches a difference of means with the
    spread of the objectives."""
    trial = record()
    shifted = trial.feedback.copy()
    shifted[:, 1, 1:] += 0.3
    read = readings(dataclasses.replace(trial, feedback=shifted), ["all target", "none"], STATISTICS)
    lines = feedback_table(read, ("general", "math"), ["none"]).splitlines()
    assert lines[0].startswith("| policy | objective | minus none | mean (nats) | general (nats) |")
    assert lines[2].startswith("| all target | 4.050 ± 0.636 | +3.600 ± 0.000 |")
    assert lines[3].startswith("| none | 0.450 ± 0.636 |  |")
    unseen = feedback_table(read, ("general", "math"), ["none"], unseen=True).splitlines()
    assert unseen[2].startswith("| all target | 3.600 ± 0.000 | +3.600 ± 0.000 | -2.700 ± 0.707 | ")
    assert "| all target | 8.000 ± 0.000 | 1.000 ± 0.000 | 400 | 0 | 4.0 | 1.00 ± 0.00 | 1.0 ± 0.0 |" in run_table(read)


def test_a_saved_trial_loads_with_everything(tmp_path: Path) -> None:
    trial = record()
    trial.save(tmp_path / "trial.safetensors")
    loaded = TrialRecord.load(tmp_path / "trial.safetensors")
    for name, value in vars(trial).items():
        found = getattr(loaded, name)
        same = np.array_equal(found, value, equal_nan=True) if isinstance(value, np.ndarray) else found == value
        assert same, name
    (tmp_path / "other.safetensors").write_bytes(
        (tmp_path / "trial.safetensors").read_bytes().replace(b"trial/1", b"trial/0")
    )
    with pytest.raises(StateError, match="has schema trial/0, not trial/1"):
        TrialRecord.load(tmp_path / "other.safetensors")

"""Noise of the feedback: spread between runs of one mix against spread between mixes, for each way of scoring."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from torch import Tensor

from benchmarks.agent.noise import Measured, NoiseConfig, measure_noise, noise_table
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.feedback import FeedbackConfig


@pytest.fixture(scope="module")
def config(small: FeedbackConfig) -> NoiseConfig:
    return NoiseConfig(
        shares=(0.0, 0.5, 1.0),
        runs=4,
        steps=6,
        tokens_per_step=128,
        row_tokens=8,
        proxy=dataclasses.replace(small.proxy, learning_rate=1e-2),
        num_questions=(2, 4),
        question_tokens=8,
    )


@pytest.fixture(scope="module")
def measured(
    corpus: Corpus, bases: dict[str, Tensor], config: NoiseConfig, tmp_path_factory: pytest.TempPathFactory
) -> list[Measured]:
    folder = tmp_path_factory.mktemp("questions")
    choices = [
        {
            "question": f"{i} {i + 1} A {i} B {i + 3}",
            "answer": "A",
            "stem": f"{i} {i + 1}",
            "choices": [f"{i}", f"{i + 3}"],
            "answer_index": 0,
        }
        for i in range(0, 40, 10)
    ]
    # As in the corpus: a token is followed by one of its own domain.
    plain = [{"question": f"{i} {i + 1}", "answer": f"{i}"} for i in range(70, 103, 10)]
    files = {"general": folder / "general.jsonl", "math": folder / "math.jsonl"}
    for path, rows in zip(files.values(), (choices, plain), strict=True):
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    base = {name: weights[:1] for name, weights in bases.items()}
    return measure_noise(corpus, files, base, config)


def test_every_way_of_scoring_is_measured(measured: list[Measured]) -> None:
    ways = {(m.field, m.cloze, m.score, m.num_questions, m.averaged) for m in measured}
    assert len(ways) == len(measured) == 2 * 2 * 2 * 2 * 2


def test_target_data_raises_the_target_field_far_above_the_noise(measured: list[Measured]) -> None:
    """Catches runs that share their rows (no noise at all), and mixes in another order than the shares."""
    math = [m for m in measured if m.field == "math" and m.num_questions == 4]
    for m in math:
        assert m.means[0] < m.means[1] < m.means[2]
        assert m.within > 0
        assert m.ratio > 1


def test_listed_choices_are_other_questions_only_where_there_are_choices(measured: list[Measured]) -> None:
    by = {(m.field, m.cloze, m.score, m.num_questions, m.averaged): m for m in measured}
    for (field, cloze, *rest), m in by.items():
        if cloze:
            same = np.allclose(m.means, by[(field, False, *rest)].means, atol=1e-6)
            assert same == (field == "math")


def test_the_table_lists_each_way_once_and_the_clearest_first(measured: list[Measured], config: NoiseConfig) -> None:
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in noise_table(measured, config.shares).split("\n")
    ]
    assert rows[0][5:8] == ["at 0", "at 0.5", "at 1"]
    assert [row[0] for row in rows[2:]] == ["general"] * 16 + ["math"] * 8
    ratios = [float(row[-1]) for row in rows[2:18]]
    assert ratios == sorted(ratios, reverse=True)


def test_spread_needs_two_of_both_and_averages_need_averaging(config: NoiseConfig) -> None:
    with pytest.raises(ConfigurationError, match="3 shares with 1 runs each"):
        dataclasses.replace(config, runs=1)
    with pytest.raises(ConfigurationError, match="averaging is 0"):
        dataclasses.replace(config, proxy=dataclasses.replace(config.proxy, averaging=0.0))


def test_the_standard_deviations_are_of_means_and_of_runs(measured: list[Measured]) -> None:
    for m in measured:
        assert np.isclose(m.between, np.std(m.means, ddof=1))

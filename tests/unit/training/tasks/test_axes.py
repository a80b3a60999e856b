"""Sampling of tasks: held-out values stay held out, and a larger sample only adds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.tasks.axes import AXES, REFERENCE, TASKS_PER_MODEL, sample_tasks
from dmagent_loader.training.tasks.library import QUESTIONS, SIZES
from dmagent_loader.training.tasks.spec import TaskSpec

COUNT = 120


def values(spec: TaskSpec) -> dict[str, Any]:
    base = spec.base
    return {
        "keep": spec.keep,
        "target": spec.target,
        "acquire": (spec.target, spec.acquire),
        "size": base.size,
        "base": (base.tokens, base.seed, base.sharpness),
        "steps": spec.steps,
        "learning_rate": spec.learning_rate,
        "schedule": spec.schedule,
        "target_passes": spec.target_passes,
        "space": spec.space,
        "perturbation": spec.perturbation,
        "balance": spec.balance,
    }


def drawn(split: str) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for spec in sample_tasks(split, COUNT):
        for axis, value in values(spec).items():
            found.setdefault(axis, set()).add(value)
    return found


def test_no_split_draws_a_value_of_another() -> None:
    splits = {split: drawn(split) for split in AXES}
    for axis in splits["train"]:
        allowed = {REFERENCE[axis]} if axis in REFERENCE else set()
        for one in AXES:
            for other in set(AXES) - {one}:
                assert splits[one][axis] & splits[other][axis] <= allowed, axis


def test_every_value_of_an_axis_is_drawn() -> None:
    for split, axes in AXES.items():
        found = drawn(split)
        for axis in ("keep", "size", "steps", "learning_rate", "schedule", "target_passes", "space", "balance"):
            assert found[axis] == set(getattr(axes, axis)), (split, axis)
        assert found["perturbation"] == {*axes.perturbation, REFERENCE["perturbation"]}


def test_training_has_the_promised_variety() -> None:
    axes = AXES["train"]
    assert len({name for split in AXES.values() for name in split.keep} - {"text"}) >= 8
    assert len(axes.base) >= 8
    assert all(name in QUESTIONS for split in AXES.values() for name in split.keep if name != "text")
    assert all(size in SIZES for split in AXES.values() for size in split.size)


def test_a_larger_sample_only_adds() -> None:
    assert sample_tasks("test", 30)[:11] == sample_tasks("test", 11)
    assert sample_tasks("test", 11, seed=1) != sample_tasks("test", 11)


def test_tasks_of_a_group_share_their_model_unless_it_is_bad() -> None:
    specs = sample_tasks("test", COUNT)
    for first in range(0, COUNT, TASKS_PER_MODEL):
        group = specs[first : first + TASKS_PER_MODEL]
        assert len({spec.target for spec in group}) == 1
        assert len({spec.base for spec in group if spec.perturbation.kind != "bad_base"}) == 1
        assert [spec.perturbation.kind != "none" for spec in group[:2]] == [False, True]


def test_values_come_equally_often() -> None:
    counts = Counter(spec.steps for spec in sample_tasks("test", COUNT))
    assert set(counts.values()) == {COUNT // 3}


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no split 'dev'"):
        sample_tasks("dev", 1)

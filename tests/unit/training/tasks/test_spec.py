"""Task specs: JSON both ways, clear errors, and the courses of the learning rate."""

from __future__ import annotations

import json

import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.tasks.axes import sample_tasks
from dmagent_loader.training.tasks.spec import Perturbation, TaskSpec, learning_rate_factor


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_spec_is_the_same_after_json(split: str) -> None:
    for spec in sample_tasks(split, 12):
        again = TaskSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        assert again.id == spec.id


def test_ids_differ_with_any_setting(task: TaskSpec) -> None:
    value = task.to_json()
    changed = [{**value, "number": 1}, {**value, "steps": 4}, {**value, "base": {**value["base"], "seed": 1}}]
    assert len({task.id, *(TaskSpec.from_json(v).id for v in changed)}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "sawtooth"}, "unknown schedule 'sawtooth'"),
        ({"space": "merged"}, "unknown domain space 'merged'"),
        ({"space": "canonical-3"}, "unknown domain space 'canonical-3'"),
        ({"space": "canonical-all"}, "unknown domain space 'canonical-all'"),
        ({"space": "parts-0"}, "unknown domain space 'parts-0'"),
        ({"balance": 1.5}, "balance is 1.5"),
        ({"steps": 0}, "steps"),
        ({"perturbation": {"kind": "noise", "noise": None, "onset": 0.0}}, "of kind 'noise' with noise None"),
        ({"base": {"width": 3}}, "cannot be read"),
        ({"colour": 1}, "write it with to_json"),
    ],
)
def test_a_wrong_value_is_named(task: TaskSpec, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TaskSpec.from_json({**task.to_json(), **change})


def test_labels_tell_perturbations_apart() -> None:
    assert Perturbation(kind="noise", noise="random", onset=0.25).label == "random noise from 25%"
    assert Perturbation(kind="noise", noise="random").label == "random noise"
    assert Perturbation().label == "none"


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.5, 0.1, 0]),
        ("wsd", [1, 1, 0.5, 0]),
        ("cosine", [1, 0.55, 0.1220, 0.1]),
        ("rewarm", [0, 0.6281, 0.1271, 0.1]),
    ],
)
def test_learning_rates(schedule: str, factors: list[float]) -> None:
    """Cosine at 0.9: 0.1 + 0.45 (1 + cos 162 degrees); re-warmed at 0.5: 0.1 + 0.45 (1 + cos 80 degrees)."""
    found = [learning_rate_factor(schedule, progress) for progress in (0, 0.5, 0.9, 1)]  # type: ignore[arg-type]
    assert found == pytest.approx(factors, abs=1e-3)
    assert learning_rate_factor("rewarm", 0.05) == pytest.approx(0.5)

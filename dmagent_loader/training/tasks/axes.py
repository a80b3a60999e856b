"""Sampling of tasks: the values of each axis in each split, and random tasks from them.

A value is drawn in one split only, so that a validation or test task has no question set, target field, base model,
number of steps, learning rate, schedule, pool size, domain space or perturbation that training saw. Exceptions are the
reference values of `REFERENCE`, which all splits draw: without them, a test task would differ from training in
everything at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.tasks.library import ROWS_PER_UPDATE
from dmagent_loader.training.tasks.spec import BaseModel, Perturbation, TaskSpec

TASKS_PER_MODEL = 3
"""Tasks in a row that share target field and base model: a base model costs as much as ten runs."""
NONE = Perturbation()
REFERENCE: Mapping[str, Any] = {
    "size": "0.16M",
    "target_passes": None,
    "space": "canonical",
    "perturbation": NONE,
}
"""The value of an axis that tasks of all splits may have."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Values of one split; a base model is (seed, tokens, sharpness), and tokens are those of the whole run."""

    keep: tuple[str, ...]
    acquire: Mapping[str, tuple[str, ...]]
    size: tuple[str, ...]
    base: tuple[tuple[int, int, float | None], ...]
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    learning_rate: tuple[float, ...]
    schedule: tuple[str, ...]
    target_passes: tuple[float | None, ...]
    space: tuple[str, ...]
    perturbation: tuple[Perturbation, ...]
    balance: tuple[float, ...]


AXES = {
    "train": Axes(
        keep=("mmlu", "piqa", "sciq", "openbookqa", "socialiqa", "winogrande"),
        acquire={
            "math": ("math", "gsm8k", "mathqa", "aqua"),
            "Health": ("text",),
            "Finance": ("text",),
            "Travel_and_Transportation": ("text",),
        },
        size=("0.06M", "0.16M"),
        base=(
            (0, 1_500_000, None),
            (1, 500_000, None),
            (2, 3_000_000, None),
            (3, 1_500_000, 0.5),
            (4, 750_000, 0.5),
            (5, 1_500_000, 0.2),
            (6, 2_500_000, 1.0),
            (7, 1_000_000, 1.0),
        ),
        steps=(16, 40, 80, 120),
        tokens=(80_000, 160_000),
        learning_rate=(1e-3, 1.5e-3, 2.5e-3),
        schedule=("constant", "linear"),
        target_passes=(None, None, 2.0, 8.0),
        space=("canonical", "canonical", "merged-5", "merged-13", "parts-2"),
        perturbation=(
            Perturbation(kind="noise", noise="random"),
            Perturbation(kind="noise", noise="random", onset=0.5),
            Perturbation(kind="runs_out"),
            Perturbation(kind="noisy_questions"),
        ),
        balance=(0.2, 0.35, 0.65, 0.8),
    ),
    "validation": Axes(
        keep=("commonsenseqa",),
        acquire={"Law_and_Government": ("text",), "Books_and_Literature": ("text",)},
        size=("0.16M",),
        base=((11, 1_200_000, None), (12, 1_700_000, 0.3)),
        steps=(24, 100),
        tokens=(120_000,),
        learning_rate=(2e-3,),
        schedule=("cosine",),
        target_passes=(None, 4.0),
        space=("canonical", "merged-9"),
        perturbation=(Perturbation(kind="noise", noise="shuffled", onset=0.35),),
        balance=(0.4, 0.6),
    ),
    "test": Axes(
        keep=("hellaswag", "arc", "boolq", "text"),
        acquire={
            "code": ("mbpp", "humaneval", "text"),
            "Online_Communities": ("text",),
            "Business_and_Industrial": ("text",),
        },
        size=("0.16M", "0.16M", "0.24M"),
        base=((21, 2_000_000, None), (22, 700_000, None), (23, 1_300_000, 0.4), (24, 4_000_000, None)),
        steps=(10, 60, 200),
        tokens=(100_000, 140_000),
        learning_rate=(1.2e-3, 3e-3),
        schedule=("rewarm", "wsd"),
        target_passes=(None, None, 3.0, 6.0),
        space=("canonical", "canonical", "merged-2", "parts-4", "clusters-200"),
        perturbation=(
            Perturbation(kind="noise", noise="repeated", onset=0.25),
            Perturbation(kind="noise", noise="repeated"),
            Perturbation(kind="stale_probe"),
            Perturbation(kind="bad_base"),
        ),
        balance=(0.25, 0.5, 0.75),
    ),
}
BAD_BASE_TOKENS, BAD_BASE_SHARPNESS = 400_000, 0.03
"""A base model for the perturbation ``"bad_base"``: few tokens of two or three topics."""


def sample_tasks(split: str, count: int, *, seed: int = 0) -> list[TaskSpec]:
    """Random tasks; a larger count adds tasks and changes none.

    `TASKS_PER_MODEL` tasks in a row share target field and base model. The first of them has no perturbation, the
    second has one, the third has one or none.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        count: Number of tasks.
        seed: Seed.

    Raises:
        ConfigurationError: There is no split of that name.
    """
    if split not in AXES:
        raise ConfigurationError(f"there is no split {shown(split)}; choose among {', '.join(AXES)}")
    whole_number("count", count, least=1)
    return [_task(AXES[split], split, number, seed) for number in range(count)]


def _task(axes: Axes, split: str, number: int, seed: int) -> TaskSpec:
    group, place = divmod(number, TASKS_PER_MODEL)
    key = [seed, list(AXES).index(split)]

    def shared(axis: int, values: Sequence[Any]) -> Any:
        return _dealt([*key, axis], values, group)

    def own(axis: int, values: Sequence[Any]) -> Any:
        return _dealt([*key, axis], values, number)

    target = shared(0, tuple(axes.acquire))
    base_seed, base_tokens, sharpness = shared(1, axes.base)
    size = shared(2, axes.size)
    is_perturbed = place == 1 or (place == 2 and own(3, (True, False)))
    perturbation = _dealt([*key, 4], axes.perturbation, 2 * group + place - 1) if is_perturbed else NONE
    base = BaseModel(size=size, tokens=base_tokens, seed=base_seed, sharpness=sharpness)
    if perturbation.kind == "bad_base":
        base = replace(base, tokens=BAD_BASE_TOKENS, sharpness=BAD_BASE_SHARPNESS)
    steps, tokens = own(5, axes.steps), own(6, axes.tokens)
    unit = ROW_TOKENS * ROWS_PER_UPDATE
    return TaskSpec(
        number=number,
        split=split,
        keep=own(7, axes.keep),
        target=target,
        acquire=own(8, axes.acquire[target]),
        base=base,
        steps=steps,
        tokens_per_step=unit * max(1, round(tokens / steps / unit)),
        learning_rate=own(9, axes.learning_rate),
        schedule=own(10, axes.schedule),
        target_passes=own(11, axes.target_passes),
        space=own(12, axes.space),
        perturbation=perturbation,
        balance=own(13, axes.balance),
    )


def _dealt(key: Sequence[int], values: Sequence[Any], number: int) -> Any:
    """A value as from shuffled cards: of each run of `len(values)` numbers, every value gets one."""
    turn, position = divmod(number, len(values))
    order = np.random.default_rng([*key, turn]).permutation(len(values))
    return values[int(order[position])]

"""The ten trainings of `dmagent-plus` as policies of their own: ``--also benchmarks.comparison.trainings``.

The bundled agent is one of them, chosen on surrogate tasks; it has its own name in the comparison.
"""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.comparison.plus import plus
from benchmarks.comparison.policies import Entry

FOLDER = Path(__file__).resolve().parents[2] / "training_record" / "plus" / "trainings"
BUNDLED, BUNDLED_NUMBER = "dmagent-plus", 3
PREFIX = f"{BUNDLED}, training "


def name_of(number: int) -> str:
    """Name in the comparison."""
    return BUNDLED if number == BUNDLED_NUMBER else f"{PREFIX}{number}"


def numbers() -> list[int]:
    """The trainings of the record."""
    return sorted(int(folder.name) for folder in FOLDER.iterdir() if folder.is_dir())


def entries() -> dict[str, Entry]:
    """All trainings but the bundled one."""
    return {
        name_of(number): Entry(make=functools.partial(plus, str(FOLDER / str(number))), reads_feedback=True, turn=5)
        for number in numbers()
        if number != BUNDLED_NUMBER
    }

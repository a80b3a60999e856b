"""The decisions of a run as table rows: when, by whom, on which feedback, to which mix, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader._report.history import RunHistory
from dmagent_loader._report.tables import Table
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.ledger import INITIAL, MANUAL, LedgerEntry
from dmagent_loader.mixture.simplex import FloatArray

NEWEST = 15
"""Decisions in the table that readers see first."""
_CHANGED = 2
"""Domains named in a row, those whose weight changed most."""
_LEAST_CHANGE = 5e-4
_NONE = "–"


@dataclass(frozen=True, kw_only=True)
class DecisionTables:
    """The decisions of a run.

    Attributes:
        newest: The last `NEWEST` decisions and the last `NEWEST` refusals, newest first.
        all: All decisions, newest first; None: `newest` holds them all.
        made: Number of decisions by the policy.
        refused: Number of these that left the previous mix in force.
    """

    newest: Table
    all: Table | None
    made: int
    refused: int


def decision_tables(history: RunHistory) -> DecisionTables:
    """Tables of all mixes and their reasons."""
    plan, fields = history.plan, history.run.measurements[0].fields if history.run.measurements else ()
    space = plan.space
    columns = (
        "after samples",
        "in force from",
        "decided by",
        *(f"mix\n{field}" for field in space.fields),
        *(f"feedback\n{field}\n(change)" for field in fields),
        "largest changes of weight",
        "reason",
    )
    rows, refusals = [], []
    feedback: dict[str, float] = {}
    weights: FloatArray | None = None
    by_time: dict[int, list[LedgerEntry]] = {}
    for entry in plan.ledger:
        by_time.setdefault(entry.decided_at, []).append(entry)
    measured = {measurement.consumed: measurement.feedback for measurement in history.run.measurements}
    for at in sorted({*by_time, *measured}):
        now = measured.get(at, {})
        scores = [_score(now.get(field), feedback.get(field)) for field in fields]
        feedback.update(now)
        entries = by_time.get(at, [])
        if now and not any(entry.feedback is not None for entry in entries):
            rows.append(
                (f"{at:,}", _NONE, history.policy or _NONE, *[_NONE] * len(space.fields), *scores, _NONE, _NOT_IN_FORCE)
            )
        for entry in entries:
            mix = entry.weights()
            if not entry.accepted:
                refusals.append(len(rows))
            rows.append(
                (
                    f"{at:,}",
                    f"{entry.start:,}",
                    entry.decided_by,
                    *(f"{mass:.1%}" for mass in space.field_mass(mix).values()),
                    *(scores if entry.feedback is not None else [_NONE] * len(fields)),
                    _changes(space, weights, mix),
                    _reason(entry),
                )
            )
            weights = mix
    shown = sorted({*range(len(rows))[-NEWEST:], *refusals[-NEWEST:]}, reverse=True)
    return DecisionTables(
        newest=Table(columns=columns, rows=[rows[i] for i in shown], num_texts=2),
        all=None if len(shown) == len(rows) else Table(columns=columns, rows=rows[::-1], num_texts=2),
        made=len(measured),
        refused=len(refusals),
    )


_NOT_IN_FORCE = "logged only: shadow mode, or replaced before a sample was drawn"


def _reason(entry: LedgerEntry) -> str:
    if entry.decided_by == INITIAL and entry.feedback is None:
        return "the mix at the start"
    if entry.decided_by == MANUAL and entry.feedback is None:
        return "set by hand"
    if not entry.accepted:
        return f"refused: {entry.note or 'no reason recorded'}"
    return f"accepted; guard: {entry.note}" if entry.note else "accepted as proposed"


def _score(value: float | None, before: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.3f}" if before is None else f"{value:.3f}\n({signed(value - before)})"


def signed(change: float, digits: int = 3) -> str:
    """A change with its sign, and 0 without one."""
    text = f"{change:+.{digits}f}"
    return text if float(text) else text[1:]


def _changes(space: DomainSpace, before: FloatArray | None, mix: FloatArray) -> str:
    """Domains whose weights changed most, in percentage points."""
    if before is None:
        return _NONE
    change = mix - before
    most: Sequence[int] = np.argsort(-np.abs(change), kind="stable")[:_CHANGED].tolist()
    texts = [f"{space.names[i]} {signed(100 * change[i], 1)}" for i in most if abs(change[i]) >= _LEAST_CHANGE]
    return f"{', '.join(texts)} points" if texts else "none"

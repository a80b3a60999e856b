"""The append-only record of all mixes: the global sample each starts at, who decided it, and on which feedback.

Ledger and seed together determine every sample of a run; see `dmagent_loader.mixture.plan`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dmagent_loader._validation import are_finite_numbers, is_count, is_finite_number, shown
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.simplex import FloatArray, validate_mix

INITIAL = "initial"
MANUAL = "manual"
CHANGED_DATA = "changed data"


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One mix and its origin.

    Args:
        start: Global sample index from which the mix applies.
        mix: D weights that sum to 1, in the order of the ledger's domains.
        decided_by: ``"initial"``, ``"manual"``, ``"changed data"`` (the mix in force, over the domains that a run
            continued with) or the name of the policy.
        decided_at: Samples that training had consumed at the decision; ``start - decided_at`` is the staleness.
        feedback: Feedback behind the decision, by field; None for manual and initial mixes.
        accepted: False if the policy failed and the last good mix was kept.
        note: Remark for readers of the ledger, for example the reason why a proposal was refused.
    """

    start: int
    mix: tuple[float, ...]
    decided_by: str
    decided_at: int
    feedback: Mapping[str, float] | None = None
    accepted: bool = True
    note: str = ""

    @property
    def staleness(self) -> int:
        """Samples trained under the previous mix after the decision."""
        return self.start - self.decided_at

    def weights(self) -> FloatArray:
        """The mix as a vector: (D,)."""
        return self._weights.copy()

    @cached_property
    def _weights(self) -> FloatArray:
        return np.array(self.mix, dtype=np.float64)


class Ledger:
    """An append-only sequence of entries with rising `start`.

    Args:
        domains: The D domain names.
        begin: Global sample index at which the first entry starts.
    """

    def __init__(self, domains: tuple[str, ...], begin: int = 0) -> None:
        self.domains, self.begin = domains, begin
        self._entries: list[LedgerEntry] = []
        self._digests: list[bytes] = []

    def append(self, entry: LedgerEntry) -> None:
        """Adds an entry. It replaces the last one if both start at the same sample: none was drawn under the last.

        Raises:
            StateError: The entry starts before the last one, or the first entry does not start at `begin`.
        """
        if len(entry.mix) != len(self.domains):
            raise StateError(f"the ledger entry has {len(entry.mix)} weights for {len(self.domains)} domains")
        last = self._entries[-1].start if self._entries else self.begin
        if entry.start < last or (not self._entries and entry.start != self.begin):
            raise StateError(
                f"a mix from sample {entry.start} on cannot follow a mix from sample {last} on: the ledger is "
                "append-only"
            )
        if self._entries and entry.start == last:
            self._entries.pop()
            self._digests.pop()
        before = self._digests[-1] if self._digests else b""
        origin = repr((entry.start, entry.decided_by, entry.decided_at)).encode()
        self._digests.append(hashlib.blake2b(before + entry._weights.tobytes() + origin, digest_size=8).digest())
        self._entries.append(entry)

    def in_force(self, index: int) -> LedgerEntry:
        """The entry in force at a global sample index."""
        return self._entries[bisect_right(self._entries, index, key=lambda entry: entry.start) - 1]

    @property
    def last(self) -> LedgerEntry:
        """The newest entry."""
        return self._entries[-1]

    def summary(self) -> str:
        """One line that differs between ledgers with different mixes; ranks compare it."""
        return f"{len(self)} mixes, the newest from sample {self.last.start} on, digest {self._digests[-1].hex()}"

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> LedgerEntry:
        return self._entries[position]

    def to_json(self) -> list[dict[str, Any]]:
        """The entries as JSON values."""
        # dataclasses.asdict would copy weight by weight, which takes seconds for a long run over many domains.
        return [
            {
                "start": entry.start,
                "mix": list(entry.mix),
                "decided_by": entry.decided_by,
                "decided_at": entry.decided_at,
                "feedback": None if entry.feedback is None else dict(entry.feedback),
                "accepted": entry.accepted,
                "note": entry.note,
            }
            for entry in self._entries
        ]

    @classmethod
    def from_json(cls, domains: tuple[str, ...], entries: Any, begin: int = 0) -> Ledger:
        """Rebuilds a ledger from `to_json`.

        Raises:
            StateError: The entries do not form a ledger over these domains.
        """
        if not isinstance(entries, list) or not entries:
            raise StateError("the saved ledger is not a list of entries: the state is damaged")
        ledger = cls(domains, begin)
        for number, saved in enumerate(entries):
            try:
                entry = _entry(saved, domains)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise StateError(
                    f"entry {number} of the saved ledger cannot be read ({type(error).__name__}: {error}): the state "
                    "is damaged or was edited; load an older state"
                ) from error
            ledger.append(entry)
        return ledger


def _entry(saved: Mapping[str, Any], domains: tuple[str, ...]) -> LedgerEntry:
    weights, feedback = saved["mix"], saved.get("feedback")
    if not isinstance(weights, (list, tuple)) or not are_finite_numbers(weights):
        raise ValueError(f"its mix is {shown(weights)}, not a list of finite numbers")
    for name in ("start", "decided_at"):
        if not is_count(saved[name]):
            raise ValueError(f"its {name} is {shown(saved[name])}, not an index of samples")
    for name, kind in (("decided_by", str), ("accepted", bool), ("note", str)):
        if not isinstance(saved.get(name, kind()), kind):
            raise ValueError(f"its {name} is {shown(saved[name])}, not a {kind.__name__}")
    if feedback is not None and not all(map(is_finite_number, feedback.values())):
        raise ValueError(f"its feedback is {shown(feedback)}, not finite numbers by field")
    entry = LedgerEntry(
        start=saved["start"],
        mix=tuple(map(float, weights)),
        decided_by=saved["decided_by"],
        decided_at=saved["decided_at"],
        feedback=None if feedback is None else {str(field): float(value) for field, value in feedback.items()},
        accepted=saved.get("accepted", True),
        note=saved.get("note", ""),
    )
    validate_mix(entry.weights(), domains)
    return entry

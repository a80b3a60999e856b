"""Rows that cannot be used: named once, counted, and replaced by other rows of their domain.

A row is bad if it cannot be decoded, if the transform fails on it, or if, without a transform, it lacks a member that
most rows of its shard have. The sample keeps its global index and its domain, and takes another row: the first good one
of a sequence that follows from the seed, the domain and the index alone (`Plan.replacement`). All ranks, workers and
restores so find the same row without communication, and no other sample changes.

Data workers report the replaced samples through shared memory. Other ranks learn of them at the next decision.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from dmagent_loader._loading.lazy import RowAddress
from dmagent_loader._loading.mailbox import MAX_WORKERS
from dmagent_loader._validation import is_count, shown
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, DecodeError, DMAgentError, StateError
from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.shards import RowSource

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
MAX_ATTEMPTS = 100
"""Rows tried for one sample. With half of a domain bad, one sample in 2**100 would need more."""
_REMEDY = "pass on_bad_row='skip' to train on another row instead, or repair the shard"
_MAX_LISTED = 10_000
"""Replaced samples that a state lists; older ones are only counted."""
_CAPACITY = 512
"""Replaced samples that a data worker can report before the main process reads them; it keeps further ones."""
_LOGGED = 4096
"""Slots for rows that were logged. Two rows with the same slot may be logged again."""


class Replaced(NamedTuple):
    """A sample whose row was bad.

    Attributes:
        at: Global sample index.
        domain: Name of its domain.
        attempt: Number of the row in the sequence of replacements, from 1.
    """

    at: int
    domain: str
    attempt: int


def validated_on_bad_row(value: Any) -> OnBadRow:
    """The rule for bad rows as passed by a user.

    Raises:
        ConfigurationError: It is unknown.
    """
    if value not in get_args(OnBadRow):
        raise ConfigurationError(f"on_bad_row is {shown(value)}; choose one of {list(get_args(OnBadRow))}")
    return value  # type: ignore[no-any-return]


def is_bad_row(error: Exception) -> bool:
    """Whether an error is the fault of the row, and not of a setting, a changed shard or a failing disk."""
    return isinstance(error, DecodeError) or not isinstance(error, (DMAgentError, MemoryError))


class BadRows:
    """The bad rows that one process knows of.

    Args:
        collection: The shards.
        on_bad_row: ``"raise"`` or ``"skip"``.
        most: Largest number of replaced samples of a run, or largest share of the rows of each domain.
    """

    def __init__(self, collection: RowSource, on_bad_row: OnBadRow, most: float) -> None:
        self._collection, self._on_bad_row, self._most = collection, on_bad_row, most
        self._counts: Counter[str] = Counter()
        self._begin = 0
        """Samples before this index are in `_counts`, later ones in `_since`."""
        self._listed: list[tuple[int, int]] = []
        """(index, attempt) of replaced samples before `_begin`."""
        self._since: dict[int, Replaced] = {}
        self._unreported: list[Replaced] = []
        self._shared = _Shared(len(collection.domains)) if self.skips else None

    @property
    def on_bad_row(self) -> OnBadRow:
        """The rule."""
        return self._on_bad_row

    @property
    def skips(self) -> bool:
        """Whether bad rows are replaced."""
        return self._on_bad_row == "skip"

    # Reading

    def replace(
        self, address: RowAddress, error: Exception, make: Callable[[RowAddress], Any], plan: Plan, worker: int | None
    ) -> Any:
        """The sample of a row that takes the place of a bad one.

        Args:
            address: Address of the bad row.
            error: What was wrong with it.
            make: Function from an address to a sample.
            plan: Order of the samples.
            worker: Number of this data worker; None: this is the main process.

        Raises:
            Exception: `error`, if it is not the fault of the row, or bad rows are not skipped.
            DecodeError: There are more bad rows than allowed.
        """
        index, domain, draw, shard, row = address
        where = self._where(domain, shard, row)
        if not is_bad_row(error):
            raise error
        if not self.skips:
            if isinstance(error, DecodeError):
                reason = str(error).removesuffix(f"; {HOW_TO_RESUME}")
                reason = reason if where in reason else f"{where}: {reason}"
                raise DecodeError(f"{reason}; {_REMEDY}; {HOW_TO_RESUME}") from error
            error.add_note(f"at {where}; {_REMEDY}; {HOW_TO_RESUME}")
            raise error
        self._log(where, error)
        name = self._collection.domains[domain]
        self._check_bound(domain, draw, plan, where, error, worker)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            shard, row = plan.replacement(index, domain, attempt)
            try:
                sample = make((index, domain, draw, shard, row))
            except Exception as another:
                if not is_bad_row(another):
                    raise
                self._log(self._where(domain, shard, row), another)
                continue
            self._record(Replaced(index, name, attempt), domain, worker)
            return sample
        raise DecodeError(
            f"{where}: {error}; the {MAX_ATTEMPTS} rows of the domain tried in its place are bad, too: check decode= "
            f"and transform= on one row of this domain, or give it other shards; {HOW_TO_RESUME}"
        ) from error

    def _where(self, domain: int, shard: int, row: int) -> str:
        collection = self._collection
        return f"domain {collection.domains[domain]!r}, row {row} of shard {collection.display(domain, shard)}"

    def _log(self, where: str, error: Exception) -> None:
        assert self._shared is not None
        if self._shared.is_new(where):
            reason = str(error).removeprefix(f"{where}: ") or type(error).__name__
            logger.warning("%s is skipped, another row of the domain takes its place: %s", where, reason)

    def _check_bound(
        self, domain: int, draw: int, plan: Plan, where: str, error: Exception, worker: int | None
    ) -> None:
        assert self._shared is not None
        known = self._shared.found(worker, domain)
        if isinstance(self._most, int):
            count, allowed, among = int(known.sum()), self._most, "of the run"
        else:
            count = int(known[domain])
            allowed = math.ceil(self._most * max(int(plan.num_rows[domain]), draw + 1))
            among = f"of domain {self._collection.domains[domain]!r}"
        if count > allowed:
            raise DecodeError(
                f"{where}: {error}; {count} samples {among} had bad rows, more than the {allowed} that "
                f"max_bad_rows={self._most} allows: check decode= and transform= on these rows, or pass a larger "
                "reading=ReadingConfig(max_bad_rows=...)"
            ) from error

    def _record(self, replaced: Replaced, domain: int, worker: int | None) -> None:
        assert self._shared is not None
        if worker is None:
            self._since[replaced.at] = replaced
        else:
            self._unreported.append(replaced)
            self._unreported = self._shared.report(worker, self._unreported, self._collection.domains)

    # Counting, in the main process

    def counts(self, consumed: int) -> dict[str, int]:
        """Domain -> replaced samples before a global index; domains without any are left out.

        Those of other ranks are included up to the last decision.
        """
        counts = self._counts + Counter(found.domain for found in self._pending(consumed))
        return dict(sorted(counts.items()))

    def to_json(self, consumed: int) -> dict[str, Any]:
        """The counts, and the newest replaced samples, as JSON values."""
        listed = [(index, attempt) for index, attempt in self._listed if index < consumed]
        listed += [(found.at, found.attempt) for found in self._pending(consumed)]
        return {"counts": self.counts(consumed), "replaced": [list(one) for one in _newest(listed)]}

    def share(self, consumed: int, gather: Callable[[list[Replaced]], Iterable[list[Replaced]]]) -> None:
        """Adds what other ranks have found up to a global index; all ranks call it together.

        Args:
            consumed: Samples consumed over all ranks.
            gather: Function that collects a value of all ranks.
        """
        if not self.skips:
            return
        found = {one.at: one for listed in gather(self._pending(consumed)) for one in listed}
        self._counts += Counter(one.domain for one in found.values())
        self._listed = _newest([*self._listed, *((one.at, one.attempt) for one in found.values())])
        self._begin = max(self._begin, consumed)
        self._since = {index: one for index, one in self._since.items() if index >= consumed}
        assert self._shared is not None
        self._shared.set_total([self._counts[name] for name in self._collection.domains])

    def restore(self, saved: SavedBadRows, consumed: int) -> None:
        """Continues from a saved state."""
        self._counts, self._listed, self._begin = Counter(saved.counts), list(saved.replaced), consumed
        if self._shared is not None:
            self._collect()
            self._shared.restart([self._counts[name] for name in self._collection.domains])
        self._since = {}

    def _pending(self, consumed: int) -> list[Replaced]:
        self._collect()
        return [found for index, found in sorted(self._since.items()) if self._begin <= index < consumed]

    def _collect(self) -> None:
        if self._shared is not None:
            for index, domain, attempt in self._shared.collect():
                self._since[index] = Replaced(index, self._collection.domains[domain], attempt)


def _newest(listed: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted(heapq.nlargest(_MAX_LISTED, listed))


class _Shared:
    """Memory shared with the data workers. Each worker writes to a row of its own; the main process to the others."""

    def __init__(self, num_domains: int) -> None:
        self.reports = torch.zeros((MAX_WORKERS, _CAPACITY, 3), dtype=torch.int64)
        self.written = torch.zeros(MAX_WORKERS, dtype=torch.int64)
        self.read = torch.zeros(MAX_WORKERS, dtype=torch.int64)
        self.bad = torch.zeros((MAX_WORKERS + 1, num_domains), dtype=torch.int32)
        """Bad samples found by each worker, and in the last row by the main process, since the process started."""
        self.before = torch.zeros(num_domains, dtype=torch.int64)
        """Bad samples found by other ranks, and before the process started."""
        self.logged = torch.zeros(_LOGGED, dtype=torch.int64)
        for tensor in vars(self).values():
            tensor.share_memory_()

    def is_new(self, where: str) -> bool:
        """Whether a row has not been logged yet."""
        key = stream_key("logged", where) >> 1
        is_new = int(self.logged[key % _LOGGED]) != key
        self.logged[key % _LOGGED] = key
        return is_new

    def found(self, worker: int | None, domain: int) -> Any:
        """Adds a bad sample, and returns how many this rank knows in each domain: (D,) int64."""
        self.bad[MAX_WORKERS if worker is None else worker, domain] += 1
        return (self.bad.sum(0) + self.before).numpy()

    def report(self, worker: int, replaced: list[Replaced], domains: tuple[str, ...]) -> list[Replaced]:
        """Reports replaced samples to the main process; returns those for which there is no room yet."""
        written = int(self.written[worker])
        room = _CAPACITY - (written - int(self.read[worker]))
        for number, one in enumerate(replaced[:room], start=written):
            row = torch.tensor([one.at, domains.index(one.domain), one.attempt])
            self.reports[worker, number % _CAPACITY] = row
        self.written[worker] = written + min(room, len(replaced))
        return replaced[room:]

    def collect(self) -> list[tuple[int, int, int]]:
        """What workers have reported since the last call: (global index, domain, attempt)."""
        found: list[tuple[int, int, int]] = []
        for worker in torch.nonzero(self.written != self.read).flatten().tolist():
            written = int(self.written[worker])
            for number in range(int(self.read[worker]), written):
                index, domain, attempt = self.reports[worker, number % _CAPACITY].tolist()
                found.append((index, domain, attempt))
            self.read[worker] = written
        return found

    def set_total(self, counts: list[int]) -> None:
        """Sets the number of bad samples known in each domain, (D,)."""
        self.before[:] = (torch.tensor(counts) - self.bad.sum(0)).clamp(min=0)

    def restart(self, counts: list[int]) -> None:
        """Forgets what this process has found, and sets the number known before it started, (D,)."""
        self.bad.zero_()
        self.before[:] = torch.tensor(counts)


@dataclass(frozen=True)
class Substitution:
    """`BadRows.replace` for one iterator."""

    bad_rows: BadRows
    plan: Plan
    worker: int | None

    def __call__(self, address: RowAddress, error: Exception, make: Callable[[RowAddress], Any]) -> Any:
        """See `BadRows.replace`."""
        return self.bad_rows.replace(address, error, make, self.plan, self.worker)


@dataclass(frozen=True)
class SavedBadRows:
    """Bad rows of a saved state."""

    counts: Mapping[str, int]
    replaced: tuple[tuple[int, int], ...]
    """(index, attempt) of samples."""

    @classmethod
    def from_json(cls, saved: Any, consumed: int) -> SavedBadRows:
        """Reads the JSON values of `BadRows.to_json`.

        Raises:
            StateError: They cannot be read, or contradict the run.
        """
        try:
            counts = {str(name): count for name, count in saved["counts"].items()}
            replaced = tuple((index, attempt) for index, attempt in saved["replaced"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"the state's bad_rows cannot be read ({error!r}): the state is damaged") from error
        valid = all(map(is_count, counts.values())) and len(replaced) <= _MAX_LISTED
        valid = valid and all(
            is_count(index) and index < consumed and is_count(attempt) and 1 <= attempt <= MAX_ATTEMPTS
            for index, attempt in replaced
        )
        if not valid:
            raise StateError(
                f"the state's bad_rows are {shown(saved)}, which are not counts and samples of this run: the state is "
                "damaged or was edited; load an older one"
            )
        return cls(counts, replaced)

"""The segments of a run as JSON values: from them, and without any shard, the plan of the run can be built again.

Of each shard, a state holds the number of rows and 64 bits that identify the content: about 11 characters, or nothing
where an earlier segment had the same shard. File names, which only messages use, are kept for the newest segment.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dmagent_loader._validation import is_count, shown
from dmagent_loader.errors import ConfigurationError, EmptyShardError, StateError
from dmagent_loader.mixture.domains import Domain, DomainSpace
from dmagent_loader.mixture.exhaustion import EXHAUSTION_RULES, ExhaustionRule
from dmagent_loader.mixture.ledger import Ledger
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.rest_of_pass import ShardSet, partners
from dmagent_loader.mixture.segment import Segment
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.mixture.simplex import IntArray

_MAX_NAME_BYTES = 1 << 20
"""Compressed file names that a state holds; if there are more, messages do without."""
_MAX_SHARDS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run, and the settings that determine their order.

    Attributes:
        space: The domains.
        rules: (D,) exhaustion rules.
        shuffle: Settings of the shuffle.
        shards: The shards.
        names: For each domain, the file names of the shards; None: unknown.
    """

    space: DomainSpace
    rules: tuple[ExhaustionRule, ...]
    shuffle: Shuffle
    shards: ShardSet
    names: Sequence[Sequence[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class SavedSegment(RunData):
    """A segment in a state. Its domains have no topics, which only policies use.

    Attributes:
        begin: Global index of its first sample.
        ledger: Mixes of the segment.
    """

    begin: int
    ledger: Ledger


@dataclass(frozen=True)
class SegmentWriter:
    """Writes the segments of a plan; what does not change between two states is written once.

    Args:
        plan: The plan.
        names: For each domain in force, the file names of its shards.
    """

    plan: Plan
    names: Sequence[Sequence[str]] | None

    @cached_property
    def _fixed(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        segments = self.plan.segments
        return _write_shards(segments[-1].shards, self.names), [
            _write_earlier(segment, following) for segment, following in itertools.pairwise(segments)
        ]

    def to_json(self) -> dict[str, Any]:
        """The entries of a state, besides the settings of the newest segment."""
        shards, earlier = self._fixed
        return {
            "begin": self.plan.begin,
            "shards": shards,
            "ledger": self.plan.segments[-1].ledger.to_json(),
            "earlier_segments": earlier,
        }


def read_segments(state: Mapping[str, Any]) -> list[SavedSegment]:
    """The segments in a state, oldest first.

    Raises:
        StateError: They cannot be read.
    """
    earlier = state["earlier_segments"]
    if not isinstance(earlier, list):
        raise StateError(f"the state's earlier_segments are {shown(earlier)}, not a list: the state is damaged")
    segments = [_read_segment(state, None)]
    for saved in reversed(earlier):
        if not isinstance(saved, Mapping):
            raise StateError(f"a segment of the state is {shown(saved)}: the state is damaged")
        segments.append(_read_segment(saved, segments[-1].shards))
    segments.reverse()
    if segments[0].begin != 0 or any(a.begin >= b.begin for a, b in itertools.pairwise(segments)):
        begins = [segment.begin for segment in segments]
        raise StateError(f"the state's segments begin at samples {shown(begins)}: it is damaged or was edited")
    return segments


def rebuild(segments: Sequence[SavedSegment], seed: int, newest: RunData | None = None) -> Plan:
    """The plan of saved segments.

    Args:
        segments: The segments, oldest first.
        seed: Seed of the run.
        newest: The data of this run, if they are those of the last segment.

    Raises:
        StateError: The segments contradict each other.
    """
    try:
        plan: Plan | None = None
        for number, saved in enumerate(segments):
            used: RunData = newest if newest is not None and number == len(segments) - 1 else saved
            if plan is None:
                rules = dict(zip(used.space.names, used.rules, strict=True))
                plan = Plan(used.space, used.shards, seed=seed, exhausted=rules, shuffle=used.shuffle)
                plan.extend(saved.ledger)
            else:
                plan = plan.changed(
                    saved.begin,
                    used.space,
                    used.shards,
                    rules=used.rules,
                    shuffle=used.shuffle,
                    entries=saved.ledger,
                )
    except (EmptyShardError, ConfigurationError) as error:
        raise StateError(f"the state's segments do not form a plan ({error}): it is damaged or was edited") from error
    assert plan is not None
    return plan


def _write_earlier(segment: Segment, following: Segment) -> dict[str, Any]:
    ledger = Ledger(segment.space.names, segment.begin)
    for entry in segment.ledger:
        if entry.start < following.begin:
            ledger.append(entry)
    return {
        "begin": segment.begin,
        "domains": list(segment.space.names),
        "domain_fields": [domain.field for domain in segment.space.domains],
        "exhausted": list(segment.rules),
        "shuffle_window": segment.shuffle.window,
        "shuffle_shards": segment.shuffle.shards,
        "shards": _write_shards(segment.shards, None, following.shards),
        "ledger": ledger.to_json(),
    }


def _write_shards(
    shards: ShardSet, names: Sequence[Sequence[str]] | None, following: ShardSet | None = None
) -> dict[str, Any]:
    rows, contents = _joined(shards.rows), _joined(shards.contents)
    saved: dict[str, Any] = {"numbers": [len(its) for its in shards.rows]}
    new = np.ones(len(rows), dtype=bool)
    if following is not None:
        kept = partners(contents, rows, _joined(following.contents), _joined(following.rows))
        # Most shards keep their order, so differences compress to nearly nothing.
        saved["kept"] = _packed(np.diff(kept, prepend=0))
        new = kept < 0
    saved |= {"rows": _packed(rows[new]), "contents": base64.b64encode(contents[new].astype("<u8").tobytes()).decode()}
    if names is not None:
        text = "\n".join(name.replace("\n", "?") for its in names for name in its)
        compressed = zlib.compress(text.encode("utf-8", "surrogateescape"))
        fits = len(compressed) <= _MAX_NAME_BYTES
        saved["names"] = base64.b64encode(compressed).decode() if fits else None
    return saved


def _read_segment(saved: Mapping[str, Any], following: ShardSet | None) -> SavedSegment:
    try:
        names, fields, rules = saved["domains"], saved["domain_fields"], saved["exhausted"]
        for key, values in (("domains", names), ("domain_fields", fields), ("exhausted", rules)):
            texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
            if not texts or len(values) != len(names):
                raise StateError(
                    f"the state's {key} is {shown(values)}, not a list with a text for each domain: it is damaged; "
                    "load an older one"
                )
        if not set(rules) <= set(EXHAUSTION_RULES):
            raise ValueError(f"exhausted is {shown(rules)}")
        begin = saved["begin"]
        if not is_count(begin):
            raise ValueError(f"begin is {shown(begin)}")
        for key in ("shuffle_window", "shuffle_shards"):
            if not is_count(saved[key]) or saved[key] < 1:
                raise ValueError(f"{key} is {shown(saved[key])}")
        space = DomainSpace(tuple(Domain(name=name, field=field) for name, field in zip(names, fields, strict=True)))
        shards, files = _read_shards(saved["shards"], len(space), following)
        return SavedSegment(
            begin=begin,
            space=space,
            rules=tuple(rules),
            shuffle=Shuffle(window=saved["shuffle_window"], shards=saved["shuffle_shards"]),
            shards=shards,
            ledger=Ledger.from_json(space.names, saved["ledger"], begin),
            names=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, zlib.error, binascii.Error) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(
            f"a segment of the state cannot be read ({type(error).__name__}: {error}): the state is damaged or was "
            "edited; load an older one"
        ) from error


def _read_shards(
    saved: Mapping[str, Any], num_domains: int, following: ShardSet | None
) -> tuple[ShardSet, list[list[str]] | None]:
    numbers = saved["numbers"]
    if len(numbers) != num_domains or not all(map(is_count, numbers)) or sum(numbers) > _MAX_SHARDS:
        raise ValueError(f"it has shards of {len(numbers)} domains for {num_domains}")
    total = sum(numbers)
    new = np.ones(total, dtype=bool)
    rows, contents = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.uint64)
    if following is not None:
        kept = np.cumsum(_unpacked(saved["kept"], total))
        new = kept < 0
        rows_after, contents_after = _joined(following.rows), _joined(following.contents)
        if len(kept) and int(kept.max()) >= len(rows_after):
            raise ValueError("it refers to shards that are not there")
        rows[~new], contents[~new] = rows_after[kept[~new]], contents_after[kept[~new]]
    rows[new] = _unpacked(saved["rows"], int(new.sum()))
    listed = np.frombuffer(base64.b64decode(saved["contents"], validate=True), "<u8")
    if len(listed) != int(new.sum()):
        raise ValueError(f"it identifies {len(listed)} shards instead of {int(new.sum())}")
    contents[new] = listed
    if len(rows) and (rows.min() < 0 or rows.max() > 1 << 40):
        raise ValueError("its shards have impossible numbers of rows")
    ends = np.cumsum(numbers)[:-1]
    return ShardSet(np.split(rows, ends), np.split(contents, ends)), _read_names(saved.get("names"), numbers)


def _read_names(saved: Any, numbers: Sequence[int]) -> list[list[str]] | None:
    """File names by domain; None: there are none, or not as many as shards."""
    if not isinstance(saved, str):
        return None
    limit = 4096 * (sum(numbers) + 1)
    text = zlib.decompressobj().decompress(base64.b64decode(saved, validate=True), limit)
    names = text.decode("utf-8", "surrogateescape").split("\n")
    if len(names) != sum(numbers):
        return None
    ends = np.cumsum([0, *numbers]).tolist()
    return [names[begin:end] for begin, end in itertools.pairwise(ends)]


def _joined(columns: Sequence[Any]) -> Any:
    return np.concatenate([columns[0][:0], *columns])


def _packed(values: IntArray) -> str:
    return base64.b64encode(zlib.compress(values.astype("<i8").tobytes(), 9)).decode()


def _unpacked(text: Any, count: int) -> IntArray:
    data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 8 * count + 1)
    if len(data) != 8 * count:
        raise ValueError(f"it has {len(data) / 8:g} numbers instead of {count}")
    return np.frombuffer(data, "<i8").astype(np.int64)

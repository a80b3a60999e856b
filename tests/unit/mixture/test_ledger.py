"""The ledger only grows, says which mix holds where, and comes back from JSON as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dmagent_loader.errors import StateError
from dmagent_loader.mixture.ledger import INITIAL, MANUAL, Ledger, LedgerEntry

DOMAINS = ("source/web", "target/math")


def entry(start: int, first: float = 0.5, **more: Any) -> LedgerEntry:
    return LedgerEntry(**{"start": start, "mix": (first, 1 - first), "decided_by": MANUAL, "decided_at": start, **more})


def ledger_of(*entries: LedgerEntry) -> Ledger:
    ledger = Ledger(DOMAINS)
    for its in entries:
        ledger.append(its)
    return ledger


FEEDBACK = {"math": -2.0, "general": -3.5}
ENTRIES = (
    entry(0, 0.75, decided_by=INITIAL),
    entry(40, 0.5, decided_by="static", decided_at=32, feedback=FEEDBACK, note="change of 0.4 cut to 0.25"),
    entry(80, 0.5, decided_by="static", decided_at=64, feedback=FEEDBACK, accepted=False),
)


def test_the_mix_in_force_is_that_of_the_last_entry_before_a_sample():
    ledger = ledger_of(*ENTRIES)
    assert [ledger.in_force(index).start for index in (0, 39, 40, 79, 80, 10**12)] == [0, 0, 40, 40, 80, 80]
    assert (len(ledger), ledger.last, ledger[1]) == (3, ENTRIES[2], ENTRIES[1])
    assert list(ledger) == list(ENTRIES)
    assert ENTRIES[1].staleness == 8
    assert ENTRIES[0].weights().tolist() == [0.75, 0.25]


def test_an_entry_that_starts_where_the_last_one_does_replaces_it():
    """No sample was drawn under that one."""
    ledger = ledger_of(*ENTRIES, entry(80, 0.1))
    assert [its.mix[0] for its in ledger] == [0.75, 0.5, 0.1]
    assert ledger.summary() == ledger_of(*ENTRIES[:2], entry(80, 0.1)).summary()


@pytest.mark.parametrize(
    ("before", "wrong", "message"),
    [
        ((), entry(1), "from sample 1 on cannot follow a mix from sample 0"),
        (ENTRIES, entry(79), "from sample 79 on cannot follow a mix from sample 80"),
        (ENTRIES, entry(90, mix=(1.0,)), "1 weights for 2 domains"),
    ],
    ids=["a late beginning", "the past", "another space"],
)
def test_the_past_is_not_rewritten(before, wrong, message):
    ledger = ledger_of(*before)
    with pytest.raises(StateError, match=message):
        ledger.append(wrong)
    assert list(ledger) == list(before)


@pytest.mark.parametrize(
    "change", [{"first": 0.25 + 2**-54}, {"start": 41}, {"decided_by": "agent"}, {"decided_at": 33}]
)
def test_ranks_with_other_mixes_have_other_summaries(change):
    """Also where the mixes differ in the last bit, or somewhere in the middle."""
    same = {"start": 40, "first": 0.25, "decided_by": "static", "decided_at": 32}
    one, other = (ledger_of(entry(0), entry(**its), entry(80)) for its in (same, {**same, **change}))
    assert one.summary() == ledger_of(entry(0), entry(**same), entry(80)).summary()
    assert one.summary() != other.summary()
    assert one.summary().startswith("3 mixes, the newest from sample 80 on, digest ")


def test_a_ledger_comes_back_from_json_as_it_was():
    ledger = ledger_of(*ENTRIES)
    again = Ledger.from_json(DOMAINS, json.loads(json.dumps(ledger.to_json())))
    assert list(again) == list(ledger)
    assert again.summary() == ledger.summary()
    assert again.to_json() == ledger.to_json()


def test_json_is_a_copy():
    ledger = ledger_of(*ENTRIES)
    saved = ledger.to_json()
    saved[1]["feedback"]["math"] = 0.0
    saved[1]["mix"][0] = 1.0
    assert list(ledger) == list(ENTRIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": [0.5, 0.6]}, "entry 1 .*MixError"),
        ({"mix": [1.0]}, "entry 1"),
        ({"mix": "10"}, "entry 1 .*its mix is '10'"),
        ({"start": -1}, "entry 1 .*its start is -1"),
        ({"decided_at": 1.5}, "entry 1 .*its decided_at is 1.5"),
        ({"decided_by": 3}, "entry 1 .*its decided_by is 3, not a str"),
        ({"accepted": "no"}, "entry 1 .*its accepted is 'no', not a bool"),
        ({"feedback": {"math": float("nan")}}, "entry 1 .*its feedback"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_damaged_entry_is_named(change, message):
    saved = ledger_of(*ENTRIES).to_json()
    saved[1] |= change
    with pytest.raises(StateError, match=message):
        Ledger.from_json(DOMAINS, saved)


@pytest.mark.parametrize("saved", [None, [], {}, "ledger"])
def test_what_is_no_ledger_is_refused(saved):
    with pytest.raises(StateError, match="not a list of entries"):
        Ledger.from_json(DOMAINS, saved)

"""What is kept open: bounded, and what is in use stays."""

from __future__ import annotations

from dmagent_loader.shards.bounded_cache import Recent


def test_what_is_used_stays_and_the_number_is_bounded() -> None:
    opened: list[int] = []

    def open_one(key: int) -> int:
        opened.append(key)
        return -key

    recent = Recent(open_one, 3)
    for key in range(20):
        assert recent.get(key) == -key
        assert recent.get(0) == 0, "asked for all the time"
    assert opened == list(range(20)), "0 was let go although it was in use"
    recent.clear()
    recent.get(0)
    assert opened[-1] == 0

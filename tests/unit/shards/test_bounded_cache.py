"""The cache of open resources: bounded, and a resource in use stays."""

from __future__ import annotations

from dmagent_loader.shards.bounded_cache import BoundedCache


def test_what_is_used_stays_and_the_number_is_bounded() -> None:
    opened: list[int] = []

    def open_one(key: int) -> int:
        opened.append(key)
        return -key

    cache = BoundedCache(open_one, 3)
    assert cache.if_open(0) is None
    assert not opened
    for key in range(20):
        assert cache.get(key) == -key
        assert cache.get(0) == 0, "asked for all the time"
        assert cache.if_open(key) == -key
    assert opened == list(range(20)), "0 was dropped although it was in use"
    cache.clear()
    cache.get(0)
    assert opened[-1] == 0


def test_the_weight_is_bounded_and_one_resource_is_always_kept() -> None:
    opened: list[int] = []

    def open_one(key: int) -> int:
        opened.append(key)
        return key

    cache = BoundedCache(open_one, 10, weigh=lambda value: value)
    for key in (4, 5, 4, 5):
        cache.get(key)
    assert opened == [4, 5]
    for key in (20, 20):
        assert cache.get(key) == 20
    assert opened == [4, 5, 20]
    cache.get(4)
    assert opened == [4, 5, 20, 4], "the heavy one should have made room"

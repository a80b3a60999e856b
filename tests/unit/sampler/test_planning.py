"""How far ahead a rank plans; the order of its samples does not depend on it."""

from __future__ import annotations

import itertools

import pytest

from dmagent_loader.mixture.sharding import StreamLayout


def test_after_a_new_mix_a_rank_plans_about_as_far_as_it_came_under_the_last(build, monkeypatch: pytest.MonkeyPatch):
    """A rank of many delivers few samples between two mixes, and the rest of what it planned is lost."""
    planned: list[int] = []
    indices = StreamLayout.indices

    def counted(self, first, count, *others):
        planned.append(count)
        return indices(self, first, count, *others)

    monkeypatch.setattr(StreamLayout, "indices", counted)
    sampler = build(exhausted="repeat", rank=3, world_size=8)
    samples = iter(sampler)
    under_each_mix = []
    for number in range(12):
        planned.clear()
        taken = list(itertools.islice(samples, 20 if number < 10 else 100))
        assert len(taken) == (20 if number < 10 else 100)
        under_each_mix.append(list(planned))
        sampler.set_mix({"source": 0.5 + number / 50, "target": 0.5 - number / 50})
    assert under_each_mix[0] == [512]
    assert under_each_mix[9] == [25]
    assert under_each_mix[10] == [25, 50, 100], "a mix that lasts longer is planned in longer runs"
    assert under_each_mix[11] == [125]

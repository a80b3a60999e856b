"""Blocks cover every row once, and have the same names wherever the shard lies."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.shards.sources import blocks
from dmagent_loader.shards.sources.blocks import BlockLayout


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)


def layout_of(sizes: list[int], gap: int = 10, content: str = "a") -> tuple[BlockLayout, np.ndarray, np.ndarray]:
    ends = np.cumsum(np.array(sizes, np.int64) + gap)
    starts = ends - np.array(sizes)
    return BlockLayout(content, starts, ends), starts, ends


@pytest.mark.parametrize("seed", range(20))
def test_every_row_lies_in_exactly_one_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 40, 300, 999, 1000, 1001, 5000], size=rng.integers(1, 60)).tolist()
    layout, starts, ends = layout_of(sizes)
    covered = 0
    for number in range(len(layout)):
        block = layout[number]
        covered += block.rows
        assert block.length <= 1000 + 999 + 1000 or block.rows == 1
    assert covered == len(sizes)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        block = layout[layout.of_row(row)]
        assert block.start <= start
        assert end <= block.start + block.length


def test_a_row_larger_than_a_block_is_a_block_of_its_own() -> None:
    layout, _, _ = layout_of([100, 5000, 100, 100])
    assert [(layout[n].rows, layout[n].length) for n in range(len(layout))] == [(1, 100), (1, 5000), (2, 210)]


def test_names_tell_contents_and_places_of_rows_apart() -> None:
    names = {
        layout_of([100, 200])[0][0].name,
        layout_of([100, 200], content="b")[0][0].name,
        layout_of([100, 200], gap=12)[0][0].name,
    }
    assert len(names) == 3
    assert layout_of([100, 200])[0][0].name in names


def test_a_shard_without_rows_has_no_blocks() -> None:
    layout, _, _ = layout_of([])
    assert len(layout) == 0

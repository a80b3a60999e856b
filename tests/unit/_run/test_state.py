"""A state in a file comes back as it was, and a file that is no state is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader._run.state import load_state, save_state
from dmagent_loader.errors import StateError
from dmagent_loader.testing import sample_ids, write_toy_shards


def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    shards = write_toy_shards(tmp_path / "shards", {"source/web": 30, "target/math": 20})

    def build() -> AgentWeightedSampler:
        return AgentWeightedSampler(
            shards, samples_per_reweight=10, reading=ReadingConfig(progress=False, cache_dir=tmp_path / "cache")
        )

    sampler = build()
    sample_ids(sampler, 17)
    save_state(tmp_path / "state.json", {"step": 17, "sampler": sampler.state_dict()})
    saved = load_state(tmp_path / "state.json")
    resumed = build()
    resumed.load_state_dict(saved["sampler"])
    assert saved["step"] == 17
    assert sample_ids(resumed) == sample_ids(build())[17:]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"step": 17, "samp', b"[1, 2]", b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "a list", "not UTF-8", "deep"],
)
def test_a_file_that_is_no_state_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(StateError, match=r"state\.json"):
        load_state(tmp_path / "state.json")


def test_a_file_that_is_missing_and_a_state_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="missing"):
        load_state(tmp_path / "state.json")
    with pytest.raises(ValueError, match="JSON"):
        save_state(tmp_path / "state.json", {"loss": float("nan")})
    assert not (tmp_path / "state.json").exists()

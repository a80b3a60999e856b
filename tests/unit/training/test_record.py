"""The recorded set: one file holds everything, and its statistics are over all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.errors import StateError
from dmagent_loader.training.record import FeedbackRecord


def test_a_saved_record_loads_with_everything(collected: FeedbackRecord, tmp_path: Path) -> None:
    collected.save(tmp_path / "recorded.safetensors")
    loaded = FeedbackRecord.load(tmp_path / "recorded.safetensors")
    assert np.array_equal(loaded.feedback, collected.feedback, equal_nan=True)
    assert np.array_equal(loaded.losses, collected.losses, equal_nan=True)
    rounded = collected.trajectories.mixes.astype(np.float32)
    assert np.array_equal(loaded.trajectories.mixes, rounded.astype(np.float64)), "mixes are stored in float32"
    for name in ("lengths", "candidates", "starts", "target_distribution"):
        assert np.array_equal(getattr(loaded.trajectories, name), getattr(collected.trajectories, name)), name
    assert loaded.trajectories.config == collected.trajectories.config
    assert (loaded.fields, loaded.seconds) == (("general", "math"), collected.seconds)
    # JSON knows no tuples; everything else comes back as it was.
    assert loaded.settings["collection"]["proxy"] == collected.settings["collection"]["proxy"]
    assert loaded.settings["corpus"] == collected.settings["corpus"]
    assert loaded.settings["proxy_parameters"] == collected.settings["proxy_parameters"] > 1000


def test_another_file_is_refused(collected: FeedbackRecord, tmp_path: Path) -> None:
    collected.trajectories.save(tmp_path / "trajectories.safetensors")
    with pytest.raises(StateError, match="has schema trajectories/2, not feedback/2"):
        FeedbackRecord.load(tmp_path / "trajectories.safetensors")


def test_statistics_are_over_all_steps_of_all_trajectories(collected: FeedbackRecord) -> None:
    """Catches statistics of one set, or with the padding after the ends."""
    lengths = collected.trajectories.lengths
    values = np.concatenate([f[: n + 1] for f, n in zip(collected.feedback, lengths, strict=True)])
    statistics = collected.statistics()
    assert statistics.count == collected.num_feedbacks + len(collected.feedback)
    assert np.allclose(statistics.mean, values.mean(axis=0))
    assert np.allclose(statistics.std, values.std(axis=0))

"""Folders of partial results: one computation each, and only whole files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmagent_loader.errors import StateError
from dmagent_loader.training.run_folder import claim, save_tensors

SETTINGS = {"corpus": "abc", "questions": {"limits": (64, 24)}}


def test_the_same_computation_may_come_back(tmp_path: Path) -> None:
    """Catches a comparison before JSON, to which a tuple is not the list that was read."""
    folder = tmp_path / "deep" / "down"
    claim(folder, SETTINGS, "feedback")
    before = (folder / "settings.json").read_bytes()
    claim(folder, SETTINGS, "feedback")
    assert (folder / "settings.json").read_bytes() == before
    assert json.loads(before)["questions"]["limits"] == [64, 24]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**SETTINGS, "corpus": "xyz"}, "other corpus:"),
        ({**SETTINGS, "questions": {"limits": (64, 25)}}, "other questions:"),
        ({**SETTINGS, "evaluate_every": 10}, "other evaluate_every:"),
    ],
)
def test_another_computation_is_refused_and_told_what_differs(tmp_path: Path, other: dict, named: str) -> None:
    claim(tmp_path, SETTINGS, "feedback")
    with pytest.raises(StateError, match=f"holds feedback of {named} continuing would mix"):
        claim(tmp_path, other, "feedback")


def test_tensors_that_are_views_are_written_by_their_values(tmp_path: Path) -> None:
    """The file format stores memory: a transposed view would come back in the wrong order, or be refused."""
    matrix = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "t.safetensors", {"a": matrix.T, "b": matrix[:, 1]})
    loaded = load_file(str(tmp_path / "t.safetensors"))
    assert torch.equal(loaded["a"], matrix.T)
    assert torch.equal(loaded["b"], matrix[:, 1])

"""The programs of the pages on loops of one's own continue exactly where they were killed, as the pages say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from docs.snippets import Session, blocks_of

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
PLAIN, ACCELERATE = "docs/trainers/plain-loop.md", "docs/trainers/accelerate.md"


class Run:
    """One run of a page's first program, and the batches that it trained on."""

    def __init__(self, page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int | None = None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.trained: list[list[int]] = []
        cross_entropy = torch.nn.functional.cross_entropy

        def spied(logits: torch.Tensor, labels: torch.Tensor, **settings: Any) -> torch.Tensor:
            if settings:  # the environment's call
                return cross_entropy(logits, labels, **settings)
            self.trained.append(labels.tolist())
            if len(self.trained) == killed_at:
                raise KeyboardInterrupt
            return cross_entropy(logits, labels)

        folder.mkdir(exist_ok=True)
        session = Session(folder)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "cross_entropy", spied)
            if killed_at is None:
                session.run(blocks_of(page)[0])
            else:
                with pytest.raises(KeyboardInterrupt):
                    session.run(blocks_of(page)[0])
        self.names: dict[str, Any] = session.names

    @property
    def decided(self) -> list[int]:
        return [entry.decided_at for entry in self.names["sampler"].ledger if entry.decided_by != "initial"]

    @property
    def weights(self) -> list[torch.Tensor]:
        return list(self.names["model"].state_dict().values())


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(("page", "interval"), [(PLAIN, 40), (ACCELERATE, 32)])
def test_killed_and_started_again_it_ends_the_same(
    page: str, interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(page, tmp_path / "whole", monkeypatch)
    assert whole.names["mixing"].consumed == whole.names["sampler"].end > 64
    assert whole.decided[:4] == [0, interval, 2 * interval, 3 * interval]
    Run(page, tmp_path / "killed", monkeypatch, killed_at=8)
    resumed = Run(page, tmp_path / "killed", monkeypatch)
    assert resumed.trained == whole.trained[5:]
    assert list(resumed.names["sampler"].ledger) == list(whole.names["sampler"].ledger)
    assert all(map(torch.equal, resumed.weights, whole.weights))


def test_accelerate_logs_to_its_own_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(ACCELERATE, tmp_path / "run", monkeypatch)
    assert list((tmp_path / "run" / "runs" / "mixing").glob("events.out.tfevents.*"))


def test_torchdata_restores_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's second block: killed after five batches, the next process trains on what was left."""
    pytest.importorskip("torchdata.stateful_dataloader")
    session = Session(tmp_path)
    program, torchdata = blocks_of(ACCELERATE)
    session.run(program)
    assert session.run(torchdata) == torchdata.output
    assert session.names["seen"] == list(range(40))

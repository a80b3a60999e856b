"""Who works off the units: the result is the same, and what fails or dies is dealt with."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import REPOSITORY
from torch import Tensor

from dmagent_loader.errors import ConfigurationError, MissingExtraError
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.feedback import FeedbackConfig, collect_feedback
from dmagent_loader.training.proxies.model import ProxyTrainer
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.trajectories import Trajectories

Inputs = tuple[Trajectories, Corpus, ProxyQuestions, dict[str, Tensor], FeedbackConfig]

UNITS = '''
import os, time
from pathlib import Path
import torch

class Units:
    """Leaves a file for each unit that is begun; does what its name says on unit 0."""

    def __init__(self, folder, deed):
        self.folder, self.deed = Path(folder), deed

    def work(self, number):
        first = not (self.folder / str(number)).exists()
        (self.folder / str(number)).touch()
        if number == 0 and self.deed == "fail":
            raise ValueError("unit 0 cannot be done")
        if number == 0 and self.deed == "die once" and first:
            os._exit(1)
        if self.deed == "meet":
            deadline = time.monotonic() + 60
            while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            return {"together": torch.tensor(len(list(self.folder.iterdir())))}
        if self.deed == "count":
            (self.folder / f"in {number}").touch()
            time.sleep(0.3)
            together = len(list(self.folder.glob("in *")))
            (self.folder / f"in {number}").unlink()
            return {"together": torch.tensor(together)}
        time.sleep(0.1)
        return {"number": torch.tensor(number), "threads": torch.tensor(torch.get_num_threads())}
'''


@pytest.fixture
def inputs(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    bases: dict[str, Tensor],
    small: FeedbackConfig,
) -> Inputs:
    return trajectories, corpus, questions, bases, small


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The class above, in a module that other processes can import too."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "some_units.py").write_text(UNITS, encoding="utf-8")
    root = str(REPOSITORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), root, os.environ.get("PYTHONPATH", "")]))
        yield importlib.import_module("some_units").Units


@pytest.fixture(scope="module")
def two_ray_workers(units: Any) -> Iterator[Any]:
    """A Ray of this machine with two workers, which find the module of `units`."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def assert_same(record: FeedbackRecord, other: FeedbackRecord) -> None:
    assert np.allclose(record.feedback, other.feedback, rtol=0, atol=1e-6, equal_nan=True)
    assert np.allclose(record.losses, other.losses, rtol=0, atol=1e-6, equal_nan=True)
    assert record.settings == other.settings


def test_two_processes_collect_the_same_record_as_one(
    collected: FeedbackRecord, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they leave in the folder is all that this process needs to make the record again."""
    both = collect_feedback(*inputs, tmp_path, workers=Workers(count=2), progress=False)
    assert_same(both, collected)
    monkeypatch.setattr(ProxyTrainer, "train", lambda self, rows: pytest.fail("a finished unit was trained again"))
    assert_same(collect_feedback(*inputs, tmp_path, progress=False), both)


def test_results_come_in_the_order_of_the_units_and_processes_share_the_cores(units: Any, tmp_path: Path) -> None:
    """Catches results in the order in which they end, and as many threads in each process as there are cores."""
    results = Workers(count=2).run(units(tmp_path, "work"), [1] * 5, progress=False)
    assert [int(result["number"]) for result in results] == list(range(5))
    assert {int(result["threads"]) for result in results} == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_a_failure_is_raised_at_once(units: Any, tmp_path: Path) -> None:
    """Catches a pool that works off its whole queue, for hours perhaps, before it shows the error."""
    with pytest.raises(ValueError, match="unit 0 cannot be done"):
        Workers(count=2).run(units(tmp_path, "fail"), [1] * 60, progress=False)
    begun = [int(file.name) for file in tmp_path.iterdir() if file.is_file()]
    assert 0 in begun
    assert len(begun) < 30


@pytest.mark.slow
def test_ray_workers_collect_the_same_record(
    collected: FeedbackRecord,
    inputs: Inputs,
    two_ray_workers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Into a folder that is given by a relative path, which other processes would look for elsewhere."""
    monkeypatch.chdir(tmp_path)
    folder = Path("feedback")
    record = collect_feedback(*inputs, folder, workers=Workers(count=2, backend="ray"), progress=False)
    assert_same(record, collected)
    assert len(list(folder.glob("group-*.safetensors"))) == 4
    assert two_ray_workers.is_initialized()


@pytest.mark.slow
def test_a_ray_task_that_dies_is_done_again(units: Any, two_ray_workers: Any, tmp_path: Path) -> None:
    results = Workers(count=2, backend="ray").run(units(tmp_path, "die once"), [1] * 3, progress=False)
    assert [int(result["number"]) for result in results] == [0, 1, 2]


@pytest.mark.slow
def test_ray_works_on_no_more_units_at_once_than_asked_for(units: Any, two_ray_workers: Any, tmp_path: Path) -> None:
    """Catches a number that only a Ray that is started here would keep to."""
    one = Workers(count=1, backend="ray").run(units(tmp_path, "count"), [1] * 4, progress=False)
    assert [int(result["together"]) for result in one] == [1, 1, 1, 1]
    (tmp_path / "again").mkdir()
    free = Workers(count=None, backend="ray").run(units(tmp_path / "again", "meet"), [1] * 2, progress=False)
    assert [int(result["together"]) for result in free] == [2, 2]


@pytest.mark.slow
def test_a_failure_under_ray_is_raised_with_its_message(units: Any, two_ray_workers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unit 0 cannot be done"):
        Workers(count=2, backend="ray").run(units(tmp_path, "fail"), [1] * 60, progress=False)
    assert len([file for file in tmp_path.iterdir() if file.is_file()]) < 30


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, units: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"needs 'ray', .* pip install 'dmagent-loader\[ray\]'"):
        Workers(count=None, backend="ray").run(units(tmp_path, "work"), [1], progress=False)


def test_numbers_of_workers_that_cannot_work_are_refused() -> None:
    for wrong in ({"count": 0}, {"count": None}, {"count": -1, "backend": "ray"}):
        with pytest.raises(ConfigurationError, match="workers: give a number of at least 1"):
            Workers(**wrong)
    with pytest.raises(ConfigurationError, match="unknown backend 'slurm'"):
        Workers(backend="slurm")


def test_one_worker_is_this_process(units: Any, tmp_path: Path) -> None:
    results = Workers().run(units(tmp_path, "work"), [2, 1], progress=False)
    assert [int(result["threads"]) for result in results] == [torch.get_num_threads()] * 2

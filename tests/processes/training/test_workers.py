"""Units of work in several processes and on Ray: the results are the same, and failures and deaths are handled."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from launching import REPOSITORY
from training_fixtures import Inputs

from dmagent_loader.training.proxies.feedback import collect_feedback
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord

UNITS = '''
import os, time
from pathlib import Path
import torch

def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)

class Units:
    """Leaves a file for each unit that was started; `deed` is what some of them do."""

    def __init__(self, folder, deed):
        self.folder, self.deed = Path(folder), deed

    def work(self, number):
        first = not (self.folder / str(number)).exists()
        (self.folder / str(number)).touch()
        if number == 0 and self.deed == "fail":
            raise ValueError("unit 0 cannot be done")
        if number == 0 and self.deed == "die once" and first:
            os._exit(1)
        if number == 1 and self.deed == "wait for permission":
            wait_until((self.folder / "permission").exists)
        if self.deed == "meet":
            wait_until(lambda: len(list(self.folder.iterdir())) >= 2)
            return {"together": torch.tensor(len(list(self.folder.iterdir())))}
        if self.deed == "count":
            (self.folder / f"in {number}").touch()
            time.sleep(0.3)
            together = len(list(self.folder.glob("in *")))
            (self.folder / f"in {number}").unlink()
            return {"together": torch.tensor(together)}
        time.sleep(0.1)
        found = {"number": number, "process": os.getpid(), "threads": torch.get_num_threads()}
        return {name: torch.tensor(value) for name, value in found.items()}
'''


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


@pytest.fixture
def new_processes() -> Iterator[None]:
    """Joblib keeps idle processes for later calls; these would have the environment of an earlier test."""
    get_reusable_executor().shutdown(wait=True)
    yield
    get_reusable_executor().shutdown(wait=True)


def assert_same(record: FeedbackRecord, other: FeedbackRecord) -> None:
    assert np.allclose(record.feedback, other.feedback, rtol=0, atol=1e-6, equal_nan=True)
    assert np.allclose(record.losses, other.losses, rtol=0, atol=1e-6, equal_nan=True)
    assert record.settings == other.settings


def started(folder: Path) -> list[int]:
    """Numbers of the units that left a file."""
    return [int(file.name) for file in folder.iterdir() if file.is_file()]


def test_two_processes_collect_the_same_record_as_one(
    collected: FeedbackRecord, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And this process can make the record again from the files that they leave."""
    both = collect_feedback(*inputs, tmp_path, workers=Workers(count=2), progress=False)
    assert_same(both, collected)
    monkeypatch.setattr(ProxyTrainer, "train", lambda self, rows: pytest.fail("a finished unit was trained again"))
    assert_same(collect_feedback(*inputs, tmp_path, progress=False), both)


@pytest.mark.parametrize("chosen", [None, "1"])
def test_results_are_in_the_order_of_the_units_and_processes_share_the_cores(
    units: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_processes: None, chosen: str | None
) -> None:
    """Catches results in the order in which they end, one thread per core in each process, and a limit of the user that
    is ignored."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    results = Workers(count=2).run(units(tmp_path, "work"), [1] * 5, progress=False)
    assert [int(result["number"]) for result in results] == list(range(5))
    shared = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {int(result["threads"]) for result in results} == {shared if chosen is None else 1}
    assert os.getpid() not in {int(result["process"]) for result in results}


def test_a_result_comes_before_the_other_units_are_done(units: Any, tmp_path: Path) -> None:
    """A progress bar over hours needs it: unit 1 ends only after the result of unit 0 has arrived here."""
    results = Workers(count=2).results(units(tmp_path, "wait for permission"), 2)
    assert next(results)[0] == 0
    (tmp_path / "permission").touch()
    assert [number for number, _ in results] == [1]


def test_a_failure_is_raised_at_once(units: Any, tmp_path: Path) -> None:
    """Catches a pool that works off its whole queue, for hours perhaps, before it shows the error."""
    with pytest.raises(ValueError, match="unit 0 cannot be done"):
        Workers(count=2).run(units(tmp_path, "fail"), [1] * 60, progress=False)
    assert 0 in started(tmp_path)
    assert len(started(tmp_path)) < 30


def test_a_killed_process_is_an_error_and_the_next_call_does_the_rest(units: Any, tmp_path: Path) -> None:
    """Catches a wait without end for the result of a process that the system has killed."""
    before = time.monotonic()
    with pytest.raises(TerminatedWorkerError, match="EXIT"):
        Workers(count=2).run(units(tmp_path, "die once"), [1] * 60, progress=False)
    assert time.monotonic() - before < 30
    assert len(started(tmp_path)) < 30
    again = Workers(count=2).run(units(tmp_path, "die once"), [1] * 4, progress=False)
    assert [int(result["number"]) for result in again] == [0, 1, 2, 3]


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
def test_a_result_of_ray_comes_before_the_other_units_are_done(
    units: Any, two_ray_workers: Any, tmp_path: Path
) -> None:
    """Joblib's Ray backend returns nothing before the last unit."""
    results = Workers(count=2, backend="ray").results(units(tmp_path, "wait for permission"), 2)
    assert next(results)[0] == 0
    (tmp_path / "permission").touch()
    assert [number for number, _ in results] == [1]


@pytest.mark.slow
def test_ray_works_on_no_more_units_at_once_than_asked_for(units: Any, two_ray_workers: Any, tmp_path: Path) -> None:
    """Catches a number that only a Ray that is started here would keep to."""
    one = Workers(count=1, backend="ray").run(units(tmp_path, "count"), [1] * 4, progress=False)
    assert [int(result["together"]) for result in one] == [1, 1, 1, 1]
    (tmp_path / "again").mkdir()
    free = Workers(count=None, backend="ray").run(units(tmp_path / "again", "meet"), [1] * 2, progress=False)
    assert [int(result["together"]) for result in free] == [2, 2]


@pytest.mark.slow
def test_a_single_ray_worker_is_on_the_cluster(units: Any, two_ray_workers: Any, tmp_path: Path) -> None:
    """With joblib's Ray backend it is this process, which may have no GPU."""
    (result,) = Workers(count=1, backend="ray").run(units(tmp_path, "work"), [1], progress=False)
    assert int(result["process"]) != os.getpid()


@pytest.mark.slow
def test_a_failure_under_ray_is_raised_with_its_message(units: Any, two_ray_workers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unit 0 cannot be done"):
        Workers(count=2, backend="ray").run(units(tmp_path, "fail"), [1] * 60, progress=False)
    assert len(started(tmp_path)) < 30

"""Workers: settings that cannot work, missing packages, and a single worker."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dmagent_loader.errors import ConfigurationError, MissingExtraError
from dmagent_loader.training.proxies.workers import Workers


class Numbers:
    """Each unit returns its number, and the process and the threads that it ran with."""

    def work(self, number: int) -> dict[str, Tensor]:
        found = {"number": number, "process": os.getpid(), "threads": torch.get_num_threads()}
        return {name: torch.tensor(value) for name, value in found.items()}


def test_one_worker_is_this_process() -> None:
    results = Workers().run(Numbers(), [2, 1], progress=False)
    assert [int(result["number"]) for result in results] == [0, 1]
    assert {int(result["process"]) for result in results} == {os.getpid()}
    assert {int(result["threads"]) for result in results} == {torch.get_num_threads()}


@pytest.mark.parametrize(
    ("package", "extra", "settings"), [("joblib", "rl", {}), ("ray", "ray", {"count": None, "backend": "ray"})]
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs '{package}', .* pip install 'dmagent-loader\[{extra}\]'"):
        Workers(**settings).run(Numbers(), [1], progress=False)


def test_numbers_of_workers_that_cannot_work_are_refused() -> None:
    for wrong in ({"count": 0}, {"count": None}, {"count": -1, "backend": "ray"}):
        with pytest.raises(ConfigurationError, match="workers: give a number of at least 1"):
            Workers(**wrong)
    with pytest.raises(ConfigurationError, match="unknown backend 'slurm'"):
        Workers(backend="slurm")

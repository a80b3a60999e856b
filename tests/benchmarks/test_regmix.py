"""The figures of docs/baselines.md: as recorded, and as the tables of RegMix give them where these are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launching import REPOSITORY

from benchmarks.regmix import METHODS, RESULTS, correlations, printed, tables
from dmagent_loader.policies import rank_correlation


def test_the_page_shows_the_record() -> None:
    page = (REPOSITORY / "docs" / "baselines.md").read_text(encoding="utf-8")
    for table in printed(json.loads(RESULTS.read_text())).split("\n\n"):
        assert table in page


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("DMAGENT_DATA", "nowhere")) / "regmix"
    if not folder.is_dir():
        pytest.skip("DMAGENT_DATA does not name a folder with regmix/")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_fits_to_small_runs_rank_larger_ones_as_recorded(method: str, data: Path) -> None:
    train, tests = tables(data)
    recorded = json.loads(RESULTS.read_text())["all"][method]
    law = METHODS[method](train)
    for size, test in tests.items():
        assert correlations(law.predict(test.mixes), test) == pytest.approx(recorded[size], abs=0.005)


def test_runs_of_1m_rank_mixes_as_runs_of_60m_do(data: Path) -> None:
    """0.980 to 0.998 by domain: what any fit to small runs can reach."""
    _, tests = tables(data)
    assert (tests["1m"].mixes == tests["60m"].mixes).all()
    found = rank_correlation(tests["1m"].losses, tests["60m"].losses)
    assert (round(float(found.min()), 3), round(float(found.max()), 3)) == (0.980, 0.998)

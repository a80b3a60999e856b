"""Predicted cost of reading from a store."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader._loading.request_cost import StoreConditions, reading_cost
from dmagent_loader.errors import ConfigurationError

TEN_TB = np.array([10e12 / 4e3])


def test_ten_terabytes_row_by_row_and_in_blocks() -> None:
    """2.5e9 requests at 0.0004 dollars per 1,000 against 1.25e6; two or 32 of them at a time."""
    rows = reading_cost(TEN_TB, np.array([4e3]), StoreConditions(), bytes_per_request=0, in_flight=2)
    assert (rows.requests, rows.bytes) == (2_500_000_000, 10**13)
    assert rows.dollars == pytest.approx(1000)
    assert rows.rows_per_second == pytest.approx(2 / (0.03 + 4e3 / 100e6))
    blocks = reading_cost(TEN_TB, np.array([4e3]), StoreConditions(), bytes_per_request=8_000_000, in_flight=32)
    assert (blocks.requests, blocks.bytes) == (1_250_000, 10**13)
    assert blocks.dollars == pytest.approx(0.5)
    assert blocks.rows_per_second == pytest.approx(32 * 2000 / (0.03 + 0.08))


def test_domains_with_other_rows_and_bytes_that_leave_the_region() -> None:
    conditions = StoreConditions(latency_seconds=0.1, bytes_per_second=1e6, dollars_per_gb=0.09)
    cost = reading_cost(
        np.array([1000.0, 10.0, 0.0]), np.array([1e3, 2e6, 5e3]), conditions, bytes_per_request=100_000, in_flight=1
    )
    assert cost.requests == 10 + 10, "rows of 1 KB share a request, rows of 2 MB do not"
    assert cost.rows_per_second == pytest.approx(1010 / (10 * (0.1 + 0.1) + 10 * (0.1 + 2)))
    assert cost.dollars == pytest.approx(20 / 1000 * 0.0004 + 0.021 * 0.09)


def test_rows_without_data_are_read_all_the_same() -> None:
    for bytes_per_request in (0, 8 << 20):
        cost = reading_cost(
            np.array([40.0]), np.array([0.0]), StoreConditions(), bytes_per_request=bytes_per_request, in_flight=1
        )
        assert (cost.requests, cost.bytes) == (40 if not bytes_per_request else 1, 40)


@pytest.mark.parametrize(
    "setting", [{"latency_seconds": -1}, {"bytes_per_second": 0}, {"dollars_per_gb": float("nan")}]
)
def test_conditions_that_cannot_be_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        StoreConditions(**setting)

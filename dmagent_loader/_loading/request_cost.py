"""Requests, bytes, rate and price of reading remote shards, predicted from the plan and the sizes of the shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.simplex import FloatArray


@dataclass(frozen=True, kw_only=True)
class StoreConditions:
    """What a store costs, in time and money.

    Args:
        latency_seconds: Time until the first byte of an answer.
        bytes_per_second: Throughput of one connection.
        dollars_per_1000_requests: Price of GET requests. The default is that of S3 Standard in us-east-1
            (https://aws.amazon.com/s3/pricing, 2025).
        dollars_per_gb: Price of bytes that leave the store's region; 0 inside it.
    """

    latency_seconds: float = 0.03
    bytes_per_second: float = 100e6
    dollars_per_1000_requests: float = 0.0004
    dollars_per_gb: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (
            ("latency_seconds", 0.0),
            ("bytes_per_second", 1.0),
            ("dollars_per_1000_requests", 0.0),
            ("dollars_per_gb", 0.0),
        ):
            if not least <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {least:g}")


@dataclass(frozen=True, kw_only=True)
class ReadingCost:
    """The cost of reading a number of rows.

    Attributes:
        requests: Number of requests.
        bytes: Bytes of the rows.
        rows_per_second: Rate of one reading process, if the store is the bottleneck.
        dollars: Price of requests and bytes.
    """

    requests: int
    bytes: int
    rows_per_second: float
    dollars: float


def reading_cost(
    rows: FloatArray,
    row_bytes: FloatArray,
    conditions: StoreConditions,
    *,
    bytes_per_request: FloatArray | float,
    in_flight: int,
) -> ReadingCost:
    """Predicts the cost of reading rows.

    Args:
        rows: (D,) rows of each domain that are read, at least one in all.
        row_bytes: (D,) mean bytes of a row.
        conditions: Latency, throughput and prices.
        bytes_per_request: Bytes that the reader fetches at a time, or (D,) of them, one number for each domain; 0: each
            row by a request of its own.
        in_flight: Largest number of requests of one reading process at a time.
    """
    row_bytes = np.maximum(row_bytes, 1.0)  # a row without a byte of data is read all the same
    request_bytes = np.maximum(row_bytes, bytes_per_request)
    requests = np.ceil(np.round(rows * row_bytes / request_bytes, 6))
    seconds = (requests * (conditions.latency_seconds + request_bytes / conditions.bytes_per_second)).sum()
    total = float((rows * row_bytes).sum())
    price = requests.sum() / 1e3 * conditions.dollars_per_1000_requests + total / 1e9 * conditions.dollars_per_gb
    return ReadingCost(
        requests=int(requests.sum()),
        bytes=int(total),
        rows_per_second=float(rows.sum() / seconds * min(in_flight, requests.sum())) if seconds else float("inf"),
        dollars=float(price),
    )

"""``dmagent simulate --storage``: requests, bytes, rate and price of a run on remote shards."""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from dmagent_loader._loading.request_cost import StoreConditions, reading_cost
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources.blocks import BLOCK_BYTES, REQUEST_BYTES
from dmagent_loader.shards.sources.fetching import FETCHED_BYTES, FETCHES


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--storage`` and what it takes for granted."""
    usual = StoreConditions()
    group = parser.add_argument_group("object stores")
    group.add_argument(
        "--storage", action="store_true", help="also print requests, bytes, rate and price of reading remote shards"
    )
    group.add_argument(
        "--readers", type=int, default=1, metavar="N", help="reading processes: ranks x workers (default: %(default)s)"
    )
    group.add_argument(
        "--latency",
        type=float,
        default=usual.latency_seconds,
        metavar="SECONDS",
        help="time until the first byte of an answer (default: %(default)s)",
    )
    group.add_argument(
        "--bandwidth",
        type=float,
        default=usual.bytes_per_second,
        metavar="BYTES",
        help="bytes per second of a connection (default: %(default).0f)",
    )
    group.add_argument(
        "--request-price",
        type=float,
        default=usual.dollars_per_1000_requests,
        metavar="DOLLARS",
        help="price of 1,000 GET requests (default: %(default)s, S3 Standard in us-east-1)",
    )
    group.add_argument(
        "--byte-price",
        type=float,
        default=usual.dollars_per_gb,
        metavar="DOLLARS",
        help="price of a GB that leaves the region (default: 0, as inside the region)",
    )


def storage_lines(
    args: argparse.Namespace, collection: ShardCollection, shuffle: Shuffle, counts: NDArray[np.int64]
) -> list[str]:
    """The prediction, as lines.

    Args:
        args: Arguments of `add_storage_arguments`.
        collection: The shards.
        shuffle: Settings of the shuffle.
        counts: (D,) samples of each domain.
    """
    if args.readers < 1:
        raise ConfigurationError(f"--readers is {args.readers}; it must be at least 1")
    conditions = StoreConditions(
        latency_seconds=args.latency,
        bytes_per_second=args.bandwidth,
        dollars_per_1000_requests=args.request_price,
        dollars_per_gb=args.byte_price,
    )
    summaries = collection.summaries()
    by_domain = [[summary for summary in summaries if summary.domain == name] for name in collection.domains]
    payload = np.array([sum(summary.payload_bytes for summary in shards) for shards in by_domain])
    shard_bytes = payload / [len(shards) for shards in by_domain]
    row_bytes = payload / collection.num_rows
    of_tile = row_bytes * shuffle.window / shuffle.lanes  # a request brings the rows of a tile that lie in one shard
    bytes_per_request = np.minimum(np.clip(of_tile, BLOCK_BYTES, REQUEST_BYTES), shard_bytes)
    in_flight = min(FETCHES, int(FETCHED_BYTES / max(1.0, bytes_per_request.max())))
    cost = reading_cost(
        np.asarray(counts, np.float64),
        row_bytes,
        conditions,
        bytes_per_request=bytes_per_request,
        in_flight=in_flight,
    )
    stored = sum(summary.file_bytes for summary in summaries)
    return [
        f"reading: {cost.requests:,} requests of up to {REQUEST_BYTES >> 20} MiB, {cost.bytes / 1e9:,.2f} GB, "
        f"{cost.dollars:,.2f} dollars",
        f"rate: at most {cost.rows_per_second * args.readers:,.0f} rows/s from the store by {args.readers} reading "
        f"process(es) with up to {in_flight} requests at a time each",
        f"first start: shards whose index is not known yet are read through once, {stored / 1e9:,.2f} GB if it is none",
    ]

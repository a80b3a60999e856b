"""Readers of remote shards that benchmarks/remote.py compares, each in a process of its own.

    python benchmarks/remote_readers.py READER ADDRESS FOLDER KIND ROWS [--cache DIR] [--change N] [--batch N]
        [--connections N]

Prints one line of JSON: rows, seconds from the first request for a row to the last row, seconds until the first row,
and seconds of CPU. Opening is not counted. Every reader reads the same domains in equal shares, without a shuffle
buffer, and decodes the rows.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MEMBER = {"packed": "input_ids.npy", "text": "txt"}


def tars(args: argparse.Namespace) -> dict[str, list[str]]:
    """Domain -> URLs of its shards."""
    root = args.folder / args.kind / "tar"
    return {
        domain.name: [f"{args.address}/{args.kind}/tar/{domain.name}/{path.name}" for path in sorted(domain.iterdir())]
        for domain in sorted(root.iterdir())
    }


def dmagent(args: argparse.Namespace) -> Iterator[Any]:
    """Ours; with ``--change``, under a new random mix every so many samples; with ``--batch``, batches of so many."""
    import numpy as np

    from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
    from dmagent_loader.shards.sources import fetching
    from dmagent_loader.transforms import collate_packed

    fetching.FETCHES = args.connections
    shards = {f"source/{name}": urls for name, urls in tars(args).items()}
    sampler = AgentWeightedSampler(
        shards,
        samples_per_reweight=10**12,
        exhausted="repeat",
        initial_mix=dict.fromkeys(shards, 1 / len(shards)),
        reading=ReadingConfig(progress=False, cache_dir=args.folder / "index", block_cache_dir=args.cache),
    )
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Any]:
        for batch in MixingDataLoader(sampler, batch_size=args.batch, collate_fn=collate_packed):
            yield from range(len(batch["input_ids"]))

    def samples() -> Iterator[Any]:
        for number, sample in enumerate(sampler):
            if args.change and number % args.change == 0:
                weights = rng.dirichlet(np.ones(len(shards)))
                sampler.set_mix(dict(zip(shards, weights / weights.sum(), strict=True)))
            yield sample

    return batches() if args.batch else samples()


def wds(args: argparse.Namespace) -> Iterator[Any]:
    """webdataset, which reads a URL through a pipe from curl."""
    import webdataset

    sources = [webdataset.WebDataset(urls, shardshuffle=False).decode() for urls in tars(args).values()]
    return iter(webdataset.RandomMix(sources, longest=True))


def mds(args: argparse.Namespace) -> Iterator[Any]:
    """mosaicml-streaming, with a downloader for HTTP, which it does not have."""
    import streaming
    from streaming.base.storage import download

    class Http(download.CloudDownloader):
        @staticmethod
        def prefix() -> str:
            return "http"

        @staticmethod
        def client_name() -> str:
            return "http"

        def _client_identifier(self) -> str:
            return "http"

        def clean_up(self) -> None: ...

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            get_file(remote, local)

    download.DOWNLOADER_MAPPINGS["http"] = Http
    streaming.base.util.clean_stale_shared_memory()
    streams = [
        streaming.Stream(remote=f"{args.address}/{args.kind}/mds/{name}", local=str(args.cache / name), proportion=0.25)
        for name in tars(args)
    ]
    return iter(streaming.StreamingDataset(streams=streams, epoch_size=args.rows, batch_size=32, shuffle=True))


def lit(args: argparse.Namespace) -> Iterator[Any]:
    """LitData, with a downloader for HTTP, which it does not have."""
    import litdata
    from litdata.streaming import downloader
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.resolver import Dir

    class Http(downloader.Downloader):
        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            if not os.path.exists(local_filepath):
                get_file(remote_filepath, local_filepath)

    downloader.register_downloader("http://", Http)
    parts = [
        litdata.StreamingDataset(
            Dir(path=str(args.cache / name), url=f"{args.address}/{args.kind}/lit/{name}"),
            shuffle=False,
            item_loader=TokensLoader(2048) if args.kind == "packed" else None,
        )
        for name in tars(args)
    ]
    return iter(litdata.CombinedStreamingDataset(parts, weights=[0.25] * len(parts), iterate_over_all=False))


def limit(args: argparse.Namespace) -> Iterator[Any]:
    """The same shards whole, in sequence, on as many connections as ours; an item is a row, by their number."""
    urls = [url for group in zip(*tars(args).values(), strict=True) for url in group]
    rows = json.loads((args.folder / args.kind / "meta.json").read_text())["rows_per_shard"]

    def get(urls: list[str]) -> None:
        connection = http.client.HTTPConnection(urlsplit(args.address).netloc)
        buffer = bytearray(1 << 20)
        for url in urls:
            connection.request("GET", urlsplit(url).path)
            response = connection.getresponse()
            while response.readinto(buffer):
                pass

    def items() -> Iterator[Any]:
        wanted = urls[: -(-args.rows // rows)]
        with ThreadPoolExecutor(args.connections) as pool:
            list(pool.map(get, [wanted[n :: args.connections] for n in range(args.connections)]))
        yield from range(args.rows)

    return items()


def get_file(url: str, path: str) -> None:
    """Downloads a file as the downloaders of the peers do: to its place, in one request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", urlsplit(url).path)
    response = connection.getresponse()
    if response.status != 200:
        raise FileNotFoundError(url)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.{os.getpid()}", "wb") as file:
        while part := response.read(1 << 20):
            file.write(part)
    os.replace(f"{path}.{os.getpid()}", path)


READERS: dict[str, Callable[[argparse.Namespace], Iterator[Any]]] = {
    "limit": limit,
    "dmagent": dmagent,
    "wds": wds,
    "mds": mds,
    "lit": lit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=MEMBER)
    parser.add_argument("rows", type=int)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--change", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--connections", type=int, default=32, help="of the limit, and most of ours")
    args = parser.parse_args()
    items = READERS[args.reader](args)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    next(items)
    first = time.perf_counter() - started
    taken = 1 + sum(1 for _ in itertools.islice(items, args.rows - 1))
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"rows": taken, "seconds": seconds, "first": first, "cpu": cpu}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

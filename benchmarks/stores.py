"""Clients of object stores: s3fs, which fsspec uses, against obstore, on servers on loopback.

    python benchmarks/stores.py [--server moto|files] [--repeats N]

Two servers: ``moto``, which answers as S3 does, signatures and all, and is slow; and ``files``, an aiohttp server that
sends files by ``sendfile`` under the paths of S3 and does not check signatures, so that the client is the bottleneck.
Each measurement has a process of its own, whose CPU time is that of the client alone; the repeats of the clients are
interleaved. Needs s3fs, obstore and, for ``moto``, moto's server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "stores.json"
BUCKET, KEY = "corpus", "shard-000.tar"
OBJECT_BYTES = 64 << 20
CLIENTS = ("s3fs", "obstore")
SIZES = {"4 KB": (4 << 10, 512), "1 MB": (1 << 20, 128), "16 MB": (16 << 20, 64), "whole, 64 MB": (0, 16)}
"""Size of a request in bytes (0: the whole object, without a range), and number of requests."""
IN_FLIGHT = (1, 8, 64)
MOTO_REQUESTS = 8
"""For the slow server, which copies the whole object for each range, an eighth of the requests."""


def main() -> None:
    """Measures all combinations, and prints and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=["moto", "files"], action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        _serve_files(args.serve)
    elif args.measure:
        client, size, requests, in_flight = args.measure
        print(json.dumps(measure(client, int(size), int(requests), int(in_flight))), flush=True)
        os._exit(0)  # obstore sometimes aborts when Python ends while its threads run
    else:
        rows = [row for server in args.server or ("files", "moto") for row in compare(server, args.repeats)]
        args.output.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(table(rows))


def compare(server: str, repeats: int) -> list[dict[str, Any]]:
    """One row per client, size and number in flight: medians of the repeats."""
    rows = []
    with serving(server) as url:
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, (size, count) in SIZES.items():
            requests = count if server == "files" else count // MOTO_REQUESTS
            for in_flight in IN_FLIGHT:
                found: dict[str, list[dict[str, float]]] = {client: [] for client in CLIENTS}
                for _ in range(repeats):
                    for client in CLIENTS:
                        command = [sys.executable, __file__, "--measure", client, size, requests, in_flight]
                        output = subprocess.run(
                            [str(part) for part in command], env=environment, check=True, stdout=subprocess.PIPE
                        )
                        found[client].append(json.loads(output.stdout))
                for client, measured in found.items():
                    medians = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
                    rows.append({"server": server, "client": client, "size": name, "in_flight": in_flight, **medians})
                    print(rows[-1], file=sys.stderr, flush=True)
    return rows


def measure(client: str, size: int, requests: int, in_flight: int) -> dict[str, float]:
    """CPU and wall time of this process for so many requests.

    Args:
        client: One of `CLIENTS`.
        size: Bytes of a request; 0: the whole object.
        requests: Number of requests.
        in_flight: Requests at a time.
    """
    run, fetch = _s3fs() if client == "s3fs" else _obstore()

    async def fetch_all(count: int) -> int:
        free = asyncio.Semaphore(in_flight)

        async def one(number: int) -> int:
            async with free:
                offset = number * size % OBJECT_BYTES
                return len(await fetch(offset, size))

        return sum(await asyncio.gather(*(one(number) for number in range(count))))

    run(fetch_all(min(4, requests)))  # imports, credentials and connections
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    received = run(fetch_all(requests))
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    assert received == requests * (size or OBJECT_BYTES)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    megabytes = received / 1e6
    return {
        "cpu_ms_per_mb": 1e3 * cpu / megabytes,
        "cpu_ms_per_request": 1e3 * cpu / requests,
        "mb_per_s": megabytes / wall,
    }


_Run = Callable[[Coroutine[Any, Any, int]], int]
_Fetch = Callable[[int, int], Coroutine[Any, Any, Any]]


def _s3fs() -> tuple[_Run, _Fetch]:
    import fsspec

    filesystem = fsspec.filesystem("s3", config_kwargs={"max_pool_connections": max(IN_FLIGHT)})

    async def fetch(offset: int, size: int) -> Any:
        if not size:
            return await filesystem._cat_file(f"{BUCKET}/{KEY}")
        return await filesystem._cat_file(f"{BUCKET}/{KEY}", start=offset, end=offset + size)

    return lambda work: int(fsspec.asyn.sync(filesystem.loop, lambda: work)), fetch


def _obstore() -> tuple[_Run, _Fetch]:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], region="us-east-1", client_options={"allow_http": True}
    )

    async def fetch(offset: int, size: int) -> Any:
        if not size:
            return await (await obstore.get_async(store, KEY)).bytes_async()
        return await obstore.get_range_async(store, KEY, start=offset, length=size)

    return asyncio.run, fetch


@contextlib.contextmanager
def serving(server: str) -> Iterator[str]:
    """The URL of a server with the object, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        data = os.urandom(1 << 20) * (OBJECT_BYTES >> 20)
        path = Path(folder, BUCKET, KEY)
        path.parent.mkdir()
        path.write_bytes(data)
        command = (
            [sys.executable, __file__, "--serve", folder]
            if server == "files"
            else [sys.executable, "-c", "from moto.server import main; main(['-H', '127.0.0.1', '-p', '5055'])"]
        )
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip() if server == "files" else "http://127.0.0.1:5055"
            if server == "moto":
                _wait_for(url)
                for name, body in ((BUCKET, b""), (f"{BUCKET}/{KEY}", data)):
                    headers = {
                        "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request",
                        "Content-Type": "application/octet-stream",
                    }
                    request = urllib.request.Request(f"{url}/{name}", body, headers, method="PUT")
                    urllib.request.urlopen(request).close()
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait_for(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url).close()
            return
        time.sleep(0.2)
    raise TimeoutError(f"no server at {url}")


def _serve_files(folder: str) -> None:
    from aiohttp import web

    async def run() -> None:
        application = web.Application()
        application.router.add_static("/", folder)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        print(f"http://{host}:{port}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("s3fs", "aiobotocore", "obstore", "moto")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, one line for each size and number in flight, with both clients beside each other."""
    lines = [
        "| server | request | in flight | s3fs: CPU ms/MB | obstore: CPU ms/MB | s3fs: MB/s | obstore: MB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(row["server"], row["size"], row["in_flight"], row["client"]): row for row in rows}
    for server, size, in_flight in dict.fromkeys(key[:3] for key in found):
        pair = [found[server, size, in_flight, client] for client in CLIENTS]
        cells = [f"{row['cpu_ms_per_mb']:.2f}" for row in pair] + [f"{row['mb_per_s']:.0f}" for row in pair]
        lines.append(f"| {server} | {size} | {in_flight} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

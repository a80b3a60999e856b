"""Remote shards: cold and warm rows per second, requests and bytes, against the limit of the network and peers.

    python benchmarks/remote.py [--streaming-path DIR] [--lit-path DIR]
    python benchmarks/remote.py --kinds packed --readers limit "dmagent, batches" --connections 2

A server in a process of its own answers after 30 ms and sends 100 MB/s on each connection (benchmarks/far_server.py).
Readers run one after the other, in rounds of random order, each in a process of its own and with an empty cache (warm:
with the cache of the cold run before). The folders hold mosaicml-streaming and litdata, with what they need.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import far_server
import measuring
import numpy as np
from measuring import Aim, aims_table, median, median_ratio, table

from dmagent_loader.shards.writing.packing import encode_npy
from dmagent_loader.shards.writing.tar_writer import TarWriter

DOMAINS = 4
SHARD_BYTES = 16 << 20
STORED = {"packed": 5120, "text": 2048}
"""Bytes of a row in a tar: rows of 4 KB (2,048 tokens of uint16), and texts of 1.5 KB."""
TITLES = {
    "limit": "limit: whole shards in sequence",
    "dmagent": "dmagent_loader, cold",
    "dmagent, batches": "dmagent_loader, cold, batches of 32",
    "dmagent, new mix every 500": "dmagent_loader, cold, new mix every 500",
    "dmagent, warm": "dmagent_loader, warm",
    "dmagent, batches, warm": "dmagent_loader, warm, batches of 32",
    "wds": "webdataset",
    "mds": "mosaicml-streaming",
    "lit": "litdata",
}


def make(folder: Path, kind: str, megabytes: int) -> dict[str, Any]:
    """Writes the shards, once."""
    shards = max(1, (megabytes << 20) // DOMAINS // SHARD_BYTES)
    meta = {"rows_per_shard": SHARD_BYTES // STORED[kind], "shards": shards, "rows": 0}
    meta["rows"] = meta["rows_per_shard"] * shards * DOMAINS
    done = folder / kind / "meta.json"
    if done.exists() and json.loads(done.read_text()) == meta:
        return meta
    shutil.rmtree(folder / kind, ignore_errors=True)
    shutil.rmtree(folder / "index", ignore_errors=True)
    rng = np.random.default_rng(0)
    pool = rng.integers(97, 123, 1 << 22, dtype=np.uint8).tobytes()
    tokens = rng.integers(0, 1 << 14, 1 << 22, dtype=np.uint16)
    for domain in range(DOMAINS):
        target = folder / kind / "tar" / f"d{domain}"
        target.mkdir(parents=True)
        for shard in range(shards):
            writer = TarWriter(target / f"d{domain}-{shard:04d}.tar")
            for row in range(meta["rows_per_shard"]):
                begin = int(rng.integers(0, 4_000_000))
                if kind == "packed":
                    writer.add(f"{row:07d}", {"input_ids.npy": encode_npy(tokens[begin : begin + 2048])})
                else:
                    writer.add(f"{row:07d}", {"txt": pool[begin : begin + 1500]})
            writer.close()
    done.write_text(json.dumps(meta))
    return meta


def convert(folder: Path, kind: str, peer: str, path: Path) -> None:
    """Writes a peer's own format from the shards, once."""
    target = folder / kind / peer
    if (target / ".done").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    program = Path(__file__).with_name("remote_convert.py")
    subprocess.run([sys.executable, program, peer, str(folder / kind)], env=environment(path), check=True)
    (target / ".done").touch()


def environment(path: Path | None) -> dict[str, str]:
    """Environment of a reader; `path` holds packages that are not installed here."""
    stand_ins = Path(__file__).parent / "stand_ins"
    extra = {"PYTHONPATH": f"{path}{os.pathsep}{stand_ins}"} if path is not None else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def measure(args: argparse.Namespace, kind: str, scratch: Path) -> dict[str, Any]:
    """Rows/s of every reader in every round, and what the server counted."""
    folder = args.bench_data.absolute()
    meta = make(folder, kind, args.megabytes)
    peers = {name: path for name, path in (("mds", args.streaming_path), ("lit", args.lit_path)) if path is not None}
    for name, path in peers.items():
        convert(folder, kind, name, path)
    rows = min(args.rows, meta["rows"] * 3 // 4)
    absent = ({"mds", "lit"} - set(peers)) | (set(TITLES) - set(args.readers))
    if kind == "text":  # batches are of packed rows
        absent |= {name for name in TITLES if "batches" in name}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TITLES if name not in absent}
    order = np.random.default_rng(0)
    with far_server.serving(folder) as address:

        def run(name: str, rows: int, cache: Path, *options: str) -> dict[str, float] | None:
            far_server.counts(address, reset=True)
            reader = name.partition(",")[0]
            command = [sys.executable, str(Path(__file__).with_name("remote_readers.py")), reader, address]
            command += [str(folder), kind, str(rows), "--cache", str(cache), "--connections", str(args.connections)]
            command += options
            done = subprocess.run(
                command, env=environment(peers.get(reader)), stdout=subprocess.PIPE, text=True, check=False, timeout=900
            )
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                measuring.say(f"{kind} {name}: failed, so it is left out")
                return None
            counts = far_server.counts(address)
            requests = sum(count for kind, count in counts["requests"].items() if kind.startswith("GET "))
            return {**json.loads(lines[-1]), "requests": requests, "bytes": sum(counts["bytes"].values())}

        def add(name: str, cache: Path, *options: str) -> None:
            if one := run(name, rows, cache, *options):
                found[name].append(one)
                measuring.say(f"{kind} {name}: {one['rows'] / one['seconds']:,.0f} rows/s")

        run("dmagent", 1, scratch / "first")  # indexes the shards under their new address
        for turn in range(args.repeats):
            names = [name for name in found if not name.endswith("warm")]
            order.shuffle(names)
            for name in names:
                cache = scratch / f"{turn}-{name}"
                options = ("--change", "500") if "every" in name else ("--batch", "32") if "batches" in name else ()
                add(name, cache, *options)
                if f"{name}, warm" in found:
                    add(f"{name}, warm", cache, *options)
                shutil.rmtree(cache, ignore_errors=True)
    return {
        "rows": rows,
        "stored": STORED[kind],
        "readers": {name: runs for name, runs in found.items() if len(runs) == args.repeats},
    }


def rates(found: dict[str, Any], name: str) -> list[float]:
    """Rows per second of each round."""
    return [run["rows"] / run["seconds"] for run in found["readers"].get(name, [])]


def section(results: dict[str, Any]) -> str:
    """The section of the page."""
    parts = ["## Remote shards\n"]
    for kind, found in results.items():
        lines = []
        for name, runs in found["readers"].items():
            of_rows = [run["bytes"] / (run["rows"] * found["stored"]) for run in runs]
            lines.append(
                (
                    TITLES[name],
                    median(rates(found, name)),
                    median_ratio(rates(found, name), rates(found, "limit")),
                    median(1000 * run["requests"] / run["rows"] for run in runs),
                    median(of_rows),
                    median(1e6 * run["cpu"] / run["rows"] for run in runs),
                    median(run["first"] for run in runs),
                )
            )
        header = (
            "reader",
            "rows/s",
            "/ limit",
            "requests / 1,000 rows",
            "fetched / used",
            "CPU us / row",
            "first row, s",
        )
        parts.append(f"Rows of kind `{kind}`, {found['rows']:,} rows:\n\n{table(header, lines)}\n")
    parts.append(aims_table(aims(results)))
    return "\n".join(parts)


def aims(results: dict[str, Any]) -> list[Aim]:
    """Aims of remote reading."""
    found = []
    for kind, of_kind in results.items():
        ours = rates(of_kind, "dmagent")
        for name, bound in (("limit", 0.8), ("wds", 2.0), ("mds", 1.0), ("lit", 1.0)):
            if ours and (theirs := rates(of_kind, name)):
                ratio = median_ratio(ours, theirs)
                found.append(Aim(f"{kind}, cold: >= {bound:g} x {TITLES[name]}", f"{ratio:.2f}", ratio >= bound))
    packed = results.get("packed")
    for name in ("dmagent", "dmagent, new mix every 500") if packed else ():
        runs = packed["readers"].get(name)
        if not runs:
            continue
        requests = median(1000 * run["requests"] / run["rows"] for run in runs)
        share = median(run["bytes"] / (run["rows"] * packed["stored"]) for run in runs)
        found.append(Aim(f"{TITLES[name]}: requests per 1,000 rows of 4 KB <= 1", f"{requests:.2f}", requests <= 1))
        found.append(Aim(f"{TITLES[name]}: bytes fetched over used <= 1.2", f"{share:.2f}", share <= 1.2))
    return found


def main() -> None:
    parser = measuring.parser(__doc__, "remote", repeats=5)
    parser.add_argument("--bench-data", type=Path, default=Path("build/remote_data"), help="(default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=2048, help="of shards of each kind (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=300_000, help="that each reader reads (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=STORED, default=list(STORED))
    parser.add_argument("--readers", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument(
        "--connections", type=int, default=32, help="of the limit, and most of this package (default: %(default)s)"
    )
    parser.add_argument("--streaming-path", type=Path, help="folder of packages with mosaicml-streaming")
    parser.add_argument("--lit-path", type=Path, help="folder of packages with litdata")
    args = parser.parse_args()
    if "limit" not in args.readers:
        parser.error("--readers lacks 'limit', with which all others are compared: add it")
    if args.quick:
        args.repeats, args.megabytes, args.rows = 1, 256, 20_000
    with tempfile.TemporaryDirectory() as scratch:
        results = {kind: measure(args, kind, Path(scratch)) for kind in args.kinds}
    print(section(results))
    measuring.save(args, results)


if __name__ == "__main__":
    main()

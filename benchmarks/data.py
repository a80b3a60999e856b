"""Makes the data of the benchmarks: shards of 52 domains, as text and as packed tokens, and the peers' own formats.

    python benchmarks/data.py --data ../shared/data

DATA holds ``source/TOPIC.jsonl.gz`` for the 26 topics and ``target*/*.jsonl.gz``, with a column ``text``. Without it
the documentation and code of this Python installation are used. The target documents (and without DATA all documents)
are dealt over the 26 topics. Rows are repeated under other keys until each kind has the wanted size. Made once: a
second call finds everything there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loaders import BENCH, LOADERS, MAIN, STREAMING
from prepared import MEMBER, ROW_TOKENS, Prepared, decode, digest
from tokenizers import ByteLevelBPETokenizer

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.python_corpus import build_python_corpus
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord, manifest_text
from dmagent_loader.shards.writing.tar_writer import TarWriter

FOLDER = Path("build/bench_data")
KINDS = ("packed", "text")
SHARDS_PER_DOMAIN = (2, 4)
"""At least two, because a loader that deals shards to its workers needs one for each."""

SHARD_BYTES = 16 << 20
VOCABULARY = 16_384
TOKENIZER_ONE_IN = 16
"""Documents on which the tokenizer is trained."""

END_OF_TEXT = "<|endoftext|>"
VERSION = 2


def options(parser: argparse.ArgumentParser) -> None:
    """What this program and throughput.py share."""
    text = os.environ.get("DMAGENT_DATA")
    parser.add_argument("--data", type=Path, default=text, help="folder of text (default: $DMAGENT_DATA)")
    parser.add_argument("--bench-data", type=Path, default=FOLDER, help="where it is made (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of shards of each kind (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, help="of text to begin with (default: all)")
    parser.add_argument("--bench-python", type=Path, default=Path(".venv-bench/bin/python"))
    parser.add_argument("--streaming-python", type=Path, default=Path(".venv-streaming/bin/python"))
    parser.add_argument("--prefix", default="", help="words before the command of each process, such as 'nice'")


def pythons(args: argparse.Namespace) -> dict[str, Path]:
    """Environment -> its interpreter, for those that are there."""
    known = {MAIN: Path(sys.executable), BENCH: args.bench_python, STREAMING: args.streaming_python}
    # Not resolved: an environment's interpreter is a link, and where the link lies says which environment it is.
    return {name: Path(os.path.abspath(path)) for name, path in known.items() if path.exists()}


def run(python: Path, words: list[str], prefix: list[str]) -> dict[str, Any]:
    """Runs benchmarks/loading.py and returns what it prints.

    Raises:
        SystemExit: It failed; its last words are shown.
    """
    program = Path(__file__).parent / "loading.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONWARNINGS": "ignore", "LITDATA_DISABLE_VERSION_CHECK": "1"}
    command = [*prefix, str(python), str(program), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def documents(folder: Path | None) -> dict[str, list[str]]:
    """Domain -> its documents, each document once."""
    if folder is None:
        corpus = build_python_corpus(DemoConfig(source_chars=40_000_000, target_chars=40_000_000))
        pools = {field: _pool(corpus.documents[n] for n in corpus.domains_of(field)) for field in ("source", "target")}
        return _dealt("source", pools["source"]) | _dealt("target", pools["target"])
    found = {f"source/{path.name.split('.')[0]}": list(_texts(path)) for path in sorted(folder.glob("source/*.jsonl*"))}
    missing = sorted(set(CANONICAL_TOPICS) - {name.split("/")[1] for name in found})
    targets = sorted(folder.glob("target*/*.jsonl*"))
    if missing or not targets:
        raise SystemExit(f"{folder} lacks source files of {missing}, or target*/*.jsonl.gz ({len(targets)} found)")
    return found | _dealt("target", _pool(_texts(path) for path in targets))


def _texts(path: Path) -> Iterator[str]:
    with path.open("rb") as stored:
        lines = gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored
        for line in lines:
            yield json.loads(line)["text"]


def _pool(sources: Any) -> list[str]:
    return list(dict.fromkeys(text for texts in sources for text in texts))


def _dealt(field: str, pool: list[str]) -> dict[str, list[str]]:
    return {f"{field}/{topic}": pool[i :: len(CANONICAL_TOPICS)] for i, topic in enumerate(CANONICAL_TOPICS)}


def write_corpus(args: argparse.Namespace, folder: Path, *, tokenizer: bool) -> dict[str, list[str]]:
    """JSON lines for each domain, and on demand a tokenizer trained on them; domain -> file."""
    files: dict[str, list[str]] = {}
    sample: list[str] = []
    for name, texts in documents(args.data).items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        limit = args.megabytes * 1e6 / (2 * len(CANONICAL_TOPICS)) if args.megabytes else float("inf")
        written = 0
        with path.open("w", encoding="utf-8") as file:
            for text in texts:
                if written >= limit:
                    break
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
        files[name] = [str(path)]
        sample += texts[::TOKENIZER_ONE_IN]
    if tokenizer:
        train_tokenizer(sample, folder / "tokenizer.json")
    return files


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A byte-level BPE tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    tokenizer.save(str(path))


def repeated(base: Path, record: DomainRecord, output: Path, name: str, times: int, kind: str) -> DomainRecord:
    """Writes a domain's rows again and again under new keys, in two to four shards."""
    least, most = SHARDS_PER_DOMAIN
    rows = record.rows * times
    count = min(most, max(least, -(-record.bytes * times // SHARD_BYTES)))
    folder = output / name
    folder.mkdir(parents=True)
    contents = rows_of([base / shard.path for shard in record.shards] * times)
    shards = []
    for number in range(count):
        writer = TarWriter(folder / f"{folder.name}-{number:06d}.tar")
        for row in range(rows * number // count, rows * (number + 1) // count):
            writer.add(f"{row:09d}", {MEMBER[kind]: next(contents)})
        written = writer.close()
        shards.append(dataclasses.replace(written, path=f"{name}/{written.path}"))
    return dataclasses.replace(record, rows=rows, shards=tuple(shards), tokens=record.tokens and record.tokens * times)


def rows_of(shards: list[Path]) -> Iterator[bytes]:
    """The only member of each row of some shards."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                yield file.read()


def survey(folder: Path, kind: str, records: dict[str, DomainRecord]) -> dict[str, Any]:
    """Writes where each row lies and what each contains; returns rows, bytes and weight of each domain."""
    places, first, shard_number = [], [0], 0
    digests: dict[bytes, int] = {}
    entries: dict[str, Any] = {}
    shares = weights(np.array([record.rows for record in records.values()]))
    for number, (name, record) in enumerate(records.items()):
        size = 0
        for shard in record.shards:
            with tarfile.open(folder / "shards" / shard.path) as tar:
                for info in tar:
                    places.append((shard_number, info.offset_data, info.size))
                    size += info.size
                    file = tar.extractfile(info)
                    assert file is not None
                    mark = digest(decode(kind, file.read()))
                    if digests.setdefault(mark, number) != number:
                        raise SystemExit(f"a row of {name} is also in another domain: it could not tell them apart")
            shard_number += 1
        first.append(len(places))
        paths = [shard.path for shard in record.shards]
        entries[name] = {
            "rows": record.rows,
            "row_bytes": size / record.rows,
            "weight": shares[number],
            "shards": paths,
        }
    np.savez(folder / "rows.npz", places=np.array(places), first=np.array(first))
    marks = np.frombuffer(b"".join(digests), "V8")
    np.savez(folder / "contents.npz", digests=marks, domains=np.array(list(digests.values())))
    return entries


def weights(rows: np.ndarray) -> list[float]:
    """An unequal mix that is not the natural one: the root of the rows, times a random factor. (D,), sums to 1."""
    factors = np.random.default_rng(0).lognormal(0.0, 0.5, len(rows))
    mix = np.sqrt(rows) * factors
    return (mix / mix.sum()).tolist()


def make_shards(args: argparse.Namespace) -> None:
    """Both kinds of shards, each if it is not there yet with the same settings."""
    settings = [VERSION, str(args.data and args.data.name), args.gigabytes, args.megabytes, ROW_TOKENS, VOCABULARY]
    stamp = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder: Path = args.bench_data
    wanted = [k for k in KINDS if not ((folder / k / "meta.json").exists() and Prepared(folder / k).stamp == stamp)]
    if not wanted:
        return
    with tempfile.TemporaryDirectory(dir=made(folder)) as scratch:
        print("collecting documents", flush=True)
        files = write_corpus(args, Path(scratch) / "corpus", tokenizer="packed" in wanted)
        for kind in wanted:
            print(f"writing shards of {kind} rows", flush=True)
            make_kind(args, files, Path(scratch), kind, stamp)


def make_kind(args: argparse.Namespace, files: dict[str, list[str]], scratch: Path, kind: str, stamp: str) -> None:
    """The shards of one kind; their ``meta.json`` comes last and says that they are whole."""
    shutil.rmtree(args.bench_data / kind, ignore_errors=True)
    packing = {"tokenizer": str(scratch / "corpus" / "tokenizer.json"), "sequence_length": ROW_TOKENS}
    config = ShardingConfig(**(packing if kind == "packed" else {}))
    once = shard_files(files, scratch / kind, config, progress=False)
    times = math.ceil(args.gigabytes * 1e9 / sum(record.bytes for record in once.values()))
    shards = made(args.bench_data / kind / "shards")
    records = {name: repeated(scratch / kind, record, shards, name, times, kind) for name, record in once.items()}
    (shards / MANIFEST_NAME).write_text(manifest_text(records, {}))
    meta = {"stamp": stamp, "times": times, "domains": survey(args.bench_data / kind, kind, records)}
    (args.bench_data / kind / "meta.json").write_text(json.dumps(meta, indent=1))


def made(folder: Path) -> Path:
    """The folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def convert(args: argparse.Namespace, prefix: list[str]) -> None:
    """The formats of the peers whose environment is there."""
    environments = pythons(args)
    for name, entry in LOADERS.items():
        if entry.environment not in environments:
            print(f"{entry.title}: no environment {entry.environment!r}, left out", flush=True)
            continue
        for kind in entry.kinds:
            words = ["convert", name, "--data", str(args.bench_data / kind)]
            seconds = run(environments[entry.environment], words, prefix)["seconds"]
            if seconds:
                print(f"{entry.title}: {kind} rows in its own format, {seconds:.0f} s", flush=True)


def make(args: argparse.Namespace) -> None:
    """Everything that is not there yet; with ``--quick`` little of it, and each loader then converts for itself."""
    if args.quick:
        args.bench_data, args.gigabytes, args.megabytes = args.bench_data.with_name("bench_data_quick"), 0.02, 8.0
    make_shards(args)
    if not args.quick:
        convert(args, args.prefix.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--quick", action="store_true", help="little data, for throughput.py --quick")
    args = parser.parse_args()
    make(args)
    for kind in KINDS:
        data = Prepared(args.bench_data / kind)
        paths = [Path(tar) for name in data.domains for tar in data.tars(name)]
        rows = sum(data.num_rows(name) for name in data.domains)
        size = sum(path.stat().st_size for path in paths)
        print(f"{kind}: {rows:,} rows, {len(paths)} shards, {size / 1e9:.2f} GB in {data.folder / 'shards'}")


if __name__ == "__main__":
    main()

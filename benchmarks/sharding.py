"""Text per CPU second from JSON lines to packed rows on disk: `dmagent shard`, datasets, datatrove, and the tokenizer.

    python benchmarks/sharding.py --data ../shared/data --megabytes 16

Every way does the same work with the same tokenizer.json: read the same compressed JSON lines, tokenise whole
documents, end each with the end-of-text token, and leave tokens on disk. The tokenizer alone gets the texts in memory
and writes nothing, so it is the limit of all that use it. Each measurement is a process of its own with one thread;
each round measures all ways in another random order, and ratios are formed within a round. What a way imports and the
loading of the tokenizer are not measured. datatrove is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import data
from data import END_OF_TEXT

TOKENIZER, OURS, DATASETS, DATATROVE = "the tokenizer alone", "dmagent shard", "datasets map", "datatrove"


def inputs(folder: Path) -> list[str]:
    """The files of JSON lines."""
    return [str(path) for path in sorted(folder.glob("*.jsonl.gz"))]


def tokenizer_alone(folder: Path, output: Path, length: int) -> Callable[[], int]:
    """Batches of texts in, lists of token ids out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = [
        json.loads(line)["text"]
        for path in inputs(folder)
        for line in gzip.decompress(Path(path).read_bytes()).splitlines()
    ]

    def work() -> int:
        batches = (texts[first : first + 256] for first in range(0, len(texts), 256))
        encodings = (tokenizer.encode_batch(batch, add_special_tokens=False) for batch in batches)
        return sum(len(encoding.ids) + 1 for batch in encodings for encoding in batch)

    return work


def ours(folder: Path, output: Path, length: int) -> Callable[[], int]:
    """Shuffled, in tar shards, with checksums."""
    from dmagent_loader.shards import ShardingConfig, shard_files

    settings = {"tokenizer": str(folder / "tokenizer.json"), "eos_token": END_OF_TEXT, "sequence_length": length}
    config = ShardingConfig(**settings)  # type: ignore[arg-type]

    def work() -> int:
        record = shard_files({"source/text": inputs(folder)}, output, config, progress=False)["source/text"]
        return (record.tokens or 0) + (record.dropped_tokens or 0)

    return work


def datasets_map(folder: Path, output: Path, length: int) -> Callable[[], int]:
    """Load, tokenise, concatenate and cut, as the language modelling example of transformers does; save as Arrow."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": [[*row, end] for row in ids]}

    def pack(batch: dict[str, Any]) -> dict[str, Any]:
        tokens = [token for row in batch["input_ids"] for token in row]
        return {"input_ids": [tokens[n : n + length] for n in range(0, len(tokens) // length * length, length)]}

    def work() -> int:
        rows = datasets.load_dataset("json", data_files=inputs(folder), split="train", cache_dir=str(output / "cache"))
        tokens = rows.map(tokenise, batched=True, remove_columns=rows.column_names)
        tokens.map(pack, batched=True).save_to_disk(str(output / "saved"))
        return sum(map(len, tokens["input_ids"]))

    return work


def datatrove_tokens(folder: Path, output: Path, length: int) -> Callable[[], int]:
    """Tokenised documents in one file, which its loader cuts to rows when it reads them."""
    import loguru
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    loguru.logger.remove()
    steps = [
        JsonlReader(str(folder), glob_pattern="*.jsonl.gz"),
        DocumentTokenizer(
            str(output / "tokens"),
            tokenizer_name_or_path=str(folder / "tokenizer.json"),
            eos_token=END_OF_TEXT,
            shuffle_documents=True,
            local_working_dir=str(output / "scratch"),
        ),
    ]

    def work() -> int:
        LocalPipelineExecutor(steps, tasks=1, logging_dir=str(output / "logs")).run()
        return sum(path.stat().st_size for path in output.glob("tokens/**/*.ds")) // 2

    return work


WAYS = {TOKENIZER: tokenizer_alone, OURS: ours, DATASETS: datasets_map, DATATROVE: datatrove_tokens}


def prepare(args: argparse.Namespace, folder: Path) -> float:
    """Writes the compressed JSON lines and the tokenizer; megabytes of text."""
    size = 0
    files = data.write_corpus(args, folder / "corpus", tokenizer=True)
    for name, (path,) in files.items():
        content = Path(path).read_bytes()
        size += sum(len(json.loads(line)["text"].encode()) for line in content.splitlines())
        (folder / f"{name.replace('/', '-')}.jsonl.gz").write_bytes(gzip.compress(content))
    shutil.move(folder / "corpus" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "corpus")
    return size / 1e6


def measure(folder: Path, way: str, args: argparse.Namespace) -> dict[str, float]:
    """One measurement, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*args.prefix.split(), sys.executable, __file__, "--child", way, "--folder", str(folder)]
    command += ["--sequence-length", str(args.sequence_length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def child(args: argparse.Namespace) -> None:
    """Runs one way and prints its tokens and seconds."""
    with tempfile.TemporaryDirectory(dir=args.folder) as output:
        work = WAYS[args.child](args.folder, Path(output), args.sequence_length)
        began = sum(os.times()[:4])
        tokens = work()
        print(json.dumps({"tokens": tokens, "cpu": sum(os.times()[:4]) - began}))  # with children, if there are any


def rounds(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, dict[str, float]]]:
    """The measurements of each round."""
    ways = [way for way in WAYS if way != DATATROVE or find_spec("datatrove")]
    order = random.Random(0)
    for number in range(args.rounds):
        order.shuffle(ways)
        yield {way: measure(folder, way, args) for way in ways}
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    data.options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        megabytes = prepare(args, Path(scratch))
        results = list(rounds(args, Path(scratch)))
    print(f"{megabytes:.1f} MB of text, rows of {args.sequence_length} tokens, {args.rounds} rounds\n")
    print("| way | tokens | MB per CPU second: median (range) | CPU time, dmagent shard = 1: median (range) |")
    print("|---|---:|---:|---:|")
    for way in [way for way in WAYS if way in results[0]]:
        speeds = [megabytes / result[way]["cpu"] for result in results]
        ratios = [result[way]["cpu"] / result[OURS]["cpu"] for result in results]
        columns = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (speeds, ratios)]
        print(f"| {way} | {results[0][way]['tokens']:,.0f} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()

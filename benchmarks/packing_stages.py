"""Where the CPU time of `dmagent shard --tokenizer` goes, from compressed text to packed shards.

    python benchmarks/packing_stages.py --data ../shared/data --megabytes 12 --rounds 5

One process and one thread. Each round measures, in another random order: the tokenizer alone on texts in memory, in the
batches of the command; reading alone (JSON lines in zstd to documents); the command without a tokenizer (text to
shards), and the command with one. In the last, the time in the tokenizer, in writing chunks (the shuffled order) and in
writing shards (rows, tar, checksums, indexes) is taken apart; what is left is reading, and making arrays of the tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pyarrow as pa
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.writing import collecting, packing
from dmagent_loader.shards.writing.assembling import Assembly
from dmagent_loader.training.data.corpus import read_documents

END_OF_TEXT, VOCABULARY, ROW_TOKENS, TOKENIZER_ONE_IN = "<|endoftext|>", 16_384, 2048, 16
FOLDERS = ("source", "target_math", "target_code")


def texts_of(data: Path, megabytes: float) -> list[str]:
    """Texts of all files of DATA, of each the same number of bytes."""
    files = [path for folder in FOLDERS for path in sorted((data / folder).glob("*.jsonl.gz"))]
    texts = []
    for path in files:
        left = megabytes * 1e6 / len(files)
        for text in read_documents(path):
            if left <= 0:
                break
            texts.append(text)
            left -= len(text.encode())
    random.Random(0).shuffle(texts)
    return texts


class Stages:
    """CPU seconds inside of some functions."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.process_time() - began

        return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of text")
    parser.add_argument("--megabytes", type=float, default=12.0, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    texts = texts_of(args.data, args.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        raw, tokenizer_path = Path(folder) / "text.jsonl.zst", str(Path(folder) / "tokenizer.json")
        with pa.CompressedOutputStream(str(raw), "zstd") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
        trained = ByteLevelBPETokenizer()
        options = {"vocab_size": VOCABULARY, "special_tokens": [END_OF_TEXT], "show_progress": False}
        trained.train_from_iterator(texts[::TOKENIZER_ONE_IN], **options)
        trained.save(tokenizer_path)
        tokenizer = Tokenizer.from_file(tokenizer_path)
        tokenizer.encode_special_tokens = True  # as the command does
        size = max(1, len(texts) * packing.BATCH_CHARACTERS // sum(map(len, texts)))
        batches = [texts[first : first + size] for first in range(0, len(texts), size)]
        stages, encode = Stages(), packing.encode_texts
        packing.encode_texts = stages.timed("tokenizer", encode)
        collecting.write_chunk = stages.timed("chunks", collecting.write_chunk)
        Assembly.run = stages.timed("shards", Assembly.run)  # type: ignore[method-assign]

        def alone() -> None:
            for batch in batches:
                encode(tokenizer, batch)

        def read() -> None:
            for _ in DocumentReader(find_inputs("source/a", [raw])):
                pass

        def shard(config: ShardingConfig) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                shard_files({"source/a": [raw]}, output, config, progress=False)

        ways = {
            "tokenizer alone": alone,
            "reading alone": read,
            "text to shards": functools.partial(shard, ShardingConfig()),
            "packed": functools.partial(
                shard, ShardingConfig(tokenizer=tokenizer_path, eos_token=END_OF_TEXT, sequence_length=ROW_TOKENS)
            ),
        }
        rounds: list[dict[str, float]] = []
        for number in range(args.rounds + 1):
            order, found = random.Random(number).sample(list(ways), len(ways)), {}
            for way in order:
                stages.seconds.clear()
                began = time.process_time()
                ways[way]()
                found[way] = time.process_time() - began
                if way == "packed":
                    inside = {f"packed: {name}": seconds for name, seconds in stages.seconds.items()}
                    found |= {**inside, "packed: the rest": found[way] - sum(inside.values())}
            if number:  # the first round warms up
                rounds.append(found)
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {args.rounds} rounds\n")
    print("| stage | MB per CPU second | share of the whole |\n|---|---:|---:|")
    for way in sorted(rounds[0]):
        shares = [found[way] / found["packed"] for found in rounds]
        speed = megabytes / statistics.median(found[way] for found in rounds)
        print(f"| {way} | {speed:.2f} | {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) |")


if __name__ == "__main__":
    main()

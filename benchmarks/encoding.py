"""CPU time of `encode_batch_fast` of the package tokenizers against that of `encode_batch`, by length of the texts.

    python benchmarks/encoding.py --tokenizer tokenizer.json text.jsonl.gz ...

The first megabyte of the files' texts is cut to pieces of equal length. Each round measures both functions in turn, in
one thread. `dmagent shard` and `PackText` choose between the two by what this prints.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

LENGTHS = (250, 500, 1000, 2000, 4000, 8000, 16_000, 64_000)
CHARACTERS = 1_000_000


def seconds(encode: Any, texts: list[str]) -> float:
    """CPU seconds to the ids of all texts."""
    began = time.process_time()
    for encoding in encode(texts, add_special_tokens=False):
        _ = encoding.ids
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", help="JSON lines with a column text, compressed by gzip")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json")
    parser.add_argument("--rounds", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(args.tokenizer)
    lines = (line for path in args.files for line in gzip.decompress(Path(path).read_bytes()).splitlines())
    whole = "\n".join(json.loads(line)["text"] for line in lines)[:CHARACTERS]
    ways = [tokenizer.encode_batch, tokenizer.encode_batch_fast]
    print("| characters of a text | time of encode_batch_fast, encode_batch = 1: median (range) |\n|---:|---:|")
    for length in LENGTHS:
        texts = [whole[start : start + length] for start in range(0, len(whole), length)]
        ratios = []
        for number in range(args.rounds):
            order = ways if number % 2 else ways[::-1]
            taken = {way: seconds(way, texts) for way in order}
            ratios.append(taken[ways[1]] / taken[ways[0]])
        print(f"| {length:,} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


if __name__ == "__main__":
    main()

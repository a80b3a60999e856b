"""Where the CPU time of `dmagent shard --tokenizer` goes, from compressed text to packed shards.

    python benchmarks/packing_stages.py --data ../shared/data --megabytes 12 --rounds 5

One process and one thread. Each round measures, in another random order: the tokenizer alone on texts in memory, in the
batches of the command; reading alone (JSON lines in zstd to documents); the command without a tokenizer (text to
shards), and the command with one. In the last, the time in the tokenizer, in writing chunks (the shuffled order) and in
writing shards (rows, tar, checksums, indexes) is taken apart; what is left is reading, making arrays of the tokens, and
loading the tokenizer. `PackText` is its counting, from rows in memory to tokens. What has a tokenizer is measured with
the package tiktoken and without it; both must write the same shards.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pyarrow as pa
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from dmagent_loader.shards import RawSample, ShardingConfig, shard_files
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.packed.encoder import DocumentEncoder
from dmagent_loader.shards.writing import collecting, packing
from dmagent_loader.shards.writing.assembling import Assembly
from dmagent_loader.shards.writing.encoding import TextEncoder
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


@contextlib.contextmanager
def tiktoken(used: bool) -> Iterator[None]:
    """Whether the package tiktoken can be imported."""
    with mock.patch.dict(sys.modules, {} if used else {"tiktoken": None}):
        yield


def digest(folder: str) -> str:
    """A digest of all files in a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


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
        size = max(1, len(texts) * packing.BATCH_CHARACTERS // sum(map(len, texts)))
        batches = [texts[first : first + size] for first in range(0, len(texts), size)]
        rows = [[RawSample("", {"txt": text.encode()}) for text in batch] for batch in batches]
        stages, digests = Stages(), set()
        TextEncoder.encode = stages.timed("tokenizer", TextEncoder.encode)  # type: ignore[method-assign]
        collecting.write_chunk = stages.timed("chunks", collecting.write_chunk)
        Assembly.run = stages.timed("shards", Assembly.run)  # type: ignore[method-assign]

        def read() -> None:
            for _ in DocumentReader(find_inputs("source/a", [raw])):
                pass

        def shard(config: ShardingConfig) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                shard_files({"source/a": [raw]}, output, config, progress=False)
                if config.tokenizer is not None:
                    digests.add(digest(output))

        def encoder() -> TextEncoder:
            tokenizer = Tokenizer.from_file(tokenizer_path)
            tokenizer.encode_special_tokens = True  # as the command does
            return TextEncoder(tokenizer)

        def over(function: Callable[[Any], object], items: list[Any]) -> None:
            for item in items:
                function(item)

        ways: dict[str, Callable[[], object]] = {
            "reading alone": read,
            "text to shards": functools.partial(shard, ShardingConfig()),
        }
        packed = ShardingConfig(tokenizer=tokenizer_path, eos_token=END_OF_TEXT, sequence_length=ROW_TOKENS)
        of_way = {}
        for name, used in (("tiktoken", True), ("tokenizers", False)):
            with tiktoken(used):
                counting = DocumentEncoder(
                    Path(tokenizer_path).read_text(),
                    end_token=trained.token_to_id(END_OF_TEXT),
                    member="txt",
                    text_key="text",
                    parse_special_tokens=False,
                )
                ways[f"{name} alone"] = functools.partial(over, encoder().encode, batches)
            ways[f"PackText, {name}"] = functools.partial(over, counting.tokens, rows)
            ways[f"packed, {name}"] = functools.partial(shard, packed)
            of_way[f"packed, {name}"] = used
        rounds: list[dict[str, float]] = []
        for number in range(args.rounds + 1):
            order, found = random.Random(number).sample(list(ways), len(ways)), {}
            for way in order:
                stages.seconds.clear()
                with tiktoken(of_way.get(way, True)):
                    began = time.process_time()
                    ways[way]()
                    found[way] = time.process_time() - began
                if way in of_way:
                    inside = {f"{way}: {name}": seconds for name, seconds in stages.seconds.items()}
                    found |= {**inside, f"{way}: the rest": found[way] - sum(inside.values())}
            if number:  # the first round warms up
                rounds.append(found)
        assert len(digests) == 1, "the shards differ"
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {args.rounds} rounds\n")
    print("| stage | MB per CPU second | CPU time, packed with tiktoken = 1 |\n|---|---:|---:|")
    for way in sorted(rounds[0]):
        shares = [found[way] / found["packed, tiktoken"] for found in rounds]
        speed = megabytes / statistics.median(found[way] for found in rounds)
        print(f"| {way} | {speed:.2f} | {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) |")


if __name__ == "__main__":
    main()

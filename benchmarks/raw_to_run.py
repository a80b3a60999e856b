"""Four commands from raw text without labels to a continual run, with the wall and CPU time of each.

    python benchmarks/raw_to_run.py --data ../shared/data --output build/raw_to_run

Puts documents of all domains of DATA together, without their labels: the source field in a ``.jsonl.zst``, a
``.parquet`` and a ``.jsonl`` file, the target field in a ``.parquet`` file, in a random order. Also trains a tokenizer.
Then it runs the commands as a user would: ``dmagent label --split``, ``dmagent shard`` for each field, and
``examples/huggingface_trainer.py`` with a small model from scratch.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).resolve().parents[1]
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 8192


def texts_of(folder: Path, most: int) -> list[str]:
    """Up to `most` texts of each file of a folder, without anything else of their lines."""
    texts = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for _, line in zip(range(most), lines, strict=False)]
    random.Random(0).shuffle(texts)
    return texts


def write_raw(data: Path, raw: Path, most: int) -> float:
    """Writes the raw files and the tokenizer; megabytes of text."""
    raw.mkdir(parents=True)
    source, target = texts_of(data / "source", most), texts_of(data / "target_math", most)
    lines = [json.dumps({"text": text}) + "\n" for text in source]
    third = len(source) // 3
    with pa.CompressedOutputStream(str(raw / "web-0.jsonl.zst"), "zstd") as compressed:
        compressed.write("".join(lines[:third]).encode())
    pa.parquet.write_table(pa.table({"text": source[third : 2 * third]}), raw / "web-1.parquet")
    (raw / "web-2.jsonl").write_text("".join(lines[2 * third :]), encoding="utf-8")
    pa.parquet.write_table(pa.table({"text": target}), raw / "math.parquet")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [*source[::4], *target[::4]], vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer.save(str(raw / "tokenizer.json"))
    return sum(len(text.encode()) for text in [*source, *target]) / 1e6


def commands(data: Path, output: Path, steps: int) -> list[str]:
    """The four commands."""
    pack = f"--tokenizer {output}/raw/tokenizer.json --sequence-length 512 --output {output}/shards --skip-small"
    dmagent = f"{sys.executable} -m dmagent_loader"
    questions = f"general={data}/env/mmlu_val_500.jsonl.gz math={data}/env/math_train_500.jsonl.gz"
    return [
        f"{dmagent} label --domain source/web={output}/raw/web-* --domain target/math={output}/raw/math.parquet"
        f" --output {output}/labelled --split --no-progress",
        f"{dmagent} shard --input {output}/labelled/source --field source {pack} --no-progress",
        f"{dmagent} shard --input {output}/labelled/target --field target {pack} --no-progress",
        f"{sys.executable} {ROOT}/examples/huggingface_trainer.py --shards {output}/shards --tokenizer"
        f" {output}/raw/tokenizer.json --environment {questions} --max-questions 32 --output {output}/run --cpu"
        f" --agent dmagent-rl --max-steps {steps} --decisions 4 --exhausted repeat"
        f" --logging-steps {max(1, steps // 4)} --report-to none",
    ]


def cpu_seconds_of_children() -> float:
    """CPU time of all commands so far, with that of their own children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of text")
    parser.add_argument("--output", type=Path, required=True, help="folder of all files; must not exist")
    parser.add_argument("--documents", type=int, default=1000, help="of each file of DATA (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of the run (default: %(default)s)")
    args = parser.parse_args()
    megabytes = write_raw(args.data, args.output / "raw", args.documents)
    print(f"{megabytes:.1f} MB of text without labels")
    for command in commands(args.data, args.output, args.steps):
        print(f"\n$ {command}", flush=True)
        began, cpu = time.monotonic(), cpu_seconds_of_children()
        subprocess.run(shlex.split(command), check=True)
        cpu = cpu_seconds_of_children() - cpu
        print(f"# {time.monotonic() - began:.1f} s, {cpu:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    main()

"""Documents and text per CPU second of each stage from files to shards, beside datasets and datatrove on the same work.

    python benchmarks/preparing.py --data ../shared/data --megabytes 12 --results FILE.json

Stages, on the same documents:

- *pack, zstd* and *pack, parquet*: read JSON lines in zstd, or parquet; tokenise whole documents with the same
  tokenizer.json, end each with the end-of-text token, and leave tokens on disk. `dmagent shard` also shuffles, and
  writes checksums; datasets concatenates and cuts to rows, as the example of transformers does; datatrove shuffles, and
  leaves the cut to its reader. The tokenizer alone gets the texts in memory and writes nothing.
- *duplicates*: drop near duplicates by MinHash of 5-word shingles, of the same words, and write what is kept. 128
  values (`dmagent filter`), or 14 buckets of 8 (datatrove).
- *labels*: the bundled classifier on every document, and a label beside each. datatrove and datasets call the same
  classifier; alone, it gets the texts in memory and writes nothing.

Each measurement is a process of its own with one thread. Each round measures all ways in another random order, and
ratios are formed within a round. What a way imports and the loading of tokenizer and classifier are not measured. A way
whose package is not installed is left out; datatrove 0.10 needs xxhash<4, and orjson and zstandard. With --results,
rounds that are there are not measured again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import random
import re
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

Work = Callable[[], object]
OURS = "dmagent"
ZSTD, PARQUET, LINES = "text.jsonl.zst", "text.parquet", "text.jsonl.gz"
COPIES = 10
"""Of one in so many documents, a copy with another last word is added: near duplicates."""
BATCH = 4096


def texts_of(folder: Path) -> list[str]:
    """All documents, in memory."""
    return [json.loads(line)["text"] for line in gzip.decompress((folder / LINES).read_bytes()).splitlines()]


def dmagent(*arguments: object) -> Work:
    """A command, in this process."""
    from dmagent_loader.cli import main

    def work() -> None:
        if main([*map(str, arguments), "--no-progress"]):
            raise SystemExit("the command failed")

    return work


def datatrove(output: Path, *pipelines: list[Any]) -> Work:
    """Pipelines, one after the other, in this process."""
    import loguru
    from datatrove.executor import LocalPipelineExecutor

    loguru.logger.remove()

    def work() -> None:
        for number, steps in enumerate(pipelines):
            logs = str(output / "logs" / str(number))
            LocalPipelineExecutor(steps, tasks=ranks_of(steps[0]), workers=1, logging_dir=logs).run()

    return work


def ranks_of(step: Any) -> int:
    """Tasks of a pipeline: one, or one for each bucket."""
    return int(step.config.num_buckets) if type(step).__name__ == "MinhashDedupBuckets" else 1


def tokenizer_alone(name: str, folder: Path, output: Path) -> Work:
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(str(folder / "tokenizer.json")), texts_of(folder)
    tokenizer.encode_special_tokens = True

    def work() -> None:
        for first in range(0, len(texts), 256):
            for encoding in tokenizer.encode_batch(texts[first : first + 256], add_special_tokens=False):
                _ = encoding.ids

    return work


def pack_dmagent(name: str, folder: Path, output: Path) -> Work:
    settings = ("--tokenizer", folder / "tokenizer.json", "--eos-token", END_OF_TEXT, "--sequence-length", 2048)
    return dmagent("shard", "--domain", f"source/text={folder / name}", "--output", output / "shards", *settings)


def pack_datasets(name: str, folder: Path, output: Path) -> Work:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    end, length = tokenizer.convert_tokens_to_ids(END_OF_TEXT), 2048

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": [[*row, end] for row in ids]}

    def pack(batch: dict[str, Any]) -> dict[str, Any]:
        tokens = [token for row in batch["input_ids"] for token in row]
        return {"input_ids": [tokens[n : n + length] for n in range(0, len(tokens) // length * length, length)]}

    def work() -> None:
        rows = load(name, folder, output)
        tokens = rows.map(tokenise, batched=True, remove_columns=rows.column_names)
        tokens.map(pack, batched=True).save_to_disk(str(output / "saved"))

    return work


def load(name: str, folder: Path, output: Path) -> Any:
    """A data set of the file."""
    import datasets

    kind = "parquet" if name == PARQUET else "json"
    return datasets.load_dataset(kind, data_files=str(folder / name), split="train", cache_dir=str(output / "cache"))


def reader(name: str, folder: Path) -> Any:
    """datatrove's reader of the file."""
    from datatrove.pipeline.readers import JsonlReader, ParquetReader

    return (ParquetReader if name == PARQUET else JsonlReader)(str(folder), glob_pattern=name)


def pack_datatrove(name: str, folder: Path, output: Path) -> Work:
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenise = DocumentTokenizer(
        str(output / "tokens"),
        tokenizer_name_or_path=str(folder / "tokenizer.json"),
        eos_token=END_OF_TEXT,
        shuffle_documents=True,
        local_working_dir=str(output / "scratch"),
    )
    return datatrove(output, [reader(name, folder), tokenise])


def duplicates_dmagent(name: str, folder: Path, output: Path) -> Work:
    return dmagent(
        "filter", "--domain", f"source/text={folder / name}", "--near-duplicates", 0.8, "--output", output / "kept"
    )


def duplicates_datatrove(name: str, folder: Path, output: Path) -> Work:
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    class Words(WhitespaceTokenizer):
        """The words of `dmagent filter`."""

        def word_tokenize(self, text: str) -> list[str]:
            return re.findall(r"\w+", text.lower())

    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    places = [str(output / part) for part in ("signatures", "buckets", "remove", "kept")]
    buckets = MinhashDedupBuckets(places[0], places[1], config=config, only_dedup_in_index=False)
    return datatrove(
        output,
        [reader(name, folder), MinhashDedupSignature(places[0], config, language=Words())],
        [buckets],
        [MinhashDedupCluster(places[1], places[2], config=config)],
        [reader(name, folder), MinhashDedupFilter(places[2]), JsonlWriter(places[3])],
    )


def classifier_alone(name: str, folder: Path, output: Path) -> Work:
    from dmagent_loader.labelling import LinearClassifier

    classifier, texts = LinearClassifier.bundled(), texts_of(folder)

    def work() -> None:
        for first in range(0, len(texts), BATCH):
            classifier.probabilities(texts[first : first + BATCH])

    return work


def labels_dmagent(name: str, folder: Path, output: Path) -> Work:
    return dmagent("label", "--domain", f"source/text={folder / name}", "--output", output / "labelled")


def labels_datasets(name: str, folder: Path, output: Path) -> Work:
    from dmagent_loader.labelling import LinearClassifier

    classifier = LinearClassifier.bundled()

    def label(batch: dict[str, Any]) -> dict[str, Any]:
        likely = classifier.probabilities(batch["text"])
        return {"topic": [classifier.labels[n] for n in likely.argmax(axis=1)], "confidence": likely.max(axis=1)}

    def work() -> None:
        load(name, folder, output).map(label, batched=True, batch_size=BATCH).save_to_disk(str(output / "saved"))

    return work


def labels_datatrove(name: str, folder: Path, output: Path) -> Work:
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.writers import JsonlWriter

    from dmagent_loader.labelling import LinearClassifier
    from dmagent_loader.labelling.labels import batches

    classifier = LinearClassifier.bundled()

    class Label(PipelineStep):
        """Batches, as its filters form them."""

        name, type = "topics", "label"

        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
            for batch in batches(data, BATCH):
                likely = classifier.probabilities([document.text for document in batch])
                for document, row in zip(batch, likely, strict=True):
                    document.metadata |= {"topic": classifier.labels[row.argmax()], "confidence": float(row.max())}
                    yield document

    return datatrove(output, [reader(name, folder), Label(), JsonlWriter(str(output / "labelled"))])


PACK = {"the tokenizer alone": tokenizer_alone, OURS: pack_dmagent, "datasets": pack_datasets}
STAGES: dict[str, tuple[str, dict[str, Callable[[str, Path, Path], Work]]]] = {
    "pack, zstd": (ZSTD, {**PACK, "datatrove": pack_datatrove}),
    "pack, parquet": (PARQUET, {**PACK, "datatrove": pack_datatrove}),
    "duplicates": (PARQUET, {OURS: duplicates_dmagent, "datatrove": duplicates_datatrove}),
    "labels": (
        PARQUET,
        {
            "the classifier alone": classifier_alone,
            OURS: labels_dmagent,
            "datasets": labels_datasets,
            "datatrove": labels_datatrove,
        },
    ),
}
"""Stage -> its input, and its ways."""


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Writes the documents in each kind of file, and the tokenizer; the number of documents, and megabytes of text."""
    import pyarrow as pa
    from pyarrow import parquet

    files = data.write_corpus(args, folder / "corpus", tokenizer=True)
    texts = [json.loads(line)["text"] for (path,) in files.values() for line in Path(path).read_bytes().splitlines()]
    random.Random(0).shuffle(texts)
    texts += [f"{text} again" for text in texts[::COPIES]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / LINES).write_bytes(gzip.compress(lines))
    with pa.CompressedOutputStream(str(folder / ZSTD), "zstd") as file:
        file.write(lines)
    parquet.write_table(pa.table({"text": texts}), folder / PARQUET, row_group_size=1000)
    shutil.move(folder / "corpus" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "corpus")
    return {"documents": len(texts), "megabytes": sum(len(text.encode()) for text in texts) / 1e6}


def measure(folder: Path, stage: str, way: str) -> float:
    """Seconds of CPU of one way, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--child", stage, way, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{stage}, {way} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def child(stage: str, way: str, folder: Path) -> None:
    """Runs one way and prints its seconds of CPU."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        name, ways = STAGES[stage]
        work = ways[way](name, folder, Path(output))
        began = sum(os.times()[:4])
        work()
        print(sum(os.times()[:4]) - began)  # with children, if there are any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="JSON of the measurements")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.folder)
        return
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    ways = [
        (stage, way)
        for stage, (_, named) in STAGES.items()
        for way in named
        if way not in ("datasets", "datatrove") or find_spec(way)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        results |= prepare(args, Path(scratch))
        packages = ("datasets", "datatrove", "datasketch", "tokenizers")
        results["versions"] = {name: importlib.metadata.version(name) for name in packages if find_spec(name)}
        order = random.Random(len(results.setdefault("rounds", [])))
        while len(results["rounds"]) < args.rounds:
            order.shuffle(ways)
            results["rounds"].append({f"{stage}: {way}": measure(Path(scratch), stage, way) for stage, way in ways})
            print(f"round {len(results['rounds'])} of {args.rounds}", file=sys.stderr, flush=True)
            if args.results:
                args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The speeds and ratios as a Markdown table: median and range over the rounds."""
    rounds = results["rounds"]
    lines = [
        f"{results['documents']:,} documents, {results['megabytes']:.1f} MB of text, {len(rounds)} rounds",
        "",
        "| stage | way | documents per CPU second | MB per CPU second | CPU time, dmagent = 1 |",
        "|---|---|---:|---:|---:|",
    ]
    for stage, (_, ways) in STAGES.items():
        for way in (way for way in ways if f"{stage}: {way}" in rounds[0]):
            seconds = [found[f"{stage}: {way}"] for found in rounds]
            ratios = [found[f"{stage}: {way}"] / found[f"{stage}: {OURS}"] for found in rounds]
            middle = statistics.median(seconds)
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if way != OURS else "1"
            speeds = f"{results['documents'] / middle:,.0f} | {results['megabytes'] / middle:.2f}"
            lines.append(f"| {stage} | {way} | {speeds} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

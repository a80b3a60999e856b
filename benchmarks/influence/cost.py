"""What measuring influence costs in a run of the Hugging Face Trainer: CPU seconds, share of the run, tokens, memory.

    python -m benchmarks.influence.cost --data DATA --output benchmarks/results/influence_cost.jsonl

Real text, the demo's tokenizer, model and run, and a model of a user's size beside it; each method of measuring in a
process of its own, on one core. CPU seconds do not depend on what else the machine does. A finished run is a line of
the output and is not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import transformers

from benchmarks import records
from benchmarks.influence.environments import one_thread
from benchmarks.influence.ways import peak_memory
from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.corpus import write_corpus
from dmagent_loader._demo.language_model import new_model, train_tokenizer
from dmagent_loader._demo.methods import Method, run_method
from dmagent_loader._demo.user_corpus import read_user_corpus
from dmagent_loader.environment import Environment
from dmagent_loader.environment.influence import Way
from dmagent_loader.shards.manifest import load_manifest
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.writer import shard_files

SIZES: dict[str, DemoConfig] = {
    "demo": DemoConfig(),
    "larger": DemoConfig(hidden_size=320, num_layers=5, decisions=5),
}
"""The demo, and a model of 7 times as many parameters with a quarter of the steps."""
WAYS: tuple[str, ...] = get_args(Way)
_T = TypeVar("_T")


class TimedEnvironment(Environment):
    """An environment that counts the CPU seconds of its evaluations, and cost and memory of measuring influence."""

    way: Way = "gradient"

    def count(self) -> None:
        """Starts to count."""
        self.evaluations = self.measurements = self.tokens = self.peak_bytes = 0
        self.evaluation_seconds = self.influence_seconds = 0.0

    def evaluate(self, *args: Any, **settings: Any) -> dict[str, float]:
        result, seconds = _timed(lambda: super(TimedEnvironment, self).evaluate(*args, **settings))
        self.evaluations += 1
        self.evaluation_seconds += seconds
        return result

    def influence(self, *args: Any, **settings: Any) -> Any:
        measure = super().influence
        (result, grown), seconds = _timed(lambda: peak_memory(lambda: measure(*args, way=self.way, **settings)))
        self.measurements += 1
        self.tokens += result.tokens
        self.influence_seconds += seconds
        self.peak_bytes = max(self.peak_bytes, grown)
        return result


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    begun = time.process_time()
    return work(), time.process_time() - begun


def run(size: str, way: Way, data: Path, work: Path) -> dict[str, Any]:
    """One run of the Trainer with ``policy="influence"``, from an untrained model."""
    config = SIZES[size]
    one_thread()
    corpus = read_user_corpus(data, config, "target_math")
    documents, questions = write_corpus(corpus, work / "corpus")
    tokenizer = train_tokenizer((t for texts in corpus.documents.values() for t in texts), config.vocab_size)
    tokenizer.save_pretrained(work / "tokenizer")
    packing = ShardingConfig(tokenizer=str(work / "tokenizer"), sequence_length=config.row_tokens)
    shard_files({name: [path] for name, path in documents.items()}, work / "shards", packing, progress=False)
    environment = TimedEnvironment.from_files(questions, tokenizer, progress=False)
    assert isinstance(environment, TimedEnvironment)
    environment.way = way
    environment.count()
    model = new_model(config, len(tokenizer))
    method = Method(name="influence", policy="influence")
    shards = load_manifest(work / "shards")
    _, seconds = _timed(lambda: run_method(method, model, shards, environment, config, work))
    return {
        "size": size,
        "way": way,
        "parameters": model.num_parameters(),
        "domains": len(shards),
        "steps": config.run_steps,
        "run_tokens": config.run_tokens,
        "questions": {field: len(listed) for field, listed in environment.questions.items()},
        "seconds": round(seconds, 2),
        "evaluations": environment.evaluations,
        "evaluation_seconds": round(environment.evaluation_seconds, 2),
        "measurements": environment.measurements,
        "influence_seconds": round(environment.influence_seconds, 2),
        "influence_tokens": environment.tokens,
        "peak_mb": round(environment.peak_bytes / 1e6, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown of finished runs."""
    rows = []
    for line in found:
        training = line["seconds"] - line["evaluation_seconds"] - line["influence_seconds"]
        rows.append(
            (
                f"{line['parameters'] / 1e6:.1f}M, {line['steps']} steps",
                line["way"],
                f"{training:.1f}",
                f"{line['evaluation_seconds']:.1f} ({line['evaluations']})",
                f"{line['influence_seconds']:.1f} ({line['measurements']})",
                f"{line['influence_seconds'] / line['seconds']:.0%}",
                f"{line['influence_tokens'] / 1e6:.2f}M",
                f"{line['influence_seconds'] / training * line['steps']:.0f}",
                f"{line['peak_mb']:.0f}",
            )
        )
    header = (
        *("model", "method", "training, s", "evaluations, s", "influence, s", "share of the run", "tokens"),
        *("as many steps", "memory, MB"),
    )
    lines = [header, ("---", "---", *["---:"] * (len(header) - 2)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with source, target_math and env")
    parser.add_argument("--output", type=Path, required=True, help="file of finished runs")
    parser.add_argument("--work", type=Path, default=Path("build/influence_cost"), help="folder for shards and models")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        size, way = args.run
        records.add(args.output, run(size, way, args.data, args.work / f"{size}-{way}"))
        return
    for size in args.sizes:
        for way in WAYS:
            if not any((line["size"], line["way"]) == (size, way) for line in records.lines(args.output)):
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.influence.cost", *sys.argv[1:], "--run", size, way], check=True
                )
    print(table(records.lines(args.output)))


if __name__ == "__main__":
    main()

"""Fixtures of the tests of tasks: a data folder of made-up text, and its library. A ``conftest.py`` imports them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.training.data.corpus import CorpusConfig
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator
from dmagent_loader.training.tasks.spec import BaseModel, TaskSpec


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> TaskLibrary:
    """Each topic has words of its own; questions are about Science and sums."""
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def text(words: list[str], length: int) -> str:
        return " ".join(rng.choice(words, size=length))

    common = ["the", "of", "and", "is", "in", "it"]
    words = {topic: [*common, *(f"{topic.lower()[:5]}{i}" for i in range(6))] for topic in CANONICAL_TOPICS}
    # Without Health among the source topics, its documents are taken for Science.
    words["Health"] += words["Science"]
    for topic in CANONICAL_TOPICS:
        _write(data / "source" / f"{topic}.jsonl.gz", [{"text": text(words[topic], 120)} for _ in range(40)])
    sums = [f"{a} plus {b} is {a + b}" for a in range(9) for b in range(9)]
    for folder in ("target_math", "target_code"):
        rows = [{"text": f"{text(words[topic], 30)} {text(sums, 20)}"} for topic in CANONICAL_TOPICS for _ in range(8)]
        _write(data / folder / "sums.jsonl.gz", rows)
    questions = {
        "sciq_val": [{"question": text(words["Science"], 8), "answer": text(words["Science"], 3)} for _ in range(24)],
        "gsm8k_test": [{"question": f"what is {line[:8]}", "answer": line} for line in sums[:24]],
    }
    for name, rows in questions.items():
        _write(data / "env" / f"{name}.jsonl.gz", rows)
    return TaskLibrary(data, tmp_path_factory.mktemp("work"), CorpusConfig(vocab_size=400, max_tokens=6000))


@pytest.fixture(scope="session")
def simulator(library: TaskLibrary) -> ProxySimulator:
    return ProxySimulator(library, probe_rows=4)


@pytest.fixture
def task() -> TaskSpec:
    """Three decisions of 1,024 tokens, seven unnamed domains."""
    return TaskSpec(
        number=0,
        split="train",
        keep="sciq",
        target="math",
        acquire="gsm8k",
        base=BaseModel(size="0.06M", tokens=8192),
        steps=3,
        tokens_per_step=1024,
        learning_rate=3e-3,
        space="merged-7",
    )

"""What the tests of the training scripts share: packed shards from the command line, questions, a way to start one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import REPOSITORY, environment, python
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dmagent_loader.cli import main

EXAMPLES = REPOSITORY / "examples"
TEXT = "the model reads a page of text and learns which word comes next in it"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with packed ``shards``, ``tokenizer.json`` and the questions ``general.jsonl`` and ``math.jsonl``."""
    texts = {
        "source/Science": [TEXT[i % 7 :] for i in range(300)],
        "target/Science": [f"{i} + {i} = {2 * i}" for i in range(300)],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for listed in texts.values() for text in listed], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    domains = []
    for name, listed in texts.items():
        path = tmp_path / f"{name.replace('/', '-')}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in listed))
        domains += ["--domain", f"{name}={path}"]
    pack = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--eos-token", "<eos>", "--sequence-length", "16"]
    assert main(["shard", *domains, *pack, "--output", str(tmp_path / "shards"), "--no-progress"]) == 0
    for field, pair in (("general", ("the model reads", "a page of text")), ("math", ("3 + 3 =", "6"))):
        (tmp_path / f"{field}.jsonl").write_text(json.dumps({"question": pair[0], "answer": pair[1]}) + "\n")
    return tmp_path


@pytest.fixture
def train(work: Path) -> Callable[..., Path]:
    """Runs a training script on those shards; returns its output folder, ``out``."""

    def train(script: str, *options: str, processes: int = 1) -> Path:
        command = [*python(processes), str(EXAMPLES / script), "--shards", str(work / "shards")]
        command += ["--output", str(work / "out")]
        command += ["--tokenizer", str(work / "tokenizer.json"), "--hidden-size", "16", "--layers", "1", "--cpu"]
        command += ["--environment", f"general={work / 'general.jsonl'}", f"math={work / 'math.jsonl'}"]
        command += ["--batch-size", "4", "--samples-per-reweight", "16", "--save-steps", "4", *options]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return work / "out"

    return train

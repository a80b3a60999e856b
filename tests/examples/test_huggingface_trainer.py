"""The complete script, as a user runs it: shards from the command line, the bundled agent, a run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dmagent_loader.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"
TEXT = "the model reads a page of text and learns which word comes next in it"


@pytest.fixture
def work(tmp_path):
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


def run(work: Path, *options: str) -> list[dict[str, float]]:
    command = [sys.executable, str(EXAMPLE), "--shards", str(work / "shards"), "--cpu", "--output", str(work / "out")]
    command += ["--tokenizer", str(work / "tokenizer.json"), "--hidden-size", "16", "--layers", "1"]
    command += ["--environment", f"general={work / 'general.jsonl'}", f"math={work / 'math.jsonl'}"]
    command += ["--batch-size", "4", "--samples-per-reweight", "16", "--save-steps", "4", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((work / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "env/math" in entry]


def test_the_script_runs_and_goes_on(work):
    first = run(work, "--max-steps", "8")
    assert [entry["step"] for entry in first] == [0, 4, 8]
    assert all(0 < entry["mix/target"] < 1 for entry in first)
    whole = run(work, "--max-steps", "12", "--resume")
    assert [entry["step"] for entry in whole] == [0, 4, 8, 12]
    assert [entry["mix/target"] for entry in whole[:3]] == [entry["mix/target"] for entry in first]

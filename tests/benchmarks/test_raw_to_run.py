"""Raw text without labels becomes a continual run by the four commands that the documentation names."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest
from launching import REPOSITORY, environment, python

from dmagent_loader.shards import load_manifest

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

TEXTS = {
    "source/forum": "The goalkeeper saved a penalty in the last minute and the team won the league match",
    "source/kitchen": "Simmer the onions in butter, add garlic and stock, and season the soup with salt",
    "target_math/sums": "The team won the match after the goalkeeper saved two penalties, so it has 2 + 1 points",
}


@pytest.mark.slow
def test_four_commands_make_a_run_of_unlabelled_text(tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        path = tmp_path / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": f"{text} {number}. " * 4, "topic": "hidden"}) + "\n" for number in range(60))
        path.write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "data" / "env").mkdir()
    for name in ("mmlu_val_500", "math_train_500"):
        question = json.dumps({"question": "Who saved the penalty?", "answer": "the goalkeeper"}) + "\n"
        (tmp_path / "data" / "env" / f"{name}.jsonl.gz").write_bytes(gzip.compress(question.encode()))
    command = [*python(), str(REPOSITORY / "benchmarks" / "raw_to_run.py"), "--data", str(tmp_path / "data")]
    command += ["--output", str(tmp_path / "out"), "--steps", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n$ ") == 4
    assert b"hidden" not in (tmp_path / "out" / "raw" / "web-2.jsonl").read_bytes()
    domains = set(load_manifest(tmp_path / "out" / "shards"))
    assert {"source/Sports", "source/Food_and_Drink", "target/Sports"} <= domains
    assert re.search(r"mix after 0 samples: source \d+\.\d%, target \d+\.\d%", done.stderr)
    assert (tmp_path / "out" / "run" / "model.safetensors").exists()

"""The complete script, as a user runs it, with a target field of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from launching import REPOSITORY

from dmagent_loader import MixingAgent

EXAMPLE = REPOSITORY / "examples" / "train_your_own_agent.py"
SETTINGS = {
    "corpus": {"vocab_size": 300, "max_tokens": 3000},
    "trajectories": {"candidates_per_step": [1, 20], "trajectories_per_set": 4, "steps": 3}
    | {"tokens_per_step": 128, "target_tokens": 200},
    "feedback": {
        "bases": {"models": 2, "tokens": 1024, "rows_per_update": 4},
        "proxy": {"vocab_size": 300, "width": 16, "heads": 2, "feed_forward": 24},
        "questions": {"max_tokens": 32, "max_questions": 5},
        "row_tokens": 32,
    },
    "sft": {
        "expert_share": None,
        "expert_candidates": 20,
        "updates": 4,
        "evaluate_every": 2,
        "validation": 1,
        "test": 1,
    },
    "cql": {"updates": 4, "warmup_updates": 1, "log_every": 2, "batch_size": 2, "window": 2},
}


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_script_makes_an_agent_for_another_target_field(tmp_path):
    rng = np.random.default_rng(0)
    words = {"Science": "atom energy planet cell enzyme", "Sports": "goal match team striker league"}
    for topic, listed in words.items():
        texts = [{"text": " ".join(rng.choice(listed.split(), 40))} for _ in range(30)]
        write_lines(tmp_path / "source" / f"{topic}.jsonl", texts)
    laws = [{"text": f"article {n}: who takes {n} goals shall return {n + 1} of energy " * 3} for n in range(40)]
    write_lines(tmp_path / "target_law" / "laws.jsonl", laws)
    write_lines(tmp_path / "general.jsonl", [{"question": "what has energy?", "answer": "atom"}])
    write_lines(tmp_path / "law.jsonl", [{"question": "who takes 3 goals shall return", "answer": "4 of energy"}])
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    command = [sys.executable, str(EXAMPLE), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    command += ["--target", "target_law", "--questions", "general=general.jsonl", "law=law.jsonl"]
    command += ["--settings", str(tmp_path / "settings.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 trajectories" in done.stdout
    assert "law " in done.stdout
    assert "the agent's first mix begins with" in done.stdout
    assert MixingAgent.from_pretrained(tmp_path / "out" / "rl").config.max_steps == 3

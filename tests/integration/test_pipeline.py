"""The command, from text files to a checkpoint that loads; and again, from what the first run left."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.agent import MixingAgent
from dmagent_loader.cli.train_agent import add_train_agent_command
from dmagent_loader.errors import ConfigurationError, ShardNotFoundError, StateError
from dmagent_loader.history import History
from dmagent_loader.pipeline.feedback import FeedbackRecord
from dmagent_loader.pipeline.preview import PreviewConfig, with_settings

SETTINGS = {
    "corpus": {"vocab_size": 300, "max_tokens": 3000},
    "trajectories": {
        "candidates_per_step": [1, 20],
        "trajectories_per_set": 4,
        "steps": 3,
        "tokens_per_step": 128,
        "target_tokens": 200,
    },
    "feedback": {
        "proxy": {"vocab_size": 300, "width": 16, "heads": 2, "feed_forward": 24},
        "questions": {"max_tokens": 32, "max_questions": 5},
        "row_tokens": 32,
        "proxies_at_once": 3,
    },
    "sft": {"expert_candidates": 20, "updates": 4, "evaluate_every": 2, "validation": 1, "test": 1},
}


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_train_agent_command(parser.add_subparsers())
    args = parser.parse_args(["train-agent", "preview", "--no-progress", *map(str, arguments)])
    return int(args.run(args))


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = {"Science": "atom energy planet cell enzyme", "Sports": "goal match team striker league"}
    for topic, listed in words.items():
        texts = [{"text": " ".join(rng.choice(listed.split(), 40))} for _ in range(30)]
        write_lines(folder / "source" / f"{topic}.jsonl.gz", texts)
    sums = [{"text": " ".join(f"{a} + {b} = {a + b} atom" for a, b in rng.integers(0, 50, (12, 2)))} for _ in range(40)]
    write_lines(folder / "target_math" / "sums.jsonl.gz", sums)
    general = [{"question": "Which has energy?", "answer": word} for word in ("atom", "planet", "cell", "goal")]
    math = [{"question": f"{a} + 1 =", "answer": str(a + 1)} for a in range(8)]
    write_lines(folder / "env" / "mmlu_val.jsonl.gz", general)
    write_lines(folder / "env" / "math_train_500.jsonl.gz", math)
    (folder / "settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    (folder / "notes.md").write_text("Made-up sums, public domain.\n", encoding="utf-8")
    return folder


def test_text_files_become_a_checkpoint_that_proposes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--settings", data / "settings.json", "--notes", data / "notes.md")
    assert run("--data", data, "--output", tmp_path / "out", *settings) == 0
    assert str(tmp_path / "out" / "checkpoint") in capsys.readouterr().out
    checkpoint = tmp_path / "out" / "checkpoint"
    agent = MixingAgent.from_pretrained(checkpoint)
    record = FeedbackRecord.load(checkpoint / "recorded.safetensors")
    assert agent.config.statistics == record.statistics()
    assert agent.config.max_steps == 3
    history = History(
        domains=agent.config.domains,
        fields=record.fields,
        mixes=record.trajectories.start_state[None],
        feedback=record.feedback[0, :1],
    )
    assert np.isclose(agent.propose(history).sum(), 1.0)

    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    for promised in (
        "Made-up sums",
        "No reinforcement learning",
        "repeat the last mix",
        f"{record.num_feedbacks:,}: one",
    ):
        assert promised in card
    for section in ("Trajectories by set", "Feedback by set", "Next-mix error", "What the agent does"):
        assert section in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    weights = (checkpoint / "model.safetensors").read_bytes()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "corpus").iterdir()}
    assert run("--data", data, "--output", tmp_path / "out", *settings) == 0
    assert (checkpoint / "model.safetensors").read_bytes() == weights, "a second run from the same feedback differs"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "corpus").iterdir()} == times

    changed = {**SETTINGS, "trajectories": {**SETTINGS["trajectories"], "seed": 1}}
    (tmp_path / "changed.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(StateError, match="other settings"):
        run("--data", data, "--output", tmp_path / "out", "--settings", tmp_path / "changed.json")


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardNotFoundError, match="0 files source"):
        run("--data", tmp_path, "--output", tmp_path / "out")


def test_settings_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"TrajectoryConfig has no settings \['stepps'\]"):
        with_settings(PreviewConfig(), {"trajectories": {"stepps": 4}})
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"broken.json cannot be read"):
        run("--data", tmp_path, "--output", tmp_path, "--settings", tmp_path / "broken.json")

"""The command, from text files to a checkpoints that load; and again, from what the first run left."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.critic import load_critics
from dmagent_loader.cli.train_agent import configure_train_agent
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError, ShardNotFoundError, StateError
from dmagent_loader.mixture.history import History
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import PipelineConfig, with_settings

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
        "bases": {"models": 2, "tokens": 1024, "rows_per_update": 4},
        "proxy": {"vocab_size": 300, "width": 16, "heads": 2, "feed_forward": 24},
        "questions": {"max_tokens": 32, "max_questions": 5},
        "row_tokens": 32,
        "proxies_at_once": 3,
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


def run(stage: str, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    configure_train_agent(parser.add_subparsers().add_parser("train-agent"))
    args = parser.parse_args(["train-agent", stage, "--no-progress", *map(str, arguments)])
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


def test_text_files_become_checkpoints_that_propose(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ("--data", data, "--output", out, "--config", data / "settings.json", "--notes", data / "notes.md")
    assert run("all", *given) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / name) for name in ("sft", "rl", "sft.md", "cql.md")]
    record = FeedbackRecord.load(out / "recorded.safetensors")
    assert set(record.trajectories.starts.tolist()) == {0, 1}
    agents = {name: MixingAgent.from_pretrained(out / name) for name in ("sft", "rl")}
    for name, agent in agents.items():
        assert agent.config.statistics == record.statistics()
        assert agent.config.max_steps == 3
        history = History(
            domains=agent.config.domains,
            fields=record.fields,
            mixes=record.trajectories.mixes[0, :1],
            feedback=record.feedback[0, :1],
        )
        assert np.isclose(agent.propose(history).sum(), 1.0)
        card = (out / name / "README.md").read_text(encoding="utf-8")
        for promised in ("Made-up sums", f"{record.num_feedbacks:,}: one", "## Limits"):
            assert promised in card
    assert not torch.equal(*(agent.embed.weight for agent in agents.values())), "Q-learning changed nothing"
    assert len(load_critics(out / "rl" / "critic")) == 2
    assert "validation error" in (out / "sft.md").read_text(encoding="utf-8")
    assert "bellman_error" in (out / "cql.md").read_text(encoding="utf-8")

    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert run("all", *given) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == times, "a finished stage was done again"

    changed = {**SETTINGS, "trajectories": {**SETTINGS["trajectories"], "seed": 1}}
    (tmp_path / "changed.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(StateError, match="other settings"):
        run("trajectories", "--data", data, "--output", out, "--config", tmp_path / "changed.json")


def test_agents_are_trained_again_from_a_recorded_set_alone(data: Path, tmp_path: Path) -> None:
    settings = ("--config", data / "settings.json")
    assert run("feedback", "--data", data, "--output", tmp_path / "first", *settings) == 0
    recorded = tmp_path / "first" / "recorded.safetensors"
    for name in ("first", "second"):
        source = ("--recorded", recorded) if name == "second" else ("--data", data)
        assert run("cql", "--output", tmp_path / name, *source, *settings) == 0
    weights = [(tmp_path / name / "rl" / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_small_settings_make_agents_of_real_text(tmp_path: Path) -> None:
    """Real text, which the repository cannot hold; CONTRIBUTING.md says where it is looked for."""
    real = os.environ.get("DMAGENT_DATA")
    if not real:
        pytest.skip("DMAGENT_DATA does not name a folder with source/, target_math/ and env/")
    started = time.perf_counter()
    assert run("all", "--data", real, "--output", tmp_path, "--config", "small", "--workers", "2") == 0
    assert MixingAgent.from_pretrained(tmp_path / "rl").num_parameters() == 2_125_568
    assert time.perf_counter() - started < 600


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardNotFoundError, match="0 files source"):
        run("trajectories", "--data", tmp_path, "--output", tmp_path / "out")
    with pytest.raises(ConfigurationError, match="pass --data, or --recorded"):
        run("sft", "--output", tmp_path / "out")


def test_a_missing_question_file_is_named_before_the_trajectories_are_drawn(data: Path, tmp_path: Path) -> None:
    """Drawing the trajectories of the full settings takes longer than a quarter of an hour."""
    settings = {**SETTINGS, "questions": {"general": "env/mmlu_val.jsonl.gz", "math": "env/none.jsonl"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(EnvironmentDataError, match=r"there is no question file .*none\.jsonl"):
        run("feedback", "--data", data, "--output", tmp_path / "out", "--config", tmp_path / "settings.json")
    assert not (tmp_path / "out" / "trajectories.safetensors").exists()


def test_notes_that_cannot_be_read_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"the notes '.*none\.md' cannot be read"):
        run("sft", "--data", data, "--output", tmp_path / "out", "--notes", tmp_path / "none.md")


def test_settings_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"TrajectoryConfig has no settings \['stepps'\]"):
        with_settings(PipelineConfig(), {"trajectories": {"stepps": 4}})
    with pytest.raises(ConfigurationError, match="the settings of CQLConfig are 5: give an object"):
        with_settings(PipelineConfig(), {"cql": 5})
    with pytest.raises(ConfigurationError, match=r"CQLConfig does not take .*'ten'"):
        with_settings(PipelineConfig(), {"cql": {"updates": "ten"}})
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    for name in (str(tmp_path / "broken.json"), "smal"):
        with pytest.raises(ConfigurationError, match=r"cannot be read .* one of full, small"):
            run("trajectories", "--data", tmp_path, "--output", tmp_path, "--config", name)

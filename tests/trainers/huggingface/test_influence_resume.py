"""A Trainer run with ``policy="influence"`` that is killed outright continues as if it had not been killed."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY, environment, python

from dmagent_loader.integrations.huggingface import last_whole_checkpoint
from dmagent_loader.testing import write_toy_shards

DOMAINS = {"source/Science": 60, "source/News": 60, "target/code": 60, "target/math": 60}
KILLED_AT = 8
SAVED_EVERY = 5
PROGRAM = f"""
import hashlib, json, os, signal, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.integrations.huggingface import DataMixingCallback, last_whole_checkpoint
from dmagent_loader.transforms import packed_tokens

folder, kills = sys.argv[1], sys.argv[2] == "kill"
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
pairs = {{"keep": [("12", "34"), ("5 6", "78"), ("a", "b")], "acquire": [("x =", " y"), ("q", "r"), ("s", "t")]}}
environment = Environment.from_pairs(pairs, lambda text: [ord(c) % 64 for c in text], progress=False)
sampler = AgentWeightedSampler(
    json.load(open("shards.json")), policy="influence", samples_per_reweight=12, exhausted="repeat",
    transform=packed_tokens, reading=ReadingConfig(progress=False, cache_dir="cache"),
)


class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if kills and state.global_step == {KILLED_AT}:
            os.kill(os.getpid(), signal.SIGKILL)


arguments = TrainingArguments(
    folder, max_steps=14, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], disable_tqdm=True,
    use_cpu=True, save_steps={SAVED_EVERY}, save_strategy="steps", logging_strategy="no",
)
callbacks = [DataMixingCallback(sampler, environment), Watch()]
trainer = Trainer(model, arguments, train_dataset=sampler, callbacks=callbacks)
trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
logs = [line for line in trainer.state.log_history if "dmagent/influence_seconds" in line]
print(json.dumps({{
    "ledger": sampler.ledger.to_json(),
    "feedback": [dict(one.feedback) for one in sampler.measurements],
    "weights": weights,
    "measured_at": [line["step"] for line in logs],
    "influence": [{{k: v for k, v in line.items() if k.startswith("influence/")}} for line in logs],
}}))
"""


def train(folder: Path, run: str, *, kills: bool = False, returncode: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [*python(1), "-c", PROGRAM, run, "kill" if kills else "train"],
        cwd=folder,
        env=environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == returncode, done.stderr[-3000:]
    return {} if kills else json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_killed_run_measures_decides_and_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    """Catches a measurement that is lost and made again after the restart, and another mix."""
    shards = write_toy_shards(tmp_path / "shards", DOMAINS, tokens=24)
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    whole = train(tmp_path, "whole")
    assert len(whole["ledger"]) > 3
    assert whole["measured_at"] == [0]
    train(tmp_path, "killed", kills=True, returncode=-signal.SIGKILL)
    checkpoint = last_whole_checkpoint(tmp_path / "killed")
    assert checkpoint is not None
    assert checkpoint.endswith(f"checkpoint-{SAVED_EVERY}")
    assert train(tmp_path, "killed") == whole

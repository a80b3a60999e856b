"""`dmagent report` on the checkpoints of a stock Trainer, as a user runs both."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens

pytest.importorskip("matplotlib")


def test_a_run_has_a_report_at_any_of_its_checkpoints(tmp_path, capsys):
    """With the influence that was measured, and the end that the Trainer has in mind."""
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 60, "source/b": 60, "target/c": 40}, tokens=24)
    sampler = AgentWeightedSampler(
        shards,
        policy="influence",
        samples_per_reweight=16,
        transform=packed_tokens,
        reading=ReadingConfig(cache_dir=tmp_path / "cache", progress=False),
    )
    pairs = {"general": [("12", "34"), ("5 6", "78")], "math": [("x =", " y"), ("q", "r")]}
    environment = Environment.from_pairs(pairs, lambda text: [ord(c) % 64 for c in text], progress=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=12,
        save_steps=5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=sampler, callbacks=[DataMixingCallback(sampler, environment)]).train()
    capsys.readouterr()

    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(page)]) == 0
    assert "  48 samples trained on, from 3 domains" in capsys.readouterr().out
    assert "The trainer has stopped, after its number of steps (48 samples)." in page.read_text()
    assert "<h2>Measured influence</h2>" in page.read_text()
    assert main(["report", str(tmp_path / "run" / "checkpoint-5"), "--output", str(page)]) == 0
    assert "  20 samples trained on, from 3 domains" in capsys.readouterr().out
    assert "The trainer stops after 48 samples (28 from now), by its number of steps." in page.read_text()

"""The Trainer resumes a checkpoint although the data have changed: the choice is an argument of the sampler."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from shard_fixtures import rewritten
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.errors import StateError
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens


def test_a_checkpoint_resumes_with_changed_data(tmp_path) -> None:
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 64, "target/x": 64}, tokens=8)

    def trainer(steps: int, domains: dict[str, Any], **settings: Any) -> Trainer:
        policy = StaticPolicy({name: 1 / len(domains) for name in domains})
        reading = ReadingConfig(progress=False, cache_dir=tmp_path / "cache")
        sampler = AgentWeightedSampler(
            domains, policy=policy, samples_per_reweight=16, transform=packed_tokens, reading=reading, **settings
        )
        environment = Environment.from_pairs({"general": [("a b", "c")]}, lambda text: [ord(c) % 64 for c in text])
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            max_steps=steps,
            save_steps=6,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        callbacks = [DataMixingCallback(sampler, environment)]
        return Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=sampler, callbacks=callbacks)

    first = trainer(6, shards)
    first.train()
    counts = first.train_dataset.achieved(0, 24)
    rewritten(shards["target/x"][0], lambda key, members: members | {"txt": b"repaired"})
    os.utime(shards["target/x"][0], (2e9, 2e9))
    now = {**shards, **write_toy_shards(tmp_path / "new", {"target/y": 32}, tokens=8)}
    with pytest.raises(StateError, match=r"AgentWeightedSampler\(data='changed'\)"):
        trainer(14, now).train(resume_from_checkpoint=True)
    resumed = trainer(14, now, data="changed")
    resumed.train(resume_from_checkpoint=True)
    sampler = resumed.train_dataset
    assert resumed.state.global_step == 14
    assert sampler.achieved(0, 24) == {**counts, "target/y": 0}
    assert [measurement.consumed for measurement in sampler.measurements] == [0, 16, 32, 48]
    assert sampler.achieved(24, 32)["target/y"] == 0
    assert sampler.achieved(36, 56)["target/y"] > 0

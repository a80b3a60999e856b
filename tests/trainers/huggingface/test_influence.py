"""The stock Trainer with policies that measure the model: training stays as it was, and the cost is in the metrics."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.environment import RowEnvironment
from dmagent_loader.environment.questions import evenly_spaced
from dmagent_loader.integrations._evidence import LEAST_LOSS_ROWS
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.policies import DynamicBatchLoading, RecordedPath, ReplayPolicy, StaticPolicy
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens

DOMAINS = {"source/Science": 60, "source/News": 60, "target/code": 60, "target/math": 60}


def environment():
    pairs = {"keep": [("12", "34"), ("5 6", "78"), ("a", "b")], "acquire": [("x =", " y"), ("q", "r"), ("s", "t")]}
    return Environment.from_pairs(pairs, lambda text: [ord(c) % 64 for c in text], progress=False)


def train(folder, shards, policy, **settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            attention_dropout=0.1,
        )
    )
    sampler = AgentWeightedSampler(
        shards,
        policy=policy,
        samples_per_reweight=16,
        transform=packed_tokens,
        exhausted="repeat",
        reading=ReadingConfig(progress=False),
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=sampler, callbacks=[DataMixingCallback(sampler, environment())])
    trainer.train()
    return trainer, sampler


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_training_after_a_probe_is_training_without_one(tmp_path, settings):
    """The same mix, once found by probes and once given: all weights and moments end up the same, bit for bit."""
    shards = write_toy_shards(tmp_path / "shards", DOMAINS, tokens=24)
    found, sampler = train(tmp_path / "a", shards, "influence", **settings)
    mix = sampler.space.as_dict(sampler.ledger.last.weights())
    given, _ = train(tmp_path / "b", shards, StaticPolicy(mix), **settings)
    for one, other in zip(found.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        found.optimizer.state_dict()["state"].values(), given.optimizer.state_dict()["state"].values(), strict=True
    ):
        for name in one:
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))


def test_the_cost_and_the_scores_are_logged_once(tmp_path):
    shards = write_toy_shards(tmp_path / "shards", DOMAINS, tokens=24)
    trainer, sampler = train(tmp_path / "a", shards, "influence")
    decisions = [line for line in trainer.state.log_history if "mix/source" in line]
    assert len(decisions) == 4
    measured = [line for line in decisions if "dmagent/influence_seconds" in line]
    assert measured == decisions[:1]
    assert measured[0]["dmagent/influence_seconds"] > 0
    assert {name for name in measured[0] if name.startswith("influence/")} == {
        f"influence/{field}/{domain}" for field in ("keep", "acquire") for domain in DOMAINS
    }
    assert sampler.policy.influence.rows == DOMAINS  # few domains: all rows are read
    assert all(line["mix/target"] == pytest.approx(0.3) for line in decisions)


def test_probe_rows_are_those_of_training_and_none_is_consumed(tmp_path):
    shards = write_toy_shards(tmp_path / "shards", DOMAINS, tokens=24)
    sampler = AgentWeightedSampler(
        shards, samples_per_reweight=16, transform=packed_tokens, reading=ReadingConfig(progress=False)
    )
    rows = sampler.probe_rows(5)
    assert list(rows) == list(DOMAINS)
    assert [row["__key__"] for row in rows["source/News"]] == [f"source_News_{n:06d}" for n in (6, 18, 30, 42, 54)]
    assert all(row["__index__"] == -1 and row["__domain__"] == "source/News" for row in rows["source/News"])
    again, others = sampler.probe_rows(5), sampler.probe_rows(5, probe=1)
    assert [r["__key__"] for r in again["target/math"]] == [r["__key__"] for r in rows["target/math"]]
    assert {r["__key__"] for r in others["target/math"]}.isdisjoint(r["__key__"] for r in rows["target/math"])
    assert len(sampler.probe_rows(1000)["target/code"]) == 60
    assert sampler.state_dict()["consumed"] == 0
    first = next(iter(sampler))
    assert first["__index__"] == 0
    by_key = {row["__key__"]: row for row in sampler.probe_rows(60)[first["__domain__"]]}
    assert np.array_equal(by_key[first["__key__"]]["input_ids"], first["input_ids"])


def test_dynamic_batch_loading_gets_the_losses_of_the_trained_model(tmp_path):
    """The losses are those of the model at each decision; the weights, from the logs alone, follow its formula."""
    shards = write_toy_shards(tmp_path / "shards", DOMAINS, tokens=24)
    reference = {"source/Science": 4.0, "source/News": 9.0, "target/code": 4.1, "target/math": 3.9}
    trainer, sampler = train(tmp_path / "a", shards, partial(DynamicBatchLoading, reference=reference, smoothing=0.0))
    decisions = [line for line in trainer.state.log_history if "mix/source" in line]
    assert len(decisions) == 4
    mix = np.full(4, 0.25)
    for number, line in enumerate(decisions):
        if number:
            mix = mix * [np.exp(max(line[f"loss/{domain}"] - reference[domain], 0.0)) for domain in DOMAINS]
            mix = mix / mix.sum()
        assert [line[f"mix/{domain}"] for domain in DOMAINS] == pytest.approx(mix.tolist(), rel=1e-5)
        assert line["dmagent/losses_tokens"] == 24 * 4 * LEAST_LOSS_ROWS, "a short run"
    rows = {
        domain: [row["input_ids"] for row in evenly_spaced(listed, LEAST_LOSS_ROWS)]
        for domain, listed in sampler.probe_rows(60).items()
    }
    after = RowEnvironment(rows).evaluate(trainer.model)
    for domain in DOMAINS:  # the last decision comes after the last step
        assert decisions[-1][f"loss/{domain}"] == pytest.approx(-after[domain], abs=1e-5)
        assert decisions[-1][f"loss/{domain}"] != decisions[0][f"loss/{domain}"]


def test_training_with_losses_is_training_on_a_replay_of_its_path(tmp_path):
    """The same path without any measurement ends in the same weights, bit for bit."""
    shards = write_toy_shards(tmp_path / "shards", DOMAINS, tokens=24)
    measured, sampler = train(tmp_path / "a", shards, "odm")
    path = RecordedPath.from_state(sampler.state_dict())
    assert len(np.unique(path.mixes, axis=0)) > 2
    replayed, _ = train(tmp_path / "b", shards, ReplayPolicy(path))
    for one, other in zip(measured.model.parameters(), replayed.model.parameters(), strict=True):
        assert torch.equal(one, other)

"""What a Trainer user expects of the callback: metrics, a clean end, epochs, refusals."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.integrations.huggingface import DataMixingCallback, DataMixingTrainerMixin
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards

POLICY = {"source/a": 0.5, "target/x": 0.25, "target/y": 0.25}


def tokens(sample):
    ids = torch.as_tensor(sample["input_ids.npy"].astype("int64"))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def parts(tmp_path):
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 40, "target/x": 20, "target/y": 13}, tokens=8)

    def build(arguments=None, **settings):
        sampler = AgentWeightedSampler(
            shards,
            samples_per_reweight=16,
            reading=ReadingConfig(progress=False, cache_dir=tmp_path / "cache"),
            **{"transform": tokens, "policy": StaticPolicy(POLICY), **settings},
        )
        environment = Environment.from_pairs(
            {"general": [("a b", "c")], "math": [("1 + 1", "2 2")]},
            lambda text: [ord(c) % 64 for c in text],
            progress=False,
        )
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"save_strategy": "no", **(arguments or {})},
        )
        callback = DataMixingCallback(sampler, environment)
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=args,
            train_dataset=sampler,
            callbacks=[callback],
            processing_class=None,
        )
        return trainer, callback, sampler

    return build


class Seen(torch.nn.Module):
    """Takes down which samples it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.trained_on = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, input_ids=None, attention_mask=None, index=None):
        if index is None:
            return torch.zeros(*input_ids.shape, 64) + self.weight  # the environment asks
        self.trained_on += index.tolist()
        return {"loss": self.weight * 1.0}


class TrainerWithOwnLoader(DataMixingTrainerMixin, Trainer):
    pass


@pytest.mark.parametrize("trainer_class", [Trainer, TrainerWithOwnLoader])
def test_every_counted_sample_was_trained_on_when_the_run_gets_longer_than_planned(tmp_path, trainer_class):
    """The Trainer plans the last step of a pass by the length at the start, and counts it as a whole one: what it left
    out of the step was never trained on."""
    sampler = AgentWeightedSampler(
        write_toy_shards(tmp_path / "shards", {"source/a": 100, "target/x": 21}),
        policy=StaticPolicy({"source/a": 0.9, "target/x": 0.1}),
        initial_mix={"source/a": 0.5, "target/x": 0.5},
        samples_per_reweight=10_000,
        reading=ReadingConfig(progress=False, cache_dir=tmp_path / "cache"),
    )
    environment = Environment.from_pairs({"general": [("a", "b")]}, lambda text: [ord(c) % 64 for c in text])
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=9,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    model, callback = Seen(), DataMixingCallback(sampler, environment)
    trainer_class(
        model=model,
        args=args,
        train_dataset=sampler,
        callbacks=[callback],
        data_collator=lambda samples: {"index": torch.tensor([sample["__index__"] for sample in samples])},
    ).train()
    assert callback.consumed == 9 * 16
    assert model.trained_on == list(range(callback.consumed))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_stops_cleanly_when_the_target_is_used_up(parts, accumulation):
    trainer, callback, sampler = parts({"max_steps": 500, "gradient_accumulation_steps": accumulation})
    trainer.train()
    end = sampler.plan.end
    assert end == pytest.approx(66, abs=3)
    assert end - 2 * accumulation < callback.consumed <= end
    steps = -(-callback.consumed // (2 * accumulation))
    assert trainer.state.global_step == steps
    assert sampler.achieved(0, callback.consumed)["target/y"] >= 11


def test_rows_that_the_trainer_would_leave_without_columns_are_refused(parts):
    """A forgotten transform: accelerate says that it cannot find the batch size of an empty dict."""
    trainer, _, _ = parts({"max_steps": 3}, transform=None)
    with pytest.raises(ConfigurationError, match=r"rows have \['input_ids.npy'\].*packed_tokens"):
        trainer.train()


def test_a_decoder_that_names_the_columns_needs_no_transform(parts):
    def decode(raw):
        ids = np.load(io.BytesIO(raw.members["input_ids.npy"])).astype("int64")
        return {"input_ids": ids, "labels": ids}

    trainer, callback, _ = parts({"max_steps": 3}, transform=None, decode=decode)
    trainer.train()
    assert callback.consumed == 6


def test_the_callback_takes_the_sampler_first(parts):
    _, callback, sampler = parts()
    with pytest.raises(ConfigurationError, match=r"sampler is .*Environment.*must be an AgentWeightedSampler"):
        DataMixingCallback(callback.environment, sampler)
    with pytest.raises(ConfigurationError, match=r"environment is \{'general'.*must be an Environment"):
        DataMixingCallback(sampler, {"general": "questions.jsonl"})


def test_num_train_epochs_1_is_one_pass_over_the_target(parts):
    trainer, callback, sampler = parts({"num_train_epochs": 1})
    trainer.train()
    assert callback.consumed == sampler.plan.end
    assert trainer.state.global_step == -(-callback.consumed // 2)
    assert trainer.state.global_step == 33
    assert trainer.state.max_steps == 36  # planned at the start, under the initial mix: half of nearly all 73 rows


def test_more_epochs_than_data_are_warned_about(parts, caplog):
    trainer, _, _ = parts({"num_train_epochs": 3})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "num_train_epochs=3 asks for 3 passes" in caplog.text


def test_without_an_end_the_trainer_asks_for_max_steps(parts):
    with pytest.raises(ValueError, match="max_steps"):
        parts({"num_train_epochs": 1}, exhausted="repeat")


def test_the_last_incomplete_batch_of_one_process_is_trained_on(parts):
    trainer, callback, sampler = parts({"num_train_epochs": 1}, initial_mix={"source/a": 0.5, "target/x": 0.5})
    trainer.train()
    assert callback.consumed == sampler.plan.end


def test_nothing_is_lost_between_two_passes(parts):
    """The Trainer fetches a batch ahead; a second pass (here: a second call) must begin with what was not trained
    on."""
    trainer, callback, sampler = parts({"max_steps": 5}, exhausted="repeat")
    trainer.train()
    assert callback.consumed == 10
    fetched = sampler.state_dict()["consumed"]
    assert fetched == 12
    trainer.train()
    assert callback.consumed == 20
    assert sampler.state_dict()["consumed"] == 22


def test_the_end_of_the_plan_leaves_a_checkpoint(parts, tmp_path):
    trainer, _, _ = parts({"max_steps": 500, "save_strategy": "steps", "save_steps": 400})
    trainer.train()
    assert (tmp_path / "out" / f"checkpoint-{trainer.state.global_step}" / "trainer_state.json").exists()


def test_resuming_with_other_steps_and_epochs_names_the_max_steps_to_pass(parts, tmp_path):
    """The Trainer would stop early without a word: it counts old steps against a length in new ones."""
    trainer, _, _ = parts({"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 10})
    trainer.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-10")
    resumed, _, _ = parts({"num_train_epochs": 1, "gradient_accumulation_steps": 2})
    with pytest.raises(ConfigurationError, match=r"pass max_steps=2\d"):
        resumed.train(resume_from_checkpoint=checkpoint)
    resumed, callback, _ = parts({"max_steps": 22, "gradient_accumulation_steps": 2})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert callback.consumed > 60


def test_another_dataset_than_the_samplers_is_refused(parts, tmp_path):
    trainer, _, _ = parts({"max_steps": 2})
    _, _, other = parts({"max_steps": 2})
    trainer.train_dataset = other
    with pytest.raises(ConfigurationError, match="pass the same sampler to both"):
        trainer.train()


def test_an_environment_without_a_policy_and_the_other_way_round_are_warned_about(parts, caplog):
    trainer, callback, _ = parts({"max_steps": 1})
    callback.environment = None
    trainer.train()
    assert "so it never decides" in caplog.text
    trainer, _, _ = parts({"max_steps": 1}, policy=None)
    trainer.train()
    assert "neither agent nor policy" in caplog.text


def test_rebuilding_callbacks_from_a_checkpoint_is_refused(parts):
    with pytest.raises(ConfigurationError, match="leave it False"):
        parts({"max_steps": 2, "restore_callback_states_from_checkpoint": True})


def test_the_models_mode_and_the_logs_of_the_trainer_are_left_alone(parts):
    trainer, _, _ = parts({"max_steps": 9, "logging_steps": 1})
    trainer.train()
    assert trainer.model.training
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, 10))

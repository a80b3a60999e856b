"""What a Trainer user expects of the callback: metrics, a clean end, epochs, refusals."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from seeing_model import Seen
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
            reading=ReadingConfig(progress=False, cache_dir=tmp_path / "cache"),
            **{"samples_per_reweight": 16, "transform": tokens, "policy": StaticPolicy(POLICY), **settings},
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


class OutOfMemory(Seen):
    """Has memory for 5 samples from a sample on."""

    def __init__(self, first=0):
        super().__init__()
        self.first, self.batches = first, []

    def forward(self, input_ids=None, attention_mask=None, index=None):
        if index is not None and len(index) > 5 and index[-1] >= self.first:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if index is not None:
            self.batches.append(len(index))
        return super().forward(input_ids, attention_mask, index)


@pytest.fixture
def seeing(tmp_path):
    """Trains a model that takes down its samples, from a batch size of 8."""

    def train(model, trainer_class, arguments, between=lambda trainer: None, **settings):
        sampler = AgentWeightedSampler(
            write_toy_shards(tmp_path / "shards", {"source/a": 60, "target/x": 60}),
            reading=ReadingConfig(progress=False, cache_dir=tmp_path / "cache"),
            **{"policy": StaticPolicy({"source/a": 0.5, "target/x": 0.5}), "exhausted": "repeat", **settings},
        )
        environment = Environment.from_pairs({"general": [("a", "b")]}, lambda text: [ord(c) % 64 for c in text])
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"per_device_train_batch_size": 8, "save_strategy": "no", **arguments},
        )
        callback = DataMixingCallback(sampler, environment)
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=sampler,
            callbacks=[callback],
            data_collator=lambda samples: {"index": torch.tensor([sample["__index__"] for sample in samples])},
        )
        between(trainer)
        trainer.train()
        return trainer, callback

    return train


@pytest.mark.parametrize("trainer_class", [Trainer, TrainerWithOwnLoader])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_batch_shrinks_until_it_fits_the_memory(seeing, trainer_class, accumulation):
    """Catches a loader that keeps the batch size of the arguments: the Trainer would try in vain until it reaches 0."""
    arguments = {"max_steps": 6, "auto_find_batch_size": True, "gradient_accumulation_steps": accumulation}
    model = OutOfMemory()
    trainer, callback = seeing(model, trainer_class, arguments, samples_per_reweight=5 * accumulation)
    assert set(model.batches) == {5}  # 8, 7, 6, 5
    assert callback.consumed == 6 * 5 * accumulation
    assert model.trained_on == list(range(callback.consumed))
    decisions = [entry for entry in trainer.state.log_history if "env/general" in entry]
    assert [entry["step"] for entry in decisions] == [0, 1, 2, 3, 4, 5, 6]
    assert [entry["dmagent/consumed_samples"] for entry in decisions] == [5.0 * accumulation * n for n in range(7)]


@pytest.mark.parametrize("trainer_class", [Trainer, TrainerWithOwnLoader])
def test_an_attempt_with_a_smaller_batch_goes_on_with_the_next_samples(seeing, trainer_class):
    """Memory that runs out in the third step: what the two before it were trained on is not read again."""
    model = OutOfMemory(first=20)
    trainer, callback = seeing(
        model, trainer_class, {"max_steps": 4, "auto_find_batch_size": True}, samples_per_reweight=8
    )
    assert model.batches == [8, 8, 5, 5, 5, 5]
    assert model.trained_on == list(range(callback.consumed)) == list(range(36))
    decisions = [entry["dmagent/consumed_samples"] for entry in trainer.state.log_history if "env/general" in entry]
    assert decisions == [0, 8, 16, 26, 36]


@pytest.mark.parametrize("trainer_class", [Trainer, TrainerWithOwnLoader])
def test_epochs_after_the_batch_has_shrunk_count_the_batches_that_were_trained_on(seeing, trainer_class):
    """The length of an epoch was cut to whole steps of the first batch size, so a stock Trainer ends it within a step:
    a count of whole steps would pass over samples that nobody trained on."""
    model = OutOfMemory()
    arguments = {"num_train_epochs": 3, "auto_find_batch_size": True, "gradient_accumulation_steps": 7}
    later = {"policy": StaticPolicy({"source/a": 0.6, "target/x": 0.4}), "exhausted": None, "samples_per_reweight": 40}
    _, callback = seeing(model, trainer_class, arguments, **later)
    assert model.trained_on == list(range(callback.consumed))
    assert callback.consumed >= 120


@pytest.mark.parametrize("trainer_class", [Trainer, TrainerWithOwnLoader])
def test_arguments_that_change_before_training_hold(seeing, trainer_class):
    """Catches a callback that keeps what it saw when the Trainer was built."""

    def between(trainer):
        trainer.args.gradient_accumulation_steps, trainer.args.max_steps = 2, 5
        trainer.args.dataloader_num_workers = 1

    model = Seen()
    _, callback = seeing(
        model, trainer_class, {"max_steps": 50, "per_device_train_batch_size": 4}, between, decisions=5
    )
    assert model.trained_on == list(range(callback.consumed)) == list(range(40))
    assert callback.sampler.samples_per_reweight == 8


def test_the_loader_of_the_mixin_starts_its_workers_as_the_arguments_say(seeing):
    """Catches a fork in a process that asked for none, for example because of threads of a CUDA library."""
    loaders = []
    arguments = {"max_steps": 2, "dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}

    def between(trainer):
        loaders.append(trainer.get_train_dataloader())
        trainer.args.dataloader_num_workers = 0  # for which torch takes no context

    seeing(Seen(), TrainerWithOwnLoader, arguments, between)
    assert loaders[0].multiprocessing_context.get_start_method() == "spawn"


def test_a_search_over_hyperparameters_is_refused(parts):
    """Each trial trains a new model, and would go on with the mixes and the data of the one before."""
    trainer, _, _ = parts({"max_steps": 3})
    with pytest.raises(ConfigurationError, match="build sampler, callback and Trainer anew"):
        trainer.train(trial={"learning_rate": 1e-3})


# Epochs and the end, as docs/trainers/huggingface.md describes them


def test_one_epoch_is_as_long_as_the_data_under_the_initial_mix(parts, caplog):
    """The policy takes less target than the initial mix: rows of it stay unused, and the log says how to use them."""
    less = StaticPolicy({"source/a": 0.8, "target/x": 0.1, "target/y": 0.1})
    half = {"source/a": 0.5, "target/x": 0.25, "target/y": 0.25}
    trainer, callback, sampler = parts({"num_train_epochs": 1}, policy=less, initial_mix=half)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 33
    assert callback.consumed == 66 < sampler.end
    steps = -(-sampler.end // 2)
    assert "num_train_epochs=1 plans 33 steps" in caplog.text
    assert f"set max_steps={steps} to use them up" in caplog.text
    left = 33 - sum(count for name, count in sampler.achieved(0, 66).items() if name.startswith("target"))
    assert left == 20
    assert "training ended after 66 samples; used up: nothing; passes: " in caplog.text
    assert f"{left} of 33 rows of target" in caplog.text
    longer, callback, sampler = parts({"max_steps": steps}, policy=less, initial_mix=half)
    longer.train()
    assert callback.consumed == sampler.end


@pytest.mark.parametrize(("arguments", "planned"), [({"num_train_epochs": 3}, 108), ({"max_steps": 90}, 90)])
def test_training_that_is_planned_for_more_than_the_data_ends_with_them(parts, caplog, arguments, planned):
    trainer, _, sampler = parts(arguments)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert trainer.state.max_steps == planned
    assert trainer.state.global_step == 33
    assert f"the data are used up after step 33, but the trainer plans {planned} steps" in caplog.text
    assert "set max_steps=33" in caplog.text
    assert (
        "the run ends after 66 samples (step 33) because its data are used up; target/y runs out first" in caplog.text
    )
    assert f"training ended after {sampler.end} samples; used up: " in caplog.text


def test_a_run_whose_data_repeat_ends_with_the_trainer(parts, caplog):
    trainer, _, _ = parts({"max_steps": 10}, exhausted="repeat")
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert "the run ends after 20 samples (step 10) because the trainer stops; by then, passes: " in caplog.text
    assert "trainer plans" not in caplog.text


def test_passes_and_rows_left_are_metrics_and_the_fourth_pass_is_warned_of_once(parts, caplog):
    """Two of five samples come from 13 rows: catches a run that reads them again and again in silence."""
    mix = {"source/a": 0.5, "target/x": 0.1, "target/y": 0.4}
    trainer, _, sampler = parts(
        {"max_steps": 100}, exhausted="repeat", policy=StaticPolicy(mix), samples_per_reweight=None, decisions=10
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    decisions = [entry for entry in trainer.state.log_history if "env/general" in entry]
    assert len(decisions) == 11  # and the feedback at the end
    for entry in decisions:
        counts = sampler.achieved(0, int(entry["dmagent/consumed_samples"]))
        for name, rows in zip(sampler.space.names, sampler.plan.num_rows.tolist(), strict=True):
            assert entry[f"epochs/{name}"] == pytest.approx(counts[name] / rows)
            assert entry[f"rows_left/{name}"] == max(0, rows - counts[name])
    assert caplog.text.count("the 4th pass over the rows of target/y has begun") == 1
    assert caplog.text.count("the 4th pass") == 1
    assert decisions[-1]["epochs/target/y"] > 5

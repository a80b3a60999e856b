"""A Trainer that is started again: after Ctrl-C, with a used sampler, with the callback twice; and epochs cut short."""

from __future__ import annotations

import time

import pytest
import torch
from seeing_model import Seen
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, Mixing, ReadingConfig
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards


class Wrapped(Seen):
    """As torch.compile and many wrappers: the signature names no column."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class At(TrainerCallback):
    """Does something once, at an event."""

    def __init__(self, event, number, action):
        self.left, self.action = number, action
        setattr(self, event, self._happen)

    def _happen(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.action(control)
        return control


def interrupt(control):
    raise KeyboardInterrupt


def stop_epoch(control):
    control.should_epoch_stop = True


@pytest.fixture
def build(tmp_path):
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 60, "target/x": 60})

    def new_sampler(**settings):
        mix = StaticPolicy({"source/a": 0.6, "target/x": 0.4})
        reading = ReadingConfig(progress=False, cache_dir=tmp_path / "cache")
        chosen = {"policy": mix, "samples_per_reweight": 16, "exhausted": "repeat", **settings}
        return AgentWeightedSampler(shards, reading=reading, **chosen)

    def build(arguments, callbacks=(), model=None, sampler=None, **settings):
        sampler = new_sampler(**settings) if sampler is None else sampler
        environment = Environment.from_pairs(
            {"general": [("a", "b")]}, lambda text: [ord(c) % 64 for c in text], progress=False
        )
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"per_device_train_batch_size": 4, "save_strategy": "no", "remove_unused_columns": False, **arguments},
        )
        callback = DataMixingCallback(sampler, environment)
        trainer = Trainer(
            model=Seen() if model is None else model,
            args=args,
            train_dataset=sampler,
            callbacks=[callback, *callbacks],
            data_collator=lambda samples: {"index": torch.tensor([sample["__index__"] for sample in samples])},
        )
        return trainer, callback

    return build


def decisions(trainer):
    return [int(entry["dmagent/consumed_samples"]) for entry in trainer.state.log_history if "env/general" in entry]


def test_the_callback_twice_is_refused(build):
    """A cell of a notebook that is run again: each step would count twice, and a resumed run skip half of the data."""
    trainer, callback = build({"max_steps": 4})
    trainer.add_callback(callback)
    with pytest.raises(ConfigurationError, match=r"2 callbacks of DataMixingCallback.*remove_callback"):
        trainer.train()
    trainer.remove_callback(DataMixingCallback)
    trainer.train()
    assert callback.consumed == 16


def test_a_used_sampler_goes_on_under_a_new_callback(build, caplog):
    """A cell that builds callback and Trainer, but not the sampler: the error was about a count that nobody made."""
    first, _ = build({"max_steps": 10})
    first.train()
    again, callback = build({"max_steps": 3, "save_strategy": "steps", "save_steps": 2}, sampler=first.train_dataset)
    again.train()
    assert again.model.trained_on == list(range(40, 52))
    assert callback.consumed == 52
    assert decisions(again) == [48]
    assert "was trained on for 40 samples before" in caplog.text
    assert "build sampler and callback anew" in caplog.text


def test_a_state_of_another_loop_goes_on_in_a_trainer(build):
    """docs/resume.md: the trainer may change. Catches a run that begins at its first sample again."""
    first, callback = build({"max_steps": 10})
    first.train()
    state = callback.state()["attributes"]["sampler"]
    _, unused = build({"max_steps": 3})
    unused.sampler.load_state_dict(state)
    second, callback = build({"max_steps": 3}, sampler=unused.sampler)
    second.train()
    assert second.model.trained_on == list(range(40, 52))
    mixing = Mixing(callback.sampler, callback.environment)
    mixing.begin()
    assert mixing.consumed == 52


def test_a_state_that_is_loaded_after_the_trainer_was_built_goes_on(build):
    """The Trainer asks for the callback's state first, and the error was about a count of 0 that nobody had made."""
    first, callback = build({"max_steps": 10})
    first.train()
    state = callback.state()["attributes"]["sampler"]
    second, callback = build({"max_steps": 3, "save_strategy": "steps", "save_steps": 1})
    callback.sampler.load_state_dict(state)
    second.train()
    assert second.model.trained_on == list(range(40, 52))
    assert decisions(second) == [48]
    assert callback.state()["attributes"]["sampler"]["consumed"] == 52


class Reporter(TrainerCallback):
    """Takes down the metrics of decisions, as TensorBoard does."""

    def __init__(self):
        self.decisions = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.decisions += [int(logs["dmagent/consumed_samples"])] if "env/general" in logs else []


def test_a_second_trainer_with_the_same_callback_gets_the_metrics(build):
    """They went to the reporters of the first one, whose files are closed."""
    reporters = [Reporter(), Reporter()]
    trainer, callback = build({"max_steps": 10}, [reporters[0]])
    trainer.train()
    again = Trainer(
        model=Seen(),
        args=trainer.args,
        train_dataset=callback.sampler,
        callbacks=[callback, reporters[1]],
        data_collator=trainer.data_collator,
    )
    again.train()
    assert [reporter.decisions for reporter in reporters] == [[0, 16, 32], [48, 64, 80]]


def test_a_fresh_run_is_not_warned_of_earlier_samples(build, caplog):
    trainer, _ = build({"max_steps": 2})
    trainer.train()
    assert "before" not in caplog.text


def test_after_an_interrupt_the_log_of_a_resumed_run_has_each_decision_once(build):
    arguments = {"max_steps": 14, "save_strategy": "steps", "save_steps": 5}
    trainer, _ = build(arguments, [At("on_step_end", 9, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.model.trained_on == [*range(36), *range(20, 56)]
    assert decisions(trainer) == [0, 16, 32, 48]


def test_a_run_that_has_ended_is_not_resumed(build):
    """A job that the scheduler starts again: accelerate failed with a message about stop iteration."""
    arguments = {"max_steps": 100, "save_strategy": "steps", "save_steps": 100}
    trainer, callback = build(arguments, exhausted=None)
    trainer.train()
    again, _ = build(arguments, exhausted=None)
    with pytest.raises(StateError, match=f"has ended: its data were used up after {callback.consumed} samples"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("event", ["on_substep_end", "on_step_end"])
def test_an_epoch_that_is_stopped_within_a_step_repeats_no_sample(build, event):
    """The Trainer keeps the gradients of the batches before, so the first step of the next epoch contains them."""
    arguments = {"num_train_epochs": 3, "gradient_accumulation_steps": 3}
    trainer, callback = build(arguments, [At(event, 3, stop_epoch)], exhausted=None)
    trainer.train()
    assert trainer.model.trained_on == list(range(callback.consumed))
    assert callback.consumed > 60


def test_rows_whose_columns_a_wrapped_model_does_not_name_are_refused(build):
    def named(sample):
        return {"index": sample["__index__"], "labels": [1]}

    trainer, _ = build({"max_steps": 2, "remove_unused_columns": True}, model=Wrapped(), transform=named)
    with pytest.raises(ConfigurationError, match=r"rows have \['index', 'labels'\].*torch_compile=True"):
        trainer.train()


def slow_first_worker(sample):
    if get_worker_info().id == 0:
        time.sleep(0.02)
    return sample


def test_batches_in_the_order_in_which_workers_finish_are_refused(build):
    """They would be trained on as 4, 5, ..., 0, 1, ...: the count of a checkpoint names other samples."""
    arguments = {"max_steps": 6, "dataloader_num_workers": 2, "dataloader_in_order": False}
    trainer, _ = build(arguments, transform=slow_first_worker)
    with pytest.raises(ConfigurationError, match=r"dataloader_in_order=False.*leave it at True"):
        trainer.train()
    assert trainer.model.trained_on == []

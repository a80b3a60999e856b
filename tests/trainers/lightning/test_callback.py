"""Lightning's callback where the conformance suite does not look: epochs, several loaders, other runs' checkpoints."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from reading import quiet
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dmagent_loader import AgentWeightedSampler, Environment, MixingDataLoader
from dmagent_loader.environment import RowEnvironment
from dmagent_loader.environment.questions import evenly_spaced
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.integrations._evidence import LEAST_LOSS_ROWS
from dmagent_loader.policies import LinearSchedule, StaticPolicy
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from dmagent_loader.integrations.lightning import DataMixingCallback

ROWS = {"source/a": 60, "target/x": 40}
LESS_TARGET = LinearSchedule({"source/a": 0.5, "target/x": 0.5}, {"source/a": 0.8, "target/x": 0.2}, 2)
EVEN = {"source/a": 0.5, "target/x": 0.5}


class Module(LightningModule):
    """Remembers which samples it has trained on."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Embedding(64, 4), torch.nn.Linear(4, 64))
        self.indices: list[int] = []

    def forward(self, input_ids, attention_mask=None):
        return self.network(input_ids)

    def training_step(self, batch, batch_idx):
        batch = batch.get("own", batch)
        self.indices += batch["__index__"].tolist()
        return self(batch["input_ids"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MeasuresItsLength(Module):
    """As schedules of the learning rate do; the loader's iterator is made then."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class WithoutLength(MixingDataLoader):
    def __len__(self):
        raise TypeError("no length")


class RestoredLate(SingleDeviceStrategy):
    """Restores after its setup, as strategies that shard the model do."""

    restore_checkpoint_after_setup = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def shards(folder):
    return write_toy_shards(folder / "shards", ROWS, tokens=8)


@pytest.fixture
def build(shards, folder):
    def build(**settings):
        settings = {"samples_per_reweight": 16, "initial_mix": EVEN, "policy": LESS_TARGET, **settings}
        settings |= {"transform": packed_tokens, "reading": quiet(folder / "cache", settings.get("reading"))}
        return AgentWeightedSampler(shards, **settings)

    return build


@pytest.fixture
def trainer(tmp_path):
    def trainer(*callbacks, **settings):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        given = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": -1, "default_root_dir": tmp_path}
        return Trainer(callbacks=list(callbacks), **{**quiet, **given, **settings})

    return trainer


def environment():
    pairs = {"general": [("ab", "c")], "math": [("1 +", "2")]}
    return Environment.from_pairs(pairs, lambda text: [ord(c) % 64 for c in text], progress=False)


def decided(sampler):
    return [entry.decided_at for entry in sampler.ledger if entry.decided_by == LESS_TARGET.name]


def test_losses_by_domain_are_those_of_the_module(build, trainer):
    sampler, module = build(policy="odm", exhausted="repeat"), Module()
    rows = {
        domain: [row["input_ids"] for row in evenly_spaced(listed, LEAST_LOSS_ROWS)]
        for domain, listed in sampler.probe_rows(60).items()
    }
    before = RowEnvironment(rows).evaluate(module)
    callback = DataMixingCallback(sampler, environment())
    trainer(callback, max_steps=8).fit(module, MixingDataLoader(sampler, batch_size=4))
    policy = sampler.policy
    assert policy.base_losses == pytest.approx([-before[domain] for domain in ROWS], abs=1e-5)
    assert policy.updates == len(sampler.measurements) - 1 > 0, "the losses at the start update nothing"
    assert RowEnvironment(rows).evaluate(module)["source/a"] != before["source/a"]


# Epochs


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", [MixingDataLoader, WithoutLength])
def test_nothing_is_lost_or_repeated_where_epochs_end(build, trainer, loader, workers):
    """Catches a new epoch after the batches that were fetched, not those that were trained on."""
    sampler, module = build(), Module()
    callback = DataMixingCallback(sampler, environment())
    settings = {"limit_train_batches": 5, "accumulate_grad_batches": 2, "reload_dataloaders_every_n_epochs": 1}
    trainer(callback, **settings).fit(module, loader(sampler, batch_size=2, num_workers=workers))
    assert module.indices == list(range(callback.consumed))
    assert callback.consumed == sampler.end
    # An epoch's last step is made from one batch.
    assert decided(sampler)[:4] == [0, 18, 34, 48]


def test_training_goes_on_after_the_length_that_the_loader_had(build, trainer):
    sampler, module = build(), Module()
    running = trainer(DataMixingCallback(sampler, environment()))
    running.fit(module, DataLoader(sampler, batch_size=4))
    assert running.num_training_batches == 80 / 4
    assert running.current_epoch == 3
    assert len(module.indices) == sampler.end > 120
    assert module.indices == list(range(sampler.end))


def test_data_left_by_the_number_of_epochs_are_warned_of(build, trainer, caplog):
    sampler, module = build(), Module()
    callback = DataMixingCallback(sampler, environment())
    with caplog.at_level(logging.WARNING):
        trainer(callback, max_epochs=1).fit(module, DataLoader(sampler, batch_size=4))
    assert callback.consumed == 80
    assert f"max_epochs=1 with {sampler.end - 80} samples left" in caplog.text
    assert sampler.end > 120


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"max_epochs": 3}, {"limit_train_batches": 3, "max_epochs": 1}])
def test_an_end_that_was_asked_for_is_not_warned_of(build, trainer, caplog, settings):
    sampler = build()
    with caplog.at_level(logging.WARNING):
        trainer(DataMixingCallback(sampler, environment()), **settings).fit(Module(), DataLoader(sampler, batch_size=4))
    assert "samples left" not in caplog.text


@pytest.mark.parametrize("loader", [MixingDataLoader, WithoutLength])
def test_training_ends_with_the_data_although_more_steps_are_asked_for(build, trainer, caplog, loader):
    """Catches a loop over empty epochs without end."""
    sampler, module = build(policy=None), Module()
    running = trainer(DataMixingCallback(sampler), min_steps=1000)
    with caplog.at_level(logging.WARNING):
        running.fit(module, loader(sampler, batch_size=4))
    assert module.indices == list(range(80))
    assert running.global_step == 20
    assert "min_steps=1000 ask for more" in caplog.text


@pytest.mark.parametrize("loader", [MixingDataLoader, WithoutLength])
def test_a_second_fit_goes_on_where_the_first_ended(build, trainer, loader):
    """Catches a loss of the batch that Lightning fetches for each of the two iterators that it makes then."""
    sampler, module = build(), Module()
    running = trainer(DataMixingCallback(sampler, environment()), max_steps=3)
    running.fit(module, loader(sampler, batch_size=4))
    running.fit_loop.epoch_loop.max_steps = 9
    running.fit(module, loader(sampler, batch_size=4))
    assert module.indices == list(range(9 * 4))


def test_a_used_sampler_under_a_new_module_is_warned_of(build, trainer, caplog):
    """A new run would continue the mixes, the feedback and the data of the one before."""
    sampler = build()
    trainer(DataMixingCallback(sampler, environment()), max_steps=3).fit(Module(), MixingDataLoader(sampler, 4))
    assert "was trained on for" not in caplog.text
    trainer(DataMixingCallback(sampler, environment()), max_steps=3).fit(Module(), MixingDataLoader(sampler, 4))
    assert "was trained on for 12 samples before" in caplog.text


def test_an_epoch_cut_short_by_the_module_loses_nothing(build, trainer):
    class Stops(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 5 else None

    sampler, module = build(), Stops()
    trainer(DataMixingCallback(sampler, environment()), max_steps=12).fit(module, WithoutLength(sampler, batch_size=4))
    assert module.indices == list(range(12 * 4))


def test_epochs_of_a_resumed_run_end_where_they_would_have_ended(build, trainer, tmp_path):
    """Catches a length that follows the mix at the resumption."""
    ends = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ends.append(trainer.global_step)

    def fit(name, max_steps, **settings):
        sampler = build()
        saving = ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=12, filename="{step}", save_top_k=-1)
        running = trainer(
            DataMixingCallback(sampler, environment()), Ends(), saving, max_steps=max_steps, enable_checkpointing=True
        )
        running.fit(Module(), DataLoader(sampler, batch_size=4), **settings)

    fit("whole", 30)
    fit("killed", 14)
    ends.remove(14)
    fit("resumed", 30, ckpt_path=str(tmp_path / "killed" / "step=12.ckpt"))
    assert ends == [20, 30, 20, 30]


# What the Trainer or another callback changes after the sampler was built


class WithLoader(Module):
    """Builds its own loader, of a batch size that others may set."""

    def __init__(self, sampler, sizes=(), batch_size=2):
        super().__init__()
        self.sampler, self.sizes, self.batch_size, self.lr = sampler, list(sizes), batch_size, 0.1

    def train_dataloader(self):
        return MixingDataLoader(self.sampler, self.sizes.pop(0) if self.sizes else self.batch_size)


def test_accumulation_that_a_scheduler_changes_holds_for_the_end(build, trainer):
    """Catches a run that is cut to steps of the first epoch's size: its last step would have fewer batches."""
    for first in (True, False):
        sampler, module = build(policy=None), Module()
        callback, scheduler = DataMixingCallback(sampler), GradientAccumulationScheduler({0: 1, 1: 4})
        callbacks = [callback, scheduler] if first else [scheduler, callback]
        running = trainer(*callbacks, limit_train_batches=8)
        running.fit(module, MixingDataLoader(sampler, batch_size=3))
        assert module.indices == list(range(callback.consumed))
        assert sampler.loader.samples_per_step == 12
        assert callback.consumed == 24 + 48  # of 80; another step would need 12


def test_a_reloaded_loader_may_have_another_batch_size(build, trainer):
    """Catches a count by the batch size of the first epoch."""
    sampler = build(policy=None, exhausted="repeat")
    module = WithLoader(sampler, sizes=[2, 6, 3])
    callback = DataMixingCallback(sampler)
    trainer(callback, limit_train_batches=4, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    assert callback.consumed == 4 * (2 + 6 + 3)
    assert module.indices == list(range(callback.consumed))


class Forgets(Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.indices.clear()


@pytest.mark.parametrize("exhausted", ["repeat", None])
@pytest.mark.parametrize("first", [True, False])
def test_trials_of_a_batch_size_count_as_nothing(build, trainer, exhausted, first):
    """The trials train on batches of the sampler without its callback, and end with another batch size."""
    sampler = build(exhausted=exhausted)
    module, callback = WithLoader(sampler), DataMixingCallback(sampler, environment())
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    callbacks = [callback, finder] if first else [finder, callback]
    trainer(*callbacks, Forgets(), max_steps=6).fit(module)
    assert module.batch_size == 8
    assert callback.consumed == 6 * 8
    assert module.indices == list(range(48))
    assert decided(sampler) == [0, 16, 32, 48]


@pytest.mark.parametrize("exhausted", ["repeat", None])
@pytest.mark.parametrize("first", [True, False])
def test_trials_of_a_learning_rate_are_refused(build, trainer, exhausted, first):
    """Lightning goes on with the iterator of the trials: the run would begin after their samples, and count from 0."""
    sampler = build(exhausted=exhausted)
    callback = DataMixingCallback(sampler, environment())
    finder = LearningRateFinder(num_training_steps=1, early_stop_threshold=None, update_attr=False)
    callbacks = [callback, finder] if first else [finder, callback]
    with pytest.raises(StateError, match="run LearningRateFinder with a Trainer and a sampler of its own"):
        trainer(*callbacks, max_steps=6).fit(WithLoader(sampler))


# How often, how long


@pytest.mark.parametrize("loader", [MixingDataLoader, DataLoader])
def test_decisions_are_spread_over_the_steps_of_the_trainer(build, trainer, caplog, loader):
    sampler, module = build(samples_per_reweight=None, decisions=4, exhausted="repeat"), Module()
    with caplog.at_level(logging.INFO):
        trainer(DataMixingCallback(sampler, environment()), max_steps=12).fit(module, loader(sampler, batch_size=4))
    assert decided(sampler) == [0, 12, 24, 36, 48]
    assert "4 decisions in this run of 48 samples" in caplog.text
    assert "the run ends after 48 samples (step 12) because the trainer stops" in caplog.text
    assert "training ended after 48 samples; used up: nothing" in caplog.text


def test_decisions_are_spread_over_the_epochs_or_the_data(build, trainer, caplog):
    settings = {"samples_per_reweight": None, "decisions": 5, "policy": StaticPolicy(EVEN)}
    for limits, steps in (({"max_epochs": 1}, 20), ({"max_epochs": 2, "limit_train_batches": 5}, 10), ({}, 20)):
        caplog.clear()
        sampler = build(**settings)
        callback = DataMixingCallback(sampler, environment())
        with caplog.at_level(logging.INFO):
            trainer(callback, **limits).fit(Module(), MixingDataLoader(sampler, batch_size=4))
        assert callback.consumed == 4 * steps
        assert f"5 decisions in this run of {4 * steps} samples" in caplog.text


def test_a_resumed_run_keeps_its_interval_with_another_number_of_steps(build, trainer, tmp_path, caplog):
    def fit(max_steps, **given):
        sampler = build(samples_per_reweight=None, decisions=4, exhausted="repeat")
        saving = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=5, filename="{step}", save_top_k=-1)
        callback = DataMixingCallback(sampler, environment())
        running = trainer(callback, saving, max_steps=max_steps, enable_checkpointing=True)
        running.fit(Module(), MixingDataLoader(sampler, batch_size=4), **given)
        return sampler

    fit(12)
    with caplog.at_level(logging.INFO):
        resumed = fit(24, ckpt_path=str(tmp_path / "kept" / "step=10.ckpt"))
    assert decided(resumed) == [0, 12, 24, 36, 48, 60, 72, 84, 96]
    assert "this run keeps that interval: 8 decisions in 96 samples" in caplog.text


# Loaders


@pytest.mark.parametrize("rows", [6, 400])
def test_the_sampler_is_found_among_several_loaders(build, trainer, rows):
    """The other loader is shorter, so that Lightning begins it anew, or longer than the data of the sampler last."""
    sampler, module = build(), Module()
    callback = DataMixingCallback(sampler, environment())
    loaders = {"other": [DataLoader(range(rows), batch_size=2)], "own": DataLoader(sampler, batch_size=4)}
    trainer(callback).fit(module, loaders)
    assert module.indices == list(range(callback.consumed))
    assert callback.consumed == sampler.end > 120
    assert decided(sampler)[:3] == [0, 16, 32]


def test_the_sampler_may_be_the_loader_itself(build, trainer):
    sampler, module = build(), Module()
    module.training_step = lambda batch, batch_idx: (
        module.indices.append(batch["__index__"]) or module(batch["input_ids"][None]).mean()
    )
    trainer(DataMixingCallback(sampler, environment())).fit(module, sampler)
    assert module.indices == list(range(sampler.end))


def test_a_loader_of_another_sampler_is_refused(build, trainer):
    with pytest.raises(ConfigurationError, match=r"none of the Trainer's 1 training loaders \(DataLoader of Agent"):
        trainer(DataMixingCallback(build(), environment())).fit(Module(), DataLoader(build(), batch_size=4))


def test_a_loader_with_a_state_of_its_own_is_refused(build, trainer):
    sampler = build()
    with pytest.raises(ConfigurationError, match="StatefulDataLoader, whose own state"):
        trainer(DataMixingCallback(sampler)).fit(Module(), StatefulDataLoader(sampler, batch_size=4))


def test_a_loader_that_gives_batches_out_of_order_is_refused(build, trainer):
    """What was consumed would be another set of samples than a resumed run leaves out."""
    sampler = build()
    loader = DataLoader(sampler, batch_size=4, num_workers=2, in_order=False)
    with pytest.raises(ConfigurationError, match="in_order=False"):
        trainer(DataMixingCallback(sampler)).fit(Module(), loader)


def test_a_copy_of_the_sampler_in_a_spawned_process_is_refused(build, trainer):
    copy = pickle.loads(pickle.dumps(build()))
    with pytest.raises(ConfigurationError, match="spawn their processes"):
        trainer(DataMixingCallback(copy)).fit(Module(), DataLoader(copy, batch_size=4))


def test_an_iterator_made_before_the_first_decision_is_taken_into_account(build, trainer):
    """The batch that Lightning has fetched by then keeps the old mix, and the ledger says so."""
    sampler, module = build(), MeasuresItsLength()
    running = trainer(DataMixingCallback(sampler, environment()), max_epochs=1, max_steps=4)
    running.fit(module, WithoutLength(sampler, batch_size=4))
    assert module.indices == list(range(16))
    assert next(entry.staleness for entry in sampler.ledger if entry.decided_by == LESS_TARGET.name) == 4


# The module


def test_a_module_that_cannot_be_scored_is_refused_before_training(build, trainer):
    class WithoutForward(Module):
        forward = LightningModule.forward

    sampler = build()
    with pytest.raises(ConfigurationError, match=r"no forward\(input_ids, attention_mask\)"):
        trainer(DataMixingCallback(sampler, environment())).fit(WithoutForward(), DataLoader(sampler))


def test_the_model_to_score_can_be_named(build, trainer):
    class Loss(Module):
        def forward(self, batch):
            return self.network(batch["input_ids"]).square().mean()

        def training_step(self, batch, batch_idx):
            return self(batch)

    class Scored(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask):
            return self.network(input_ids)

    sampler = build()
    callback = DataMixingCallback(sampler, environment(), model=lambda module: Scored(module.network))
    trainer(callback, max_steps=4).fit(Loss(), DataLoader(sampler, batch_size=4))
    assert decided(sampler) == [0, 16]


def test_a_step_that_reads_the_iterator_is_refused(build, trainer):
    class Reads(Module):
        def training_step(self, dataloader_iter):
            return self(next(dataloader_iter)[0]["input_ids"]).mean()

    sampler = build()
    with pytest.raises(ConfigurationError, match="takes dataloader_iter"):
        trainer(DataMixingCallback(sampler)).fit(Reads(), DataLoader(sampler, batch_size=4))


def test_the_model_is_scored_in_the_precision_of_training(build, trainer):
    """Catches an evaluation in float32 of a model that trains in another precision."""
    seen = set()

    class Precise(Module):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids)
            seen.add((self.training, logits.dtype))
            return logits

    sampler = build()
    running = trainer(DataMixingCallback(sampler, environment()), max_steps=4, precision="bf16-mixed")
    running.fit(Precise(), DataLoader(sampler, batch_size=4))
    assert seen == {(False, torch.bfloat16), (True, torch.bfloat16)}


# Decisions and checkpoints


def test_without_a_policy_nothing_is_decided_and_the_end_is_kept(build, trainer, caplog):
    sampler, module = build(policy=None), Module()
    with caplog.at_level(logging.WARNING):
        trainer(DataMixingCallback(sampler, environment())).fit(module, DataLoader(sampler, batch_size=4))
    assert module.indices == list(range(80))
    assert len(sampler.ledger) == 1
    assert "neither agent nor policy" in caplog.text


def save(build, trainer, path, *, with_callback=True, **settings):
    sampler = build()
    running = trainer(*[DataMixingCallback(sampler, environment())][:with_callback], max_steps=6, **settings)
    running.fit(Module(), DataLoader(sampler, batch_size=4))
    running.save_checkpoint(path)
    return sampler


def test_a_checkpoint_made_without_the_callback_is_warned_of(build, trainer, caplog, tmp_path):
    path = str(tmp_path / "bare.ckpt")
    save(build, trainer, path, with_callback=False)
    sampler, module = build(), Module()
    logger = CSVLogger(tmp_path, name="logs", version=0)
    running = trainer(DataMixingCallback(sampler, environment()), max_steps=10, logger=logger)
    with caplog.at_level(logging.WARNING):
        running.fit(module, DataLoader(sampler, batch_size=4), ckpt_path=path)
    assert "was made without DataMixingCallback" in caplog.text
    assert module.indices == list(range(16))
    assert decided(sampler) == [0, 16]
    rows = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    step = rows[0].split(",").index("step")
    assert [row.split(",")[step] for row in rows[1:]] == ["6", "10"]


@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_decides_nothing_twice(build, trainer, tmp_path, late):
    path = str(tmp_path / "saved.ckpt")
    first = save(build, trainer, path)
    sampler, module = build(), Module()
    settings = {"strategy": RestoredLate(device=torch.device("cpu"))} if late else {}
    running = trainer(DataMixingCallback(sampler, environment()), max_steps=10, **settings)
    running.fit(module, WithoutLength(sampler, batch_size=4), ckpt_path=path)
    assert module.indices == list(range(24, 40))
    assert decided(first) == [0, 16]
    assert decided(sampler) == [0, 16, 32]
    assert list(sampler.ledger)[: len(first.ledger)] == list(first.ledger)


def test_a_strategy_that_restores_late_measures_the_base_model_before_the_first_step(build, trainer):
    sampler = build()
    strategy = RestoredLate(device=torch.device("cpu"))
    running = trainer(DataMixingCallback(sampler, environment()), max_steps=4, strategy=strategy)
    running.fit(Module(), WithoutLength(sampler, batch_size=4))
    starts = [(entry.decided_at, entry.start) for entry in sampler.ledger if entry.decided_by == LESS_TARGET.name]
    assert starts == [(0, 4), (16, 20)]  # a batch has been fetched by then


def test_an_iterator_made_before_a_late_restoration_is_refused(build, trainer, tmp_path):
    """Catches a resumed run that trains on the first samples again, in silence."""
    path = str(tmp_path / "saved.ckpt")
    save(build, trainer, path)
    sampler = build()
    strategy = RestoredLate(device=torch.device("cpu"))
    running = trainer(DataMixingCallback(sampler, environment()), max_epochs=2, strategy=strategy)
    with pytest.raises(StateError, match="before the checkpoint's state was restored"):
        running.fit(MeasuresItsLength(), DataLoader(sampler, batch_size=4), ckpt_path=path)


def test_a_damaged_state_in_a_checkpoint_is_refused(build, trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    save(build, trainer, str(path))
    checkpoint = torch.load(path, weights_only=True)  # nothing in it needs pickle
    del checkpoint["callbacks"]["DataMixingCallback"]["sampler"]["ledger"]
    torch.save(checkpoint, path)
    sampler = build()
    with pytest.raises(StateError, match="lacks \\['ledger'\\]"):
        trainer(DataMixingCallback(sampler)).fit(Module(), DataLoader(sampler), ckpt_path=str(path))

"""What a NeMo recipe does with the data module and the callback beside training: its checkpoints' description of them,
validation, limits, and mistakes. Training itself is in the conformance suite.

Runs in the environment of `make test-nemo`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import REPOSITORY
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.testing.on_cpu import cuda_on_cpu

pytest.importorskip("nemo.collections.llm", reason="NeMo 2 with LLM recipes has an environment of its own")

import fiddle as fdl
import lightning.pytorch as pl
import nemo.lightning as nl
import nemo_run as run
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel, local_layer_spec
from nemo.lightning.data import WrappedDataLoader
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from transformers import PreTrainedTokenizerFast

from dmagent_loader.integrations.nemo import AgentWeightedDataModule, DataMixingCallback

LENGTH, MICRO, GLOBAL = 8, 2, 4


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with cuda_on_cpu():
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("shards"), {"source/a": 40, "target/b": 40}, tokens=LENGTH + 1)


def build_sampler(shards, **settings):
    return AgentWeightedSampler(
        shards,
        policy=StaticPolicy([0.25, 0.75]),
        reading=ReadingConfig(progress=False),
        **{"samples_per_reweight": 8, **settings},
    )


def characters(text):
    return [ord(c) % 64 for c in text]


def build_environment():
    pairs = {"general": [("ab", "cd"), ("x", "yz")], "math": [("1+", "2"), ("3", "456")]}
    return Environment.from_pairs(pairs, characters, progress=False, prefix_token_id=0)


def build_data(sampler, kind=AgentWeightedDataModule, **settings):
    sizes = {"seq_length": LENGTH, "micro_batch_size": MICRO, "global_batch_size": GLOBAL}
    return kind(sampler, pin_memory=False, **{**sizes, **settings})


def build_model():
    torch.manual_seed(0)
    config = GPTConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        seq_length=LENGTH,
        vocab_size=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        transformer_layer_spec=local_layer_spec,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=False, clip_grad=0.0)
    return GPTModel(config, optim=nl.MegatronOptimizerModule(optimizer))


def build_trainer(*callbacks, **settings):
    return nl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=nl.MegatronStrategy(process_group_backend="gloo", ckpt_async_save=False),
        callbacks=list(callbacks),
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        **{"enable_checkpointing": False, "max_steps": 4, **settings},
    )


class Watch(pl.Callback):
    """Micro-batches and steps of training, micro-batches of validation."""

    def __init__(self):
        self.trained, self.validated, self.plain = [], 0, None

    def on_fit_start(self, trainer, pl_module):
        """The base model's feedback once more, from its logits."""
        core = trainer.strategy.megatron_parallel[0].module.module

        def model(input_ids, attention_mask):
            positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            return core(input_ids, positions, None)

        self.plain = build_environment().evaluate(model)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(batch["__index__"].tolist())

    def on_validation_batch_end(self, *args):
        self.validated += 1


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    sampler = build_sampler(shards, samples_per_reweight=None, decisions=2)
    data = build_data(sampler, tokenizer=SimpleNamespace(vocab_size=64))  # a tokenizer that NeMo cannot describe
    callback = DataMixingCallback(sampler, build_environment())
    checkpoint = nl.ModelCheckpoint(
        dirpath=str(folder / "checkpoints"), monitor="reduced_train_loss", every_n_train_steps=2, save_last=False
    )
    trainer = build_trainer(callback, enable_checkpointing=True)
    log = nl.NeMoLogger(explicit_log_dir=str(folder / "log"), ckpt=checkpoint)
    llm.train(build_model(), data, trainer, log=log)
    return SimpleNamespace(sampler=sampler, data=data, folder=folder)


def test_a_checkpoints_context_describes_the_data_module_and_not_the_shards(trained):
    """Catches a sampler in the description: NeMo would give up writing it, or could not read it again."""
    context = sorted(trained.folder.glob("checkpoints/*/context"))[-1]
    assert (context / "model.yaml").exists(), "NeMo gave up on describing the run"
    assert "AgentWeightedSampler" not in (context / "io.json").read_text()
    found = nl.io.load_context(context)
    assert found.model.config.hidden_size == 16
    rebuilt = found.extra["datamodule"]
    assert (rebuilt.seq_length, rebuilt.global_batch_size) == (LENGTH, GLOBAL)
    with pytest.raises(ConfigurationError, match="from the context of a checkpoint"):
        rebuilt.sampler  # noqa: B018
    assert any(isinstance(callback, DataMixingCallback) for callback in found.trainer.callbacks)


def test_consumed_samples_are_what_nemo_counts(trained):
    state = trained.data.state_dict()
    assert state["consumed_samples"] == 4 * GLOBAL
    assert json.loads(state["sampler"])["consumed"] == 4 * GLOBAL


def test_decisions_are_spread_over_the_steps_of_the_trainer(trained):
    """4 steps of 4 samples, 2 decisions, and the feedback at the end."""
    assert trained.sampler.samples_per_reweight == 8
    assert [m.consumed for m in trained.sampler.measurements] == [0, 8, 16]


def test_a_state_that_cannot_be_read_is_refused(trained):
    with pytest.raises(StateError, match="cannot be read"):
        trained.data.load_state_dict({"consumed_samples": 8})


def test_other_questions_than_before_the_checkpoint_are_said(trained, caplog):
    callback = DataMixingCallback(trained.sampler, build_environment())
    callback.setup(SimpleNamespace(datamodule=trained.data), None, "fit")
    callback.load_state_dict(callback.state_dict())
    assert "cannot be compared" not in caplog.text
    callback.load_state_dict({"environment": "of other questions"})
    assert "cannot be compared" in caplog.text


def test_a_global_batch_must_fit(trained, shards):
    with pytest.raises(ConfigurationError, match="4 rows is not a multiple of 3 rows on each of 1"):
        build_data(build_sampler(shards), micro_batch_size=3).setup("fit")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        tokens = torch.full((LENGTH,), index)
        seen = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool).tril()
        row = {"tokens": tokens, "labels": tokens, "position_ids": torch.arange(LENGTH), "attention_mask": ~seen}
        return {**row, "loss_mask": torch.ones(LENGTH)}


class WithValidation(AgentWeightedDataModule):
    def val_dataloader(self):
        return WrappedDataLoader(mode="validation", dataset=Rows())


def test_validation_and_limits_are_in_steps(shards):
    """Catches limits that are taken as micro-batches, and a validation that counts as training."""
    sampler, watch = build_sampler(shards), Watch()
    trainer = build_trainer(
        DataMixingCallback(sampler, build_environment()),
        watch,
        limit_val_batches=2,
        val_check_interval=2,
        limit_train_batches=4,
        num_sanity_val_steps=1,
        max_steps=-1,
        max_epochs=1,
    )
    data = build_data(sampler, WithValidation)
    trainer.fit(build_model(), data)
    assert trainer.global_step == 4
    assert data.consumed == 4 * GLOBAL
    assert [indices[-1] for indices in watch.trained] == [3, 7, 11, 15]
    assert watch.validated > 0
    base, *others = sampler.measurements
    assert [base.consumed, *(m.consumed for m in others)] == [0, 8, 16]
    # Megatron's parallel forward and the logits: another mask, shift or padding would show.
    assert base.feedback == pytest.approx(watch.plain, abs=1e-5)


def test_rows_without_what_the_model_needs_are_refused(shards):
    sampler = build_sampler(shards, transform=lambda sample: {"input_ids": torch.zeros(LENGTH, dtype=torch.int64)})
    with pytest.raises(ConfigurationError, match="leave transform out for packed shards"):
        build_trainer().fit(build_model(), build_data(sampler))


def test_the_callback_needs_the_data_modules_sampler(shards):
    sampler, other = build_sampler(shards), build_sampler(shards)
    with pytest.raises(ConfigurationError, match="have two different samplers"):
        build_trainer(DataMixingCallback(other, build_environment())).fit(build_model(), build_data(sampler))


@pytest.fixture
def files_of_the_page(tmp_path, monkeypatch):
    """The working directory with the shards, the questions and the tokenizer that docs/trainers/nemo.md names."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.save_pretrained("meta-llama/Llama-3.2-1B")
    tokenizer.save("tokenizer.json")
    for name in ("mmlu", "math"):
        Path(f"{name}.jsonl").write_text(json.dumps({"question": "a b", "answer": "b"}) + "\n")
    Path("text.jsonl").write_text((json.dumps({"text": "a b a b a b a b"}) + "\n") * 20)
    command = ["shard", "--domain", "source/Science=text.jsonl", "--domain", "target/Science=text.jsonl"]
    command += ["--tokenizer", "tokenizer.json", "--eos-token", "<eos>", "--sequence-length", "9"]
    assert main([*command, "--output", "shards", "--no-progress"]) == 0


@pytest.mark.usefixtures("files_of_the_page")
def test_the_recipe_of_the_page_builds_one_sampler_for_both():
    """Catches copies, as the callback's decisions would not reach the data, and a recipe that cannot be sent on."""
    page = (REPOSITORY / "docs" / "trainers" / "nemo.md").read_text(encoding="utf-8")
    block = page.split("In a recipe of configurations:")[1].split("```")[1].removeprefix("diff\n")
    names = {"llm": llm, "run": run}
    exec("\n".join(line[1:] for line in block.splitlines()), names)
    recipe = names["recipe"]
    ZlibJSONSerializer().serialize(recipe)  # what executors on other machines get
    recipe.trainer.accelerator, recipe.trainer.plugins = "cpu", None  # what this machine lacks
    recipe.model.config.apply_rope_fusion = False
    built = fdl.build(recipe).keywords
    mixing = next(c for c in built["trainer"].callbacks if isinstance(c, DataMixingCallback))
    assert mixing.sampler is built["data"].sampler
    assert mixing.environment.fields == ("general", "math")
    assert built["data"].tokenizer.vocab_size == 3

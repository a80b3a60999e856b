"""The Trainer on text shards packed on the fly: it learns, resumes exactly, and logs the shares of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_shards import END_ID, byte_tokenizer, write_documents
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, PackText, ReadingConfig
from dmagent_loader.errors import StateError
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.transforms import packed_tokens

LENGTH = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    texts = {
        "source/a": [[f"the {n} birds sing in the {m} trees" for n in range(20)] for m in range(3)],
        "target/x": [[" and ".join(f"{n} + {k} = {n + k}" for k in range(n)) for n in range(1, 20)] for _ in range(2)],
    }
    return write_documents(tmp_path_factory.mktemp("text"), texts)


def trainer(folder: Path, shards: dict[str, list[str]], steps: int, length: int = LENGTH, workers: int = 0) -> Trainer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>")
    sampler = AgentWeightedSampler(
        shards,
        policy=StaticPolicy({"source/a": 0.25, "target/x": 0.75}),
        samples_per_reweight=16,
        exhausted="repeat",
        pack=PackText(tokenizer, length),
        transform=packed_tokens,
        reading=ReadingConfig(progress=False, cache_dir=folder / "cache"),
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=END_ID + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=1e-2,
        save_steps=8,
        logging_steps=1,
        dataloader_num_workers=workers,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    environment = Environment.from_pairs({"general": [("the 3 birds", " sing")]}, tokenizer)
    callbacks = [DataMixingCallback(sampler, environment)]
    return Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=sampler, callbacks=callbacks)


def losses(run: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_learns_and_resumes_exactly(tmp_path: Path, shards: dict[str, list[str]], workers: int) -> None:
    whole = trainer(tmp_path / "whole", shards, 24, workers=workers)
    whole.train()
    expected = losses(whole)
    assert expected[24] < 0.7 * expected[1]
    shares = [entry["achieved/target/x"] for entry in whole.state.log_history if "achieved/target/x" in entry]
    assert shares[-1] == pytest.approx(0.75, abs=1 / 16)
    resumed = trainer(tmp_path / "whole", shards, 24, workers=workers)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-8"))
    again = losses(resumed)
    assert {step: again[step] for step in range(9, 25)} == {step: expected[step] for step in range(9, 25)}


def test_a_checkpoint_of_another_length_is_refused(tmp_path: Path, shards: dict[str, list[str]]) -> None:
    trainer(tmp_path, shards, 8).train()
    with pytest.raises(StateError, match="this run has rows of 33 tokens"):
        trainer(tmp_path, shards, 24, length=33).train(resume_from_checkpoint=True)

"""TRL's SFTTrainer, as docs/trainers/huggingface.md shows it: every sample once, decisions, and an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from docs.snippets import blocks_of
from reading import quiet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens

pytest.importorskip("trl")

PAGE = "docs/trainers/huggingface.md"


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, 256)}}
    whole = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>")


def trained(folder: Path, *, steps: int, resume: bool = False) -> dict[str, Any]:
    """Runs the program of the page, up to a step."""
    (block,) = [block for block in blocks_of(PAGE) if "SFTTrainer" in block.code]
    shards = write_toy_shards(folder / "s", {"source/web": 400, "target/math": 200}, tokens=32, vocabulary=256)
    sampler = AgentWeightedSampler(
        shards,
        policy="influence",
        samples_per_reweight=32,
        transform=packed_tokens,
        reading=quiet(folder / "cache"),
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    environment = Environment.from_pairs({"general": [("w3 w4", "w5")], "math": [("w7", "w8 w9")]}, tokenizer())
    names: dict[str, Any] = {
        "__name__": "__main__",
        "model": LlamaForCausalLM(config),
        "sampler": sampler,
        "environment": environment,
        "tokenizer": tokenizer(),
        "DataMixingCallback": DataMixingCallback,
    }
    before = environment.evaluate(names["model"])
    code = block.code.replace('"sft"', repr(str(folder / "sft"))).replace("max_steps=16", f"max_steps={steps}")
    code = code.replace('report_to="none"', 'report_to="none", use_cpu=True, bf16=False, lr_scheduler_type="constant"')
    if resume:
        code = code.replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)")
    exec(compile(code, PAGE, "exec"), names)
    history = names["trainer"].state.log_history
    return {
        "before": before,
        "feedback": [(e["step"], e["env/general"], e["env/math"]) for e in history if "env/math" in e],
        "mixes": [(entry.start, entry.mix, entry.decided_by) for entry in sampler.ledger],
        "achieved": sampler.achieved(0, sampler.consumed),
        "weights": [p.detach().clone() for p in names["model"].parameters()],
    }


def test_the_program_of_the_page_trains_decides_and_resumes_exactly(tmp_path: Path) -> None:
    """SFTTrainer replaces the output layer of the model; the feedback is still that of the model before."""
    whole = trained(tmp_path / "whole", steps=16)
    assert sum(whole["achieved"].values()) == 16 * 8
    assert [step for step, *_ in whole["feedback"]] == [0, 4, 8, 12, 16]
    assert dict(zip(("general", "math"), whole["feedback"][0][1:], strict=True)) == pytest.approx(whole["before"])
    assert {decided_by for *_, decided_by in whole["mixes"][1:]} == {"influence"}

    trained(tmp_path / "parts", steps=8)
    resumed = trained(tmp_path / "parts", steps=16, resume=True)
    assert resumed["achieved"] == whole["achieved"]
    assert resumed["mixes"] == whole["mixes"]
    assert resumed["feedback"] == whole["feedback"]
    assert all(map(torch.equal, resumed["weights"], whole["weights"]))

"""The code of docs/plain-loop.md runs as it stands there, and does what the text beside it says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launching import REPOSITORY
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.transforms import packed_tokens

DOCS = REPOSITORY / "docs" / "plain-loop.md"
BLOCKS = [
    block.replace("64_000", "16") for block in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.M)
]
SETUP, THREE_LINES = BLOCKS[0].rsplit("\n\n", 1)
_, MIXING, ACCELERATE, TORCHDATA = BLOCKS

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300))

    def forward(self, input_ids, attention_mask=None):
        return self.layers(input_ids)


def loss_of(model, tokens):
    return torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Run(dict):
    """The names that the blocks use; counts what is trained on."""

    def __init__(self, work: Path) -> None:
        torch.manual_seed(0)
        model = Model()
        super().__init__(AgentWeightedSampler=AgentWeightedSampler, Environment=Environment, Mixing=Mixing)
        self.update(DataLoader=DataLoader, packed_tokens=packed_tokens, torch=torch, os=os)
        self.update(model=model, optimizer=torch.optim.AdamW(model.parameters()), step=0, world_size=1, resume=False)
        self.update(saved=None, writer=self, train_step=self.train_step, loss_of=self.loss_of)
        self.update(tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json")))
        self.trained: list[list[int]] = []
        self.written: list[tuple[str, int]] = []
        self.last_step: int | None = None
        exec(SETUP, self)

    def loss_of(self, model, tokens) -> Any:
        self.trained.append(tokens[:, 0].tolist())
        if self.last_step == len(self.trained):
            raise KeyboardInterrupt
        return loss_of(model, tokens)

    def train_step(self, batch) -> None:
        self.loss_of(self["model"], batch["input_ids"]).backward()
        self["optimizer"].step()
        self["optimizer"].zero_grad()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, step))

    def decided(self) -> list[int]:
        return [entry.decided_at for entry in self["sampler"].ledger if entry.decided_by != "initial"]


@pytest.fixture
def start(work, monkeypatch):
    monkeypatch.chdir(work)
    (work / "general.jsonl").rename(work / "mmlu.jsonl")
    return lambda: Run(work)


def test_three_lines(start):
    run = start()
    exec(THREE_LINES, run)
    assert run["consumed"] == run["sampler"].end > 64
    assert run.decided()[:4] == [0, 16, 32, 48]


def test_mixing(start):
    whole, killed, resumed = start(), start(), start()
    exec(MIXING, whole)
    assert whole["mixing"].consumed == whole["sampler"].end
    assert ("env/math", 2) in whole.written
    killed.last_step = 8
    with pytest.raises(KeyboardInterrupt):
        exec(MIXING, killed)
    resumed["saved"] = torch.load("checkpoint.pt", weights_only=True)
    exec(MIXING, resumed)
    assert resumed.trained == whole.trained[5:]
    assert resumed.written == [(name, step) for name, step in whole.written if step > 5]
    assert list(resumed["sampler"].ledger) == list(whole["sampler"].ledger)


def test_accelerate(start):
    whole, killed, resumed = start(), start(), start()
    for run in (whole, killed, resumed):
        run["mixing"] = Mixing(run["sampler"], run["environment"])
    whole["Accelerator"] = killed["Accelerator"] = resumed["Accelerator"] = lambda **settings: Accelerator(
        cpu=True, **settings
    )
    exec(ACCELERATE, whole)
    assert whole["mixing"].consumed == whole["sampler"].end
    assert list(Path("runs/mixing").glob("events.out.tfevents.*"))
    killed.last_step = 8
    with pytest.raises(KeyboardInterrupt):
        exec(ACCELERATE, killed)
    resumed["resume"] = True
    exec(ACCELERATE, resumed)
    assert resumed.trained == whole.trained[5:]
    # Not the counter of steps: accelerate saves what is registered.
    assert list(resumed["sampler"].ledger) == list(whole["sampler"].ledger)
    assert all(map(torch.equal, resumed["model"].state_dict().values(), whole["model"].state_dict().values()))


def test_torchdata(start):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    whole, killed, resumed = start(), start(), start()
    for run in (whole, killed, resumed):
        run["StatefulDataLoader"] = loader
    exec(TORCHDATA, whole)
    killed.last_step = 6
    with pytest.raises(KeyboardInterrupt):
        exec(TORCHDATA, killed)
    resumed["saved"] = killed["saved"]
    exec(TORCHDATA, resumed)
    assert resumed.trained == whole.trained[5:]

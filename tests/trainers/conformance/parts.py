"""What the training programs of the conformance suite share: options, data, questions, agent, and what they write.

A program `run_<integration>.py` trains a tiny model with the real trainer and leaves in ``--out``:

- ``seen-<rank>.jsonl``, by data-parallel rank: for each micro-batch, as the model got it, {"step": optimizer steps done
  before, "indices": global sample indices, "keys": crc32 of the rows' keys}. One file for each data-parallel rank.
- ``result-<rank>.json``, by process: {"consumed", "ledger", "end", "global_step", "weights": sum of all parameters,
  "metrics": name -> [[step, value], ...] as the trainer's own logger wrote them, by rank 0 only, or {}}.
- ``checkpoints/``: what the trainer saves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmagent_loader import AgentWeightedSampler, Environment, MixingAgent, ReadingConfig
from dmagent_loader.agent import AgentConfig
from dmagent_loader.mixture.history import FeedbackStatistics

VOCABULARY = 64
ROW_TOKENS = 16


def parser() -> argparse.ArgumentParser:
    """The options that the suite gives to every program; a program may add its own."""
    options = argparse.ArgumentParser()
    options.add_argument("--shards", required=True, help="JSON file with the shards")
    options.add_argument("--out", required=True, type=Path)
    options.add_argument("--workers", type=int, default=0, help="torch data workers of each process")
    options.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    options.add_argument("--batch-size", type=int, default=2, help="of a micro-batch of one data-parallel rank")
    options.add_argument("--steps", type=int, default=12, help="optimizer steps at most")
    options.add_argument("--save-every", type=int, default=0, help="optimizer steps; 0: never")
    options.add_argument("--samples-per-reweight", type=int, default=16)
    options.add_argument("--resume", help="checkpoint to go on from")
    options.add_argument("--data", choices=["exact", "changed"], default="exact", help="at resume; see the sampler")
    options.add_argument("--kill-at", type=int, help="SIGKILL to oneself after so many optimizer steps")
    options.add_argument("--slow-until", type=int, default=0, help="wait a little after each of the first steps")
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--no-agent", action="store_true")
    options.add_argument("--policy", help="name of a policy in place of the agent")
    return options


def build_agent() -> MixingAgent:
    """Random weights: its decisions differ from step to step, and do not matter."""
    torch.manual_seed(7)
    return MixingAgent(AgentConfig(statistics=FeedbackStatistics(mean=(-4.0, -4.0), std=(0.2, 0.2), count=100)))


def causal_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """input_ids and labels (T,), for models that shift the labels themselves."""
    tokens = torch.as_tensor(sample["input_ids.npy"].astype("int64"))
    return {"input_ids": tokens, "labels": tokens, "key": zlib.crc32(sample["__key__"].encode())}


def build_sampler(options: argparse.Namespace, *, transform: Any = causal_row, **settings: Any) -> AgentWeightedSampler:
    return AgentWeightedSampler(
        json.loads(Path(options.shards).read_text()),
        agent=None if options.no_agent or options.policy else build_agent(),
        policy=options.policy,
        samples_per_reweight=options.samples_per_reweight,
        seed=3,
        transform=transform,
        data=options.data,
        reading=ReadingConfig(progress=False, cache_dir=options.out.parent / "cache"),
        **settings,
    )


def build_environment() -> Environment:
    return Environment.from_pairs(
        {
            # Not in the order of the alphabet, in which the Trainer writes JSON: the agent must still tell them apart.
            "math": [("1 + 1", "2"), ("3 * 3", "9 9 9")],
            "general": [("abc def", "ghi"), ("x", "yz yz")],
        },
        lambda text: [ord(c) % VOCABULARY for c in text],
        progress=False,
        prefix_token_id=0,
    )


class TinyModel(torch.nn.Module):
    """A causal model of a few parameters, for trainers that take any module: (B, T) -> logits (B, T, V)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 32)
        self.recurrent = torch.nn.GRU(32, 32, batch_first=True)
        self.dropout = torch.nn.Dropout(dropout)
        self.output = torch.nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embedding(input_ids))
        return self.output(self.dropout(hidden))


def next_token_loss(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


class Recorder:
    """Writes down what is trained on; waits or dies at a step when asked."""

    def __init__(self, options: argparse.Namespace, data_rank: int | None) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        self._file = None if data_rank is None else (options.out / f"seen-{data_rank}.jsonl").open("w")
        self.step = 0

    def batch(self, indices: Sequence[int], keys: Sequence[int]) -> None:
        """A micro-batch reaches the model."""
        if self._file is not None:
            line = {"step": self.step, "indices": [int(i) for i in indices], "keys": [int(key) for key in keys]}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def step_done(self, step: int) -> None:
        """After an optimizer step, and after what the trainer saves at it."""
        self.step = step
        if step <= self.options.slow_until:
            time.sleep(0.05)  # workers fill their prefetch, so that look-ahead is at its bound
        if self.options.kill_at is not None and step >= self.options.kill_at:
            os.kill(os.getpid(), 9)


def tensorboard_metrics(folder: Path) -> dict[str, list[list[float]]]:
    """All scalars of the one run below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    assert len(folders) == 1, f"metrics went to {len(folders)} folders: a writer beside the trainer's"
    events = EventAccumulator(str(folders.pop()), size_guidance={"scalars": 0}).Reload()
    return {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write_result(
    options: argparse.Namespace,
    rank: int,
    sampler: AgentWeightedSampler,
    *,
    consumed: int,
    global_step: int,
    model: torch.nn.Module,
    metrics: Mapping[str, list[list[float]]] | None = None,
    **more: Any,
) -> None:
    result = {
        "consumed": consumed,
        "ledger": sampler.ledger.to_json(),
        "end": sampler.end,
        "global_step": global_step,
        "weights": sum(float(p.detach().double().sum()) for p in model.parameters()),
        "metrics": metrics or {},
        **more,
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(result))


def leave() -> None:
    """The end of a program: leaving a gloo process in the normal way aborts now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

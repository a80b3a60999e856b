"""A training run that can be killed at any moment: what it trains on, and what it leaves for the next process.

`train_plain` is a loop of one's own with the package's own state files, `train_trainer` the Hugging Face Trainer with
its checkpoints. Both decide and save every few steps, so that a large part of their time is spent in decisions and
saves, and both write down each batch as the model gets it, in one call of the system that a kill cannot undo.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import signal
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmagent_loader import AgentWeightedSampler, Environment, MixingDataLoader, ReadingConfig
from dmagent_loader._files import write_atomically
from dmagent_loader._loading.mailbox import Mailbox
from dmagent_loader._run.state import load_state, save_state
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.mixture.plan import Plan

VOCABULARY = 64
BATCH = 4
ROWS = {"source/web": 300, "source/books": 200, "target/math": 4000, "target/proofs": 60}
PHASES = ("start", "read", "train", "decide", "publish", "save", "end")
POINTS = ("replace", "fsync", "half", "propose", "append", "publish", "read", "train", "torch.save", "state.json")
"""Exact points at which a process can kill itself, before or after; a kill after `half` or `state.json` leaves half of
the file that was being written."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, over all its processes.

    Args:
        folder: Of all that it leaves.
        shards: File with the shards.
        workers: Torch data workers.
        steps: Optimizer steps.
        trainer: Through the Hugging Face Trainer.
    """

    folder: Path
    shards: Path
    workers: int
    steps: int
    trainer: bool = False


@dataclass(frozen=True, kw_only=True)
class Kill:
    """An exact moment: the `number`-th time that `point` is reached in a process."""

    point: str
    number: int
    after: bool


class Moments:
    """Knows what the process is doing, in memory that outlives it, and kills it when it is told to.

    Args:
        path: Of the shared memory: one byte for the phase, then a counter of each point.
        kill: None: never.
    """

    def __init__(self, path: Path, kill: Kill | None) -> None:
        path.touch()
        os.truncate(path, 1 + 4 * len(POINTS))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._kill, self._counts = kill, Counter[str]()
        self._memory[0] = PHASES.index("start")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._memory[0]
        self._memory[0] = PHASES.index(name)
        yield
        self._memory[0] = before

    def finish(self) -> None:
        self._memory[0] = PHASES.index("end")

    @contextmanager
    def point(self, name: str) -> Iterator[bool]:
        """Yields whether this is where the process is to end; it then ends before, or after what is inside."""
        self._counts[name] += 1
        place = 1 + 4 * POINTS.index(name)
        self._memory[place : place + 4] = self._counts[name].to_bytes(4, "little")
        now = self._kill is not None and (self._kill.point, self._kill.number) == (name, self._counts[name])
        if now and not self._kill.after:
            os.kill(os.getpid(), signal.SIGKILL)
        yield now
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, attribute: str, point: str, phase: str | None = None) -> None:
        """Makes a function of the package or of the system one of the points."""
        original = getattr(owner, attribute)

        def wrapped(*args: Any, **settings: Any) -> Any:
            if phase is None:
                with self.point(point):
                    return original(*args, **settings)
            with self.phase(phase), self.point(point):
                return original(*args, **settings)

        setattr(owner, attribute, wrapped)


def read_phase(path: Path) -> str:
    """What a process was doing when it ended; one that ended at once has written nothing."""
    data = path.read_bytes() if path.exists() else b""
    return PHASES[data[0] if data else 0]


def read_counts(path: Path) -> dict[str, int]:
    """How often a process reached each point."""
    data = path.read_bytes()
    return {name: int.from_bytes(data[1 + 4 * i : 5 + 4 * i], "little") for i, name in enumerate(POINTS)}


class Moves:
    """A mix that depends on all that was trained on and measured, so that a lost sample changes every later one."""

    name = "moves"

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def propose(self, history: Any) -> Any:
        with self._moments.point("propose"):
            weights = 0.2 + history.mixes.mean(axis=0) + abs(history.feedback.sum()) * (1 + len(history) % 3)
            weights[len(history) % len(weights)] *= 3
            return weights / weights.sum()


class Log:
    """What was trained on, one line for each batch."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def batch(self, step: int, indices: Any, keys: Any) -> None:
        line = {"process": os.getpid(), "step": step, "indices": [int(i) for i in indices], "keys": list(keys)}
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())


def build_sampler(run: Run, moments: Moments, transform: Callable[[Any], Any]) -> AgentWeightedSampler:
    return AgentWeightedSampler(
        json.loads(run.shards.read_text()),
        policy=Moves(moments),
        samples_per_reweight=4 * BATCH,
        seed=11,
        exhausted={"target/proofs": "redistribute", "target/math": "repeat"},
        transform=transform,
        reading=ReadingConfig(
            progress=False,
            cache_dir=run.folder / "cache",
        ),
    )


def build_environment() -> Environment:
    pairs = {"general": [("abc def", "ghi"), ("x", "yz")], "math": [("1+1", "2"), ("3*3", "9")]}
    return Environment.from_pairs(
        pairs, lambda text: [ord(c) % VOCABULARY for c in text], progress=False, prefix_token_id=0
    )


def watch(moments: Moments) -> None:
    moments.wrap(os, "replace", "replace")
    moments.wrap(os, "fsync", "fsync")
    moments.wrap(os, "preadv", "read")
    moments.wrap(Plan, "append", "append", "publish")
    moments.wrap(Mailbox, "publish", "publish", "publish")
    flush = os.fsync

    def cut_in_two(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with moments.point("half") as now:
                if now:
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        flush(descriptor)

    os.fsync = cut_in_two


class Tiny(torch.nn.Module):
    """(B, T) -> logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 16)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.embedding(input_ids).cumsum(dim=1))


def train_plain(run: Run, moments: Moments) -> None:
    """A plain loop; its state is one JSON file that names the file with the weights."""
    watch(moments)
    transform = _tokens
    mixing = Mixing(build_sampler(run, moments, transform), build_environment())
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step, path = 0, run.folder / "state.json"
    if path.exists():
        saved = load_state(path)
        weights = torch.load(run.folder / saved["weights"], weights_only=True)
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(weights["optimizer"])
        mixing.load_state_dict(saved["mixing"])
        step = saved["step"]
    log = Log(run.folder / "trained.jsonl")
    loader = MixingDataLoader(mixing.sampler, batch_size=BATCH, num_workers=run.workers)
    mixing.begin()
    batches = None
    while True:
        with moments.phase("decide"):
            if mixing.due():
                mixing.reweight(lambda environment: environment.evaluate(model))
        if step and step % 3 == 0:
            with moments.phase("save"):
                _save(run, path, step, model, optimizer, mixing)
        if step >= run.steps:
            break
        with moments.phase("read"):
            batches = iter(loader) if batches is None else batches
            batch = next(batches)
        with moments.phase("train"):
            log.batch(step, batch["__index__"], batch["__key__"])
            tokens = batch["input_ids"]
            with moments.point("train"):
                loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        mixing.consumed += BATCH
    _result(run, mixing, model)
    moments.finish()


def _save(run: Run, path: Path, step: int, model: Any, optimizer: Any, mixing: Mixing) -> None:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    weights = run.folder / f"weights-{step}.pt"
    write_atomically(weights, buffer.getvalue())
    save_state(path, {"step": step, "weights": weights.name, "mixing": mixing.state_dict()})
    for other in run.folder.glob("weights-*.pt"):
        if other != weights:
            other.unlink()


def _tokens(sample: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": torch.as_tensor(sample["input_ids.npy"].astype("int64"))}


def _labelled(sample: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.as_tensor(sample["input_ids.npy"].astype("int64"))
    return {"input_ids": tokens, "labels": tokens, "row": int(sample["__key__"].rsplit("_", 1)[1])}


def train_trainer(run: Run, moments: Moments) -> None:
    """The Hugging Face Trainer, with its own checkpoints."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

    from dmagent_loader.integrations.huggingface import DataMixingCallback, last_whole_checkpoint

    watch(moments)
    log = Log(run.folder / "trained.jsonl")

    class Recording(TrainerCallback):
        """Reads the tags of each batch as the model gets it."""

        step = 0

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.step = state.global_step
            model.register_forward_pre_hook(self.record, with_kwargs=True)

        def record(self, module, args, kwargs):
            indices, rows = kwargs.pop("__index__", None), kwargs.pop("row", None)
            if indices is not None:
                log.batch(self.step, indices.tolist(), rows.tolist())
            return args, kwargs

        def on_step_end(self, args, state, control, **kwargs):
            self.step = state.global_step

    class Phased(Trainer):
        def training_step(self, *args, **kwargs):
            with moments.phase("train"), moments.point("train"):
                return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            with moments.phase("save"):
                return super()._save_checkpoint(*args, **kwargs)

    moments.wrap(torch, "save", "torch.save")
    moments.wrap(Mixing, "reweight", "propose", "decide")

    def in_place(self: Any, path: str) -> None:
        with moments.point("state.json") as now:
            write_in_place(self, path)
            if now:
                os.truncate(path, os.path.getsize(path) // 2)

    write_in_place = TrainerState.save_to_json
    TrainerState.save_to_json = in_place
    sampler = build_sampler(run, moments, _labelled)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    callback = DataMixingCallback(sampler, build_environment())
    arguments = TrainingArguments(
        output_dir=str(run.folder / "checkpoints"),
        max_steps=run.steps,
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=run.workers,
        report_to=[],
        save_steps=3,
        save_total_limit=2,
        logging_steps=1000,
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
        remove_unused_columns=False,
    )
    trainer = Phased(model=model, args=arguments, train_dataset=sampler, callbacks=[callback, Recording()])
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(arguments.output_dir))
    _result(run, callback._mixing, model)
    moments.finish()


def _result(run: Run, mixing: Mixing, model: torch.nn.Module) -> None:
    result = {
        "consumed": mixing.consumed,
        "ledger": mixing.sampler.ledger.to_json(),
        "weights": sum(float(p.detach().double().sum()) for p in model.parameters()),
    }
    write_atomically(run.folder / "result.json", json.dumps(result).encode())

"""Feedback for every step of every trajectory, from batched proxies (paper, C.2; design section 8.3).

Trajectories are worked off in groups, one batched model for each. After every step the group's file is replaced as a
whole, so a run that is killed loses one step of one group, and continues with the same numbers as without the break.

Shapes: M trajectories, T steps, K fields, G trajectories of a group.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as serialize
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.history import FeedbackStatistics
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.pipeline.proxies import ProxyConfig, ProxyTrainer
from dmagent_loader.pipeline.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.pipeline.streams import TrajectoryStream
from dmagent_loader.pipeline.trajectories import Trajectories, TrajectoryConfig
from dmagent_loader.simplex import FloatArray, IntArray

SCHEMA = "feedback/1"
"""Kind and version of the file; raised when an older reader would misunderstand a newer one."""


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """Settings of the collection.

    Args:
        proxy: Size and optimiser of a proxy.
        questions: Which pairs are asked after each step.
        row_tokens: Tokens of a training row.
        proxies_at_once: Trajectories in one batched model. More suits a GPU; the result does not depend on it.
        seed: Of the data streams.
    """

    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    row_tokens: int = 128
    proxies_at_once: int = 24
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FeedbackRecord:
    """Trajectories with the feedback after each step: what agents are trained on.

    Args:
        trajectories: The mixes.
        fields: K names.
        feedback: (M, T + 1, K) mean log-probability per answer token in nats; row 0 is the untrained proxy's, rows
            after the end of a trajectory are NaN.
        losses: (M, T + 1) mean training loss of each step in nats per token; NaN at row 0 and after the end.
        seconds: Time spent on training and scoring proxies.
        settings: How it was collected, with the fingerprints of corpus and questions.
    """

    trajectories: Trajectories
    fields: tuple[str, ...]
    feedback: FloatArray
    losses: FloatArray
    seconds: float
    settings: dict[str, Any]

    @property
    def num_feedbacks(self) -> int:
        """Evaluations of trained proxies; the untrained one's is not counted."""
        return int(self.trajectories.lengths.sum())

    def statistics(self) -> FeedbackStatistics:
        """Mean and std of each field over all steps of all trajectories, start states included (paper, C.3)."""
        return FeedbackStatistics.of(self.feedback[np.isfinite(self.feedback).all(axis=-1)])

    def save(self, path: Path) -> None:
        """Writes one safetensors file; settings are JSON in its header."""
        arrays = {
            "mixes": self.trajectories.mixes,
            "lengths": self.trajectories.lengths,
            "candidates": self.trajectories.candidates,
            "target_distribution": self.trajectories.target_distribution,
            "feedback": self.feedback,
            "losses": self.losses,
        }
        meta = {
            "schema": SCHEMA,
            "fields": json.dumps(self.fields),
            "seconds": repr(self.seconds),
            "settings": json.dumps(self.settings, sort_keys=True),
            "trajectory_settings": json.dumps(asdict(self.trajectories.config), sort_keys=True),
        }
        partial = path.with_suffix(".partial")
        partial.write_bytes(serialize(arrays, metadata=meta))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> FeedbackRecord:
        """Reads what `save` wrote.

        Raises:
            StateError: Another schema.
        """
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("schema") != SCHEMA:
                raise StateError(f"{path} has schema {meta.get('schema')}, not {SCHEMA}: collect the feedback again")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        feedback, losses = arrays.pop("feedback"), arrays.pop("losses")
        return cls(
            trajectories=Trajectories(**arrays, config=TrajectoryConfig.from_json(meta["trajectory_settings"])),
            fields=tuple(json.loads(meta["fields"])),
            feedback=feedback,
            losses=losses,
            seconds=float(meta["seconds"]),
            settings=json.loads(meta["settings"]),
        )


def collect_feedback(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    config: FeedbackConfig,
    directory: Path,
    *,
    progress: bool = True,
) -> FeedbackRecord:
    """Trains a proxy from scratch along each trajectory and scores it after every step.

    Args:
        trajectories: What to train along.
        corpus: Tokens of the 52 domains.
        questions: Asked after each step; also of the untrained proxy.
        config: Settings.
        directory: For partial results; a second call with the same arguments goes on from them.
        progress: Whether to show a progress bar.

    Raises:
        StateError: `directory` holds partial results of other settings or data.
        ConfigurationError: Sizes that do not fit each other.
    """
    rows_per_step, rest = divmod(trajectories.config.tokens_per_step, config.row_tokens)
    if rest or rows_per_step % config.proxy.rows_per_update:
        raise ConfigurationError(
            f"tokens_per_step {trajectories.config.tokens_per_step} is no multiple of row_tokens {config.row_tokens} x "
            f"rows_per_update {config.proxy.rows_per_update}: choose one that is"
        )
    vocabulary = corpus.tokenizer().get_vocab_size()
    if vocabulary > config.proxy.vocab_size:
        raise ConfigurationError(
            f"the tokenizer has {vocabulary} tokens, the proxies {config.proxy.vocab_size}: make them equal"
        )
    settings = {
        "collection": asdict(config),
        "corpus": corpus.fingerprint,
        "trajectories": trajectories.fingerprint,
        "questions": questions.fingerprint,
    }
    _claim(directory, settings)
    groups = [
        np.arange(first, min(first + config.proxies_at_once, len(trajectories.lengths)), dtype=np.int64)
        for first in range(0, len(trajectories.lengths), config.proxies_at_once)
    ]
    parts = []
    with tqdm(total=int(trajectories.lengths.sum()), desc="feedback", unit="step", disable=not progress) as bar:
        for number, members in enumerate(groups):
            path = directory / f"group-{number:04d}.safetensors"
            parts.append(_collect_group(trajectories, members, corpus, questions, config, rows_per_step, path, bar))
    return FeedbackRecord(
        trajectories=trajectories,
        fields=questions.fields,
        feedback=np.concatenate([part["feedback"].numpy() for part in parts]),
        losses=np.concatenate([part["losses"].numpy() for part in parts]),
        seconds=float(sum(float(part["seconds"]) for part in parts)),
        settings={
            **settings,
            "corpus_facts": dict(corpus.facts),
            "num_questions": questions.num_questions,
            "question_tokens": questions.num_tokens,
            "proxy_parameters": config.proxy.num_parameters,
        },
    )


def _collect_group(
    trajectories: Trajectories,
    members: IntArray,
    corpus: Corpus,
    questions: ProxyQuestions,
    config: FeedbackConfig,
    rows_per_step: int,
    path: Path,
    bar: Any,
) -> dict[str, torch.Tensor]:
    """Works off one group from where its file stands; returns the finished file's tensors."""
    lengths = trajectories.lengths[members]
    steps = int(trajectories.config.steps)
    trainer = ProxyTrainer(len(members), config.proxy)
    if path.exists():
        record = load_file(str(path))
        if "proxy.updates" in record:
            trainer.load_state({k.removeprefix("proxy."): v for k, v in record.items() if k.startswith("proxy.")})
    else:
        record = {
            "feedback": torch.full((len(members), steps + 1, len(questions.fields)), torch.nan, dtype=torch.float64),
            "losses": torch.full((len(members), steps + 1), torch.nan, dtype=torch.float64),
            "seconds": torch.zeros((), dtype=torch.float64),
            "step": torch.zeros((), dtype=torch.int64),
        }
        record["feedback"][:, 0] = torch.from_numpy(questions.feedback(trainer.model))
    record = {name: value for name, value in record.items() if not name.startswith("proxy.")}
    done = int(record["step"])
    bar.update(int(np.minimum(lengths, done).sum()))
    last = int(lengths.max())
    if done == last:
        return record
    streams = [
        TrajectoryStream(
            corpus,
            trajectories.mixes[number, : lengths[i] + 1],
            rows_per_step=rows_per_step,
            row_tokens=config.row_tokens,
            seed=config.seed,
            number=int(number),
        )
        for i, number in enumerate(members)
    ]
    # A proxy leaves the batch when its trajectory ends. A loaded state holds those that were active in its last step.
    active = np.flatnonzero(lengths >= max(done, 1))
    for step in range(done + 1, last + 1):
        started = time.perf_counter()
        staying = np.flatnonzero(lengths[active] >= step)
        trainer.keep(staying.tolist())
        active = active[staying]
        rows = np.stack([streams[i].rows(step) for i in active])
        record["losses"][active, step] = trainer.train(torch.from_numpy(rows)).double()
        record["feedback"][active, step] = torch.from_numpy(questions.feedback(trainer.model))
        record["step"] += 1
        record["seconds"] += time.perf_counter() - started
        state = {} if step == last else {f"proxy.{name}": value for name, value in trainer.state().items()}
        partial = path.with_suffix(".partial")
        save_file({**record, **state}, str(partial))
        partial.replace(path)
        bar.update(len(active))
    return record


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    """Makes the directory this collection's, or refuses one that belongs to another."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if found.get(key) != json.loads(text)[key]]
        if differing:
            raise StateError(
                f"{directory} holds feedback collected with other {', '.join(differing)}: continuing would mix "
                "two collections; use the old settings, or another directory"
            )
        return
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

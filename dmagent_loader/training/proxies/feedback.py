"""Feedback after every step of every trajectory, from batched proxies (paper, C.2).

A group of trajectories is trained as one batched model and is one unit of work: a pure function of the settings, whose
file is replaced as a whole after every step. A run that is killed loses one step of its unfinished groups and
continues with the numbers of an uninterrupted run.

Shapes: M trajectories, T steps, K fields, G trajectories of a group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.bases import BaseConfig
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.run_folder import claim, save_tensors
from dmagent_loader.training.trajectories import Trajectories

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """Settings of the collection.

    Args:
        bases: Base models that the proxies start from.
        proxy: Size and optimiser of a proxy.
        questions: Selection of the question-answer pairs.
        row_tokens: Tokens of a training row.
        proxies_at_once: Trajectories in one batched model: few on a CPU, whose caches they share, all on a GPU. The
            result does not depend on it, to float tolerance.
        seed: Seed of the data streams.
    """

    bases: BaseConfig = field(default_factory=BaseConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    row_tokens: int = 128
    proxies_at_once: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The inputs of all units of work, which are sent to other processes and machines.

    Args:
        trajectories: Mixes to train on.
        corpus: Tokens of the 52 domains.
        questions: Environment that scores the proxies.
        config: Settings.
        bases: Weights of the base models, (S, ...) each; trajectory m starts from number ``trajectories.starts[m]``.
        directory: Folder for partial results.
        device: See `ProxyTrainer`.
        evaluate_every: Number of steps between two scores; the last step is always scored, other feedback is NaN.
    """

    trajectories: Trajectories
    corpus: Corpus
    questions: ProxyQuestions
    config: FeedbackConfig
    bases: Mapping[str, Tensor]
    directory: Path
    device: str
    evaluate_every: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the results depend on."""
        settings = {
            "collection": asdict(self.config),
            "corpus": self.corpus.fingerprint,
            "trajectories": self.trajectories.fingerprint,
            "questions": self.questions.fingerprint,
        }
        # Omitted if it is 1, as in every recorded set.
        return settings if self.evaluate_every == 1 else {**settings, "evaluate_every": self.evaluate_every}

    @property
    def groups(self) -> list[IntArray]:
        """Trajectory numbers of each unit.

        The sets alternate, so that the finished groups are a fair sample at any time. Trajectories of a group have
        similar lengths, because the longest determines its time.
        """
        per_set = self.trajectories.config.trajectories_per_set
        at_once = self.config.proxies_at_once
        dealt: list[list[IntArray]] = []
        for first in range(0, len(self.trajectories.lengths), per_set):
            members = first + np.argsort(self.trajectories.lengths[first : first + per_set], kind="stable")
            parts = [members[i : i + at_once].astype(np.int64) for i in range(0, len(members), at_once)]
            order = np.random.default_rng(self.config.seed).permutation(len(parts))
            dealt.append([parts[i] for i in order])
        return [part for turn in zip(*dealt, strict=True) for part in turn]

    def work(self, number: int) -> dict[str, Tensor]:
        """Trains one group, starting from the state in its file if there is one; returns the tensors of its result."""
        # Checked by each worker: on another machine the folder may be a different one.
        claim(self.directory, self.settings, "feedback")
        members = self.groups[number]
        trajectories, config, questions = self.trajectories, self.config, self.questions
        path = self.directory / f"group-{number:04d}.safetensors"
        lengths, steps = trajectories.lengths[members], trajectories.config.steps
        start = {name: tensor[trajectories.starts[members]] for name, tensor in self.bases.items()}
        trainer = ProxyTrainer(len(members), config.proxy, start=start, device=self.device)
        record = _saved(path)
        if record is not None:
            if "proxy.updates" in record:
                trainer.load_state({k.removeprefix("proxy."): v for k, v in record.items() if k.startswith("proxy.")})
        else:
            shape = (len(members), steps + 1)
            record = {
                "feedback": torch.full((*shape, len(questions.fields)), torch.nan, dtype=torch.float64),
                "losses": torch.full(shape, torch.nan, dtype=torch.float64),
                "seconds": torch.zeros((), dtype=torch.float64),
                "step": torch.zeros((), dtype=torch.int64),
            }
            record["feedback"][:, 0] = torch.from_numpy(questions.feedback(trainer.averaged))
        record = {name: value for name, value in record.items() if not name.startswith("proxy.")}
        done, last = int(record["step"]), int(lengths.max())
        rows_per_step = trajectories.config.tokens_per_step // config.row_tokens
        streams = [
            TrajectoryStream(
                self.corpus,
                trajectories.mixes[number, : lengths[i] + 1],
                rows_per_step=rows_per_step,
                row_tokens=config.row_tokens,
                seed=config.seed,
                number=int(number),
            )
            for i, number in enumerate(members)
        ]
        # A proxy leaves the batch after its trajectory ends. A loaded state holds the proxies of its last step.
        active = np.flatnonzero(lengths >= max(done, 1))
        for step in range(done + 1, last + 1):
            started = time.perf_counter()
            staying = np.flatnonzero(lengths[active] >= step)
            trainer.keep(staying.tolist())
            active = active[staying]
            rows = np.stack([streams[i].rows(step) for i in active])
            record["losses"][active, step] = trainer.train(torch.from_numpy(rows)).double()
            if step % self.evaluate_every == 0 or (lengths[active] == step).any():
                record["feedback"][active, step] = torch.from_numpy(questions.feedback(trainer.averaged))
            record["step"] += 1
            record["seconds"] += time.perf_counter() - started
            state = {} if step == last else {f"proxy.{name}": value for name, value in trainer.state().items()}
            # Flushing to disk took as long as a step; losing a state costs only the work of its group.
            save_tensors(path, {**record, **state}, durable=step == last)
        return record

    def collect(self, workers: Workers | None, *, progress: bool) -> tuple[FloatArray, FloatArray, float]:
        """Computes all units.

        Args:
            workers: Number and place of the workers; None: this process.
            progress: Whether to show a progress bar.

        Returns:
            Feedback (M, T + 1, K), losses (M, T + 1) and seconds as in `FeedbackRecord`, in the order of the
            trajectories.
        """
        groups = self.groups
        sizes = [int(self.trajectories.lengths[members].sum()) for members in groups]
        parts = (workers or Workers()).run(self, sizes, progress=progress)
        order = np.argsort(np.concatenate(groups))
        feedback, losses = (
            np.concatenate([part[name].numpy() for part in parts])[order] for name in ("feedback", "losses")
        )
        return feedback, losses, sum(float(part["seconds"]) for part in parts)


def _saved(path: Path) -> dict[str, Tensor] | None:
    """Contents of a group's file; None if it does not exist or was damaged by a loss of power."""
    if not path.exists():
        return None
    try:
        record: dict[str, Tensor] = load_file(str(path))
    except SafetensorError as error:
        logger.warning("%s cannot be read (%s): its group starts from the beginning", path, error)
        return None
    return record


def collect_feedback(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    bases: Mapping[str, Tensor],
    config: FeedbackConfig,
    directory: Path,
    *,
    workers: Workers | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> FeedbackRecord:
    """Trains a proxy along each trajectory and scores it after every step.

    Args:
        trajectories: Mixes to train on.
        corpus: Tokens of the 52 domains.
        questions: Environment that scores the proxies and the base models.
        bases: Weights of the base models, see `dmagent_loader.training.proxies.bases.train_bases`.
        config: Settings.
        directory: Folder for partial results; a second call with the same arguments continues from them.
        workers: Number and place of the workers; None: this process.
        device: Device of a worker's proxies, see `ProxyTrainer`.
        progress: Whether to show a progress bar.

    Raises:
        StateError: `directory` holds partial results of other settings or data.
        ConfigurationError: A step does not divide into updates, or the tokenizer has more tokens than the proxies.
    """
    rows_per_step, rest = divmod(trajectories.config.tokens_per_step, config.row_tokens)
    if rest or rows_per_step % config.proxy.rows_per_update:
        raise ConfigurationError(
            f"tokens_per_step {trajectories.config.tokens_per_step} is not a multiple of row_tokens "
            f"{config.row_tokens} x rows_per_update {config.proxy.rows_per_update}: choose one that is"
        )
    vocabulary = corpus.tokenizer().get_vocab_size()
    if vocabulary > config.proxy.vocab_size:
        raise ConfigurationError(
            f"the tokenizer has {vocabulary} tokens, the proxies {config.proxy.vocab_size}: make them equal"
        )
    collection = Collection(
        trajectories=trajectories,
        corpus=corpus,
        questions=questions,
        config=config,
        bases=bases,
        directory=directory.resolve(),
        device=device,
    )
    settings = collection.settings
    claim(directory, settings, "feedback")
    feedback, losses, seconds = collection.collect(workers, progress=progress)
    return FeedbackRecord(
        trajectories=trajectories,
        fields=questions.fields,
        feedback=feedback,
        losses=losses,
        seconds=seconds,
        settings={
            **settings,
            "corpus_facts": dict(corpus.facts),
            "num_questions": questions.num_questions,
            "question_tokens": questions.num_tokens,
            "proxy_parameters": config.proxy.num_parameters,
        },
    )

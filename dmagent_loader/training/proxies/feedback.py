"""Feedback for every step of every trajectory, from batched proxies (paper, C.2; design section 8.3).

Trajectories are worked off in groups, one batched model for each. A group is a unit of work: a pure function of the
settings, whose file is replaced as a whole after every step. A run that is killed loses one step of the groups that
were worked on, and continues with the same numbers as without the break; a unit done twice gives the same numbers.

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
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.bases import BaseConfig
from dmagent_loader.training.proxies.model import ProxyConfig, ProxyTrainer
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.run_folder import claim, save_tensors
from dmagent_loader.training.trajectories import Trajectories

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """Settings of the collection.

    Args:
        bases: What the proxies start from.
        proxy: Size and optimiser of a proxy.
        questions: Which pairs are asked after each step.
        row_tokens: Tokens of a training row.
        proxies_at_once: Trajectories in one batched model: few on a CPU, whose caches they share, all on a GPU. The
            result does not depend on it, to float tolerance.
        seed: Of the data streams.
    """

    bases: BaseConfig = field(default_factory=BaseConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    row_tokens: int = 128
    proxies_at_once: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Everything that a unit of work needs; it is what travels to other processes and machines.

    Args:
        trajectories: What to train along.
        corpus: Tokens of the 52 domains.
        questions: Asked after each step.
        config: Settings.
        bases: Weights of the base models, (S, ...) each; trajectory m starts from number ``trajectories.starts[m]``.
        directory: For partial results.
        device: See `ProxyTrainer`.
        evaluate_every: Score after each how many-th step, and after the last; the feedback of the others is NaN.
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
        """Everything that the numbers depend on."""
        settings = {
            "collection": asdict(self.config),
            "corpus": self.corpus.fingerprint,
            "trajectories": self.trajectories.fingerprint,
            "questions": self.questions.fingerprint,
        }
        # Not named where it is 1, as in every recorded set.
        return settings if self.evaluate_every == 1 else {**settings, "evaluate_every": self.evaluate_every}

    @property
    def groups(self) -> list[IntArray]:
        """Trajectory numbers of each unit.

        Trajectories are dealt out over the sets in turn: what is done after a while is a fair sample of all. Within a
        group, lengths are alike, because a group takes as long as its longest.
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
        """Works off one group from where its file stands; returns the finished file's tensors."""
        # Here too: another machine may have a folder of its own at this place, or an old one.
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
        # A proxy leaves the batch when its trajectory ends. A loaded state holds those that were active in its last
        # step.
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
            # Waiting for the disk after every step took as long as the step; a lost state only costs its group.
            save_tensors(path, {**record, **state}, durable=step == last)
        return record


def _saved(path: Path) -> dict[str, Tensor] | None:
    """What a group's file holds; None where there is none, or one that a loss of power has damaged."""
    if not path.exists():
        return None
    try:
        record: dict[str, Tensor] = load_file(str(path))
    except SafetensorError as error:
        logger.warning("%s cannot be read (%s): its group begins anew", path, error)
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
        trajectories: What to train along.
        corpus: Tokens of the 52 domains.
        questions: Asked after each step; also of the base models.
        bases: Weights of the base models, see `dmagent_loader.training.proxies.bases.train_bases`.
        config: Settings.
        directory: For partial results; a second call with the same arguments goes on from them.
        workers: Who does the work; None: this process.
        device: Where a worker's proxies lie, see `ProxyTrainer`.
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
    groups = collection.groups
    sizes = [int(trajectories.lengths[members].sum()) for members in groups]
    parts = (workers or Workers()).run(collection, sizes, progress=progress)
    numbers = np.concatenate(groups)
    order = np.argsort(numbers)
    return FeedbackRecord(
        trajectories=trajectories,
        fields=questions.fields,
        feedback=np.concatenate([part["feedback"].numpy() for part in parts])[order],
        losses=np.concatenate([part["losses"].numpy() for part in parts])[order],
        seconds=float(sum(float(part["seconds"]) for part in parts)),
        settings={
            **settings,
            "corpus_facts": dict(corpus.facts),
            "num_questions": questions.num_questions,
            "question_tokens": questions.num_tokens,
            "proxy_parameters": config.proxy.num_parameters,
        },
    )

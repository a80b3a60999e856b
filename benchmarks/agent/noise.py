"""Signal-to-noise ratio of the feedback for several ways of scoring (extension).

Several runs of each of a few mixes differ only in their rows. Differences between runs of one mix are noise,
differences between mixes are signal. A way of scoring with less noise costs nothing.

Shapes: S target shares, R runs of each, P = S * R proxies, K fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.agent.stream_numbers import NOISE
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Settings of the measurement.

    Args:
        shares: Target shares of the S mixes between start state and target distribution.
        runs: R, runs of each mix.
        steps: Number of steps, all with the same mix.
        tokens_per_step: Tokens of a step.
        row_tokens: Tokens of a training row.
        proxy: Size and optimiser of a proxy, which must average its weights.
        num_questions: Largest numbers of questions of a field; each of them is measured.
        question_tokens: Longest pair; longer ones are left out.
        seed: Seed of the rows.

    Raises:
        ConfigurationError: There are fewer than two shares or runs, or the proxy does not average its weights.
    """

    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    runs: int = 4
    steps: int = 40
    tokens_per_step: int = 4096
    row_tokens: int = 128
    proxy: ProxyConfig = field(
        default_factory=lambda: ProxyConfig(rows_per_update=4, learning_rate=1.5e-3, warmup_updates=20, averaging=0.95)
    )
    num_questions: tuple[int, ...] = (40, 160)
    question_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shares) < 2 or self.runs < 2:
            raise ConfigurationError(
                f"{len(self.shares)} shares with {self.runs} runs each: spread needs two or more of both"
            )
        if not self.proxy.averaging:
            raise ConfigurationError(
                "averaging is 0: raw and averaged weights would be the same; give a positive value"
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Signal and noise of one way of scoring.

    Args:
        field: Field of the questions.
        cloze: Whether choices were left out.
        score: Scored part of a pair.
        num_questions: Number of questions.
        averaged: Whether averaged weights were scored.
        means: (S,), mean feedback at each share in nats.
        between: Standard deviation of those means.
        within: Standard deviation between runs of one mix.
    """

    field: str
    cloze: bool
    score: Literal["answer", "pair"]
    num_questions: int
    averaged: bool
    means: FloatArray
    between: float
    within: float

    @property
    def ratio(self) -> float:
        """Signal over noise; infinite if the runs do not differ."""
        return self.between / self.within if self.within > 0 else float("inf")


def measure_noise(
    corpus: Corpus,
    files: Mapping[str, Path],
    base: Mapping[str, Tensor] | None,
    config: NoiseConfig,
    *,
    device: str = "cpu",
    on_step: Callable[[], object] | None = None,
) -> list[Measured]:
    """Trains all runs at once and scores them in every way.

    Args:
        corpus: Tokens of the 52 domains.
        files: Field -> its question file.
        base: Weights of one base model, (1, ...) each; None: untrained.
        config: Settings.
        device: See `ProxyTrainer`.
        on_step: Called after each step, for a progress bar.
    """
    total = len(config.shares) * config.runs
    start = None if base is None else {name: tensor.expand(total, *tensor.shape[1:]) for name, tensor in base.items()}
    trainer = ProxyTrainer(total, config.proxy, start=start, device=device)
    streams = [
        TrajectoryStream(
            corpus,
            np.tile((1 - share) * corpus.start_state + share * corpus.target_distribution, (config.steps + 1, 1)),
            rows_per_step=config.tokens_per_step // config.row_tokens,
            row_tokens=config.row_tokens,
            seed=config.seed,
            number=NOISE + i * config.runs + run,
        )
        for i, share in enumerate(config.shares)
        for run in range(config.runs)
    ]
    for step in range(1, config.steps + 1):
        trainer.train(torch.from_numpy(np.stack([stream.rows(step) for stream in streams])))
        if on_step is not None:
            on_step()
    tokenizer = corpus.tokenizer()
    return [
        measured
        for questions in _ways(config)
        for measured in _measured(trainer, ProxyQuestions.from_files(files, tokenizer, questions), questions, config)
    ]


def _ways(config: NoiseConfig) -> Iterator[QuestionConfig]:
    plain = QuestionConfig(max_tokens=config.question_tokens, batch_tokens=2048)
    for number in config.num_questions:
        for cloze in (False, True):
            yield replace(plain, max_questions=number, cloze=cloze, score="answer")
            yield replace(plain, max_questions=number, cloze=cloze, score="pair")


def _measured(
    trainer: ProxyTrainer, questions: ProxyQuestions, way: QuestionConfig, config: NoiseConfig
) -> Iterator[Measured]:
    for averaged, model in ((False, trainer.model), (True, trainer.averaged)):
        feedback = questions.feedback(model).reshape(len(config.shares), config.runs, -1)
        means, variances = feedback.mean(axis=1), feedback.var(axis=1, ddof=1)
        for k, name in enumerate(questions.fields):
            yield Measured(
                field=name,
                cloze=way.cloze,
                score=way.score,
                num_questions=questions.num_questions[name],
                averaged=averaged,
                means=means[:, k],
                between=float(means[:, k].std(ddof=1)),
                within=float(np.sqrt(variances[:, k].mean())),
            )


def noise_table(measured: Sequence[Measured], shares: Sequence[float]) -> str:
    """A Markdown table, ordered by ratio within each field; duplicate ways (a file without choices) appear once."""
    header = "".join(f" at {share:g} |" for share in shares)
    lines = [
        f"| field | choices | scored | questions | weights |{header} between mixes | within a mix | ratio |",
        "|---|---|---|---:|---|" + "---:|" * (len(shares) + 3),
    ]
    seen: set[str] = set()
    for row in sorted(measured, key=lambda row: (row.field, -row.ratio, row.cloze)):
        means = "".join(f" {mean:.3f} |" for mean in row.means)
        figures = (
            f"{row.score} | {row.num_questions} | {'averaged' if row.averaged else 'raw'} |{means} {row.between:.4f} | "
            f"{row.within:.4f} | {row.ratio:.1f} |"
        )
        if f"{row.field} {figures}" not in seen:
            lines.append(f"| {row.field} | {'left out' if row.cloze else 'listed'} | {figures}")
        seen.add(f"{row.field} {figures}")
    return "\n".join(lines)

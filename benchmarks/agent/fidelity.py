"""Proxy fidelity: agreement of proxies of different sizes about the ranking of trajectories (extension).

An agent learns from proxies far smaller than the models it is used on. This is sound only if a mix that is better for a
small proxy is also better for a larger one. Proxies of several sizes are trained along the same trajectories, each size
from its own base models and on its own rows, and the ranks of their scores are correlated. The same size on other rows
shows how much of a low correlation is noise.

Shapes: M trajectories, T steps, K fields, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.agent.rank_correlation import spearman
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import train_bases
from dmagent_loader.training.proxies.feedback import Collection, FeedbackConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.trajectories import Trajectories


@dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Settings of one size.

    Args:
        feedback: Settings of proxies, base models, questions and data streams, as in a collection.
        evaluate_every: Number of steps between two scores; the last step is always scored.
    """

    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    evaluate_every: int = 10


def spread_sample(trajectories: Trajectories, per_set: int) -> IntArray:
    """Numbers of some trajectories of each set, spread over start states and over each set's lengths.

    Args:
        trajectories: M trajectories.
        per_set: Number of trajectories to choose from each set.

    Returns:
        (sets * per_set,), ascending.

    Raises:
        ConfigurationError: A set has fewer trajectories.
    """
    if not 1 <= per_set <= trajectories.config.trajectories_per_set:
        raise ConfigurationError(
            f"{per_set} trajectories of each set were requested, but a set has "
            f"{trajectories.config.trajectories_per_set}: request 1 to {trajectories.config.trajectories_per_set}"
        )
    states = np.unique(trajectories.starts)
    chosen: list[int] = []
    for number, candidates in enumerate(trajectories.config.candidates_per_step):
        members = trajectories.members(candidates)
        members = members[np.argsort(trajectories.lengths[members], kind="stable")]
        left = [list(members[trajectories.starts[members] == state]) for state in states]
        for i in range(per_set):
            # Each set starts at the state after the last one of the previous set, so that states are equally frequent.
            turn = (number * per_set + i) % len(states)
            queue = next(q for q in left[turn:] + left[:turn] if q)
            chosen.append(int(queue.pop(i * len(queue) // per_set)))
    return np.array(sorted(chosen), dtype=np.int64)


def score_trajectories(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    config: FidelityConfig,
    directory: Path,
    *,
    workers: Workers | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> FloatArray:
    """Trains proxies of one size along trajectories, from base models of that size.

    Args:
        trajectories: M trajectories; see `Trajectories.subset` and `spread_sample`.
        corpus: Tokens of the 52 domains.
        questions: Question sets that score the proxies.
        config: Settings of the size.
        directory: Folder for partial results; a second call with the same arguments continues from them.
        workers: Number and place of the workers; None: this process.
        device: See `ProxyTrainer`.
        progress: Whether to show progress bars.

    Returns:
        (M, T + 1, K), feedback in nats; NaN after the end and at steps without a score.

    Raises:
        StateError: `directory` holds partial results of other settings or data.
    """
    # Only the start states of these trajectories, renumbered.
    _, firsts, starts = np.unique(trajectories.starts, return_index=True, return_inverse=True)
    states = trajectories.mixes[firsts, 0]
    feedback = config.feedback
    weights = train_bases(
        corpus,
        states,
        feedback.bases,
        feedback.proxy,
        directory / "bases",
        row_tokens=feedback.row_tokens,
        device=device,
        progress=progress,
    )
    collection = Collection(
        trajectories=replace(trajectories, starts=starts.astype(np.int64)),
        corpus=corpus,
        questions=questions,
        config=config.feedback,
        bases=weights,
        directory=directory.resolve() / "feedback",
        device=device,
        evaluate_every=config.evaluate_every,
    )
    scores, _, _ = collection.collect(workers, progress=progress)
    return scores


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Rank correlations of two scores of the same trajectories.

    Args:
        count: Number of trajectories.
        spearman: Spearman's rank correlation.
        low: Lower end of its 95% bootstrap interval over trajectories.
        high: Upper end of that interval.
        kendall: Kendall's tau-b.
        partial: Spearman's partial correlation given a third quantity; here the share of target data, which explains
            much of any score.
    """

    count: int
    spearman: float
    low: float
    high: float
    kendall: float
    partial: float


def agreement(x: FloatArray, y: FloatArray, third: FloatArray, *, resamples: int = 2000, seed: int = 0) -> Agreement:
    """Correlates two scores of the same trajectories; trajectories where either is NaN are left out.

    Args:
        x: (M,), scores of one size.
        y: (M,), scores of the other size.
        third: (M,), quantity that the partial correlation controls for.
        resamples: R.
        seed: Seed of the bootstrap.

    Raises:
        ConfigurationError: Fewer than 4 trajectories have both scores.
    """
    both = np.isfinite(x) & np.isfinite(y)
    x, y, third = x[both], y[both], third[both]
    if len(x) < 4:
        raise ConfigurationError(f"{len(x)} trajectories have both scores: ranks need 4 or more")
    drawn = np.random.default_rng(seed).integers(0, len(x), size=(resamples, len(x)))
    # A resample that consists of copies of one trajectory has no correlation.
    low, high = np.nanpercentile(spearman(x[drawn], y[drawn]), [2.5, 97.5])
    xy, xz, yz = (float(spearman(a, b)) for a, b in ((x, y), (x, third), (y, third)))
    rest = (1 - xz**2) * (1 - yz**2)
    return Agreement(
        count=len(x),
        spearman=xy,
        low=float(low),
        high=float(high),
        kendall=float(stats.kendalltau(x, y).statistic),
        partial=(xy - xz * yz) / rest**0.5 if rest > 0 else float("nan"),
    )


def with_mean(feedback: FloatArray) -> FloatArray:
    """Appends the mean over fields of the standardised feedback, which the agent's reward is made of.

    Args:
        feedback: (M, T + 1, K); each field is standardised over all values that are not NaN.

    Returns:
        (M, T + 1, K + 1).
    """
    mean, std = np.nanmean(feedback, axis=(0, 1)), np.nanstd(feedback, axis=(0, 1))
    return np.concatenate([feedback, ((feedback - mean) / std).mean(axis=-1, keepdims=True)], axis=-1)


def fidelity_table(
    trajectories: Trajectories,
    feedback: Mapping[str, FloatArray],
    fields: tuple[str, ...],
    *,
    steps: tuple[int, ...] = (),
) -> str:
    """A Markdown table of the agreement between each pair of sizes.

    There are three kinds of score: the last one, the gain over the base model's at the end, and the gain at equal
    steps. Gains are needed because different base models start at different scores, which by themselves rank the
    trajectories alike.

    Args:
        trajectories: M trajectories.
        feedback: Name of a size -> (M, T + 1, K); only steps that all sizes have scored are used.
        fields: Names of the K fields.
        steps: Steps at which gains are compared.
    """
    shared = np.all([np.isfinite(scores).all(axis=-1) for scores in feedback.values()], axis=0)
    scores = {name: with_mean(np.where(shared[..., None], values, np.nan)) for name, values in feedback.items()}
    rows, last = np.arange(len(trajectories.lengths)), trajectories.lengths
    share = np.array([trajectories.mixes[m, 1 : n + 1, NUM_TOPICS:].sum(axis=-1).mean() for m, n in enumerate(last)])
    lines = [
        "| sizes | score | field | trajectories | Spearman | 95% interval | Kendall | Spearman without target share |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    names = list(scores)
    for one, other in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        kinds = {"at the end": [scores[name][rows, last] for name in (one, other)]}
        kinds["gain at the end"] = [scores[name][rows, last] - scores[name][:, 0] for name in (one, other)]
        for step in steps:
            kinds[f"gain at step {step}"] = [scores[name][:, step] - scores[name][:, 0] for name in (one, other)]
        for kind, (x, y) in kinds.items():
            for k, name in enumerate((*fields, "mean")):
                found = agreement(x[:, k], y[:, k], share)
                lines.append(
                    f"| {one}, {other} | {kind} | {name} | {found.count} | {found.spearman:.2f} | "
                    f"{found.low:.2f} to {found.high:.2f} | {found.kendall:.2f} | {found.partial:.2f} |"
                )
    return "\n".join(lines)

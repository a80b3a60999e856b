"""The model card of an agent trained by this pipeline, and the report of a run: figures from the results only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dmagent_loader.pipeline.feedback import FeedbackRecord
from dmagent_loader.pipeline.rollout import Rollout
from dmagent_loader.pipeline.sft import HeldOutError, SFTResult
from dmagent_loader.pipeline.trajectories import Trajectories
from dmagent_loader.simplex import FloatArray, IntArray, js_divergence


def model_card(record: FeedbackRecord, result: SFTResult, rollouts: Mapping[str, Rollout], notes: str) -> str:
    """The README.md of the checkpoint.

    Args:
        record: What the agent was trained on.
        result: The training.
        rollouts: What the agent does: title -> closed loop.
        notes: What the text is and under which licences, and what else should be said; Markdown sections.
    """
    config = record.trajectories.config
    return f"""---
library_name: dmagent-loader
license: other
tags: [data-mixing, continual-pre-training]
---

# Data mixing agent, supervised warm-up only, preview

A Transformer of {result.agent.num_parameters():,} parameters that reads the mixes used so far over 52 domains and the
feedback after each, and proposes the next mix (arXiv 2507.15640, section 3). It was trained on a small scale, so that
the package has weights that can be run, checked and repeated in minutes. It is **not** the paper's agent.

## What it is not

- No reinforcement learning: it imitates the trajectories that a hand-written score prefers (Algorithm 1), whatever they
  do to a model. The paper's agent is trained further with conservative Q-learning on all trajectories.
- Its feedback comes from proxies of {record.settings["proxy_parameters"] / 1e6:.2f}M parameters, trained on at most
  {config.steps * config.tokens_per_step:,} tokens; the paper's have 50M. They say little about single topics.
- It has seen one start state (the shares of the source documents, no target data), one target field, one pair of
  question sets ({", ".join(record.fields)}), and no history of more than {config.steps} steps.
- Nobody has shown that it makes a model better than a fixed mix does. It is for trying the machinery.

## How it was trained

{training_table(record, result)}

The recorded set (mixes, feedback, training losses, settings) lies beside this page in `recorded.safetensors`;
`dmagent_loader.pipeline.feedback.FeedbackRecord.load` reads it.

## Next-mix error on {len(result.test)} held-out expert trajectories

{error_table(result.error)}

Squared distance between predicted and actual mix, averaged over steps. Neither training nor the choice of the weights
saw these trajectories. {comparison(result.error)}

## What it does

{rollout_section(rollouts, record.fields)}

{notes.strip()}
"""


def training_table(record: FeedbackRecord, result: SFTResult) -> str:
    """Sizes and settings of the trajectories, the proxies, the feedback and the agent's training."""
    settings, trajectories, config = record.settings, record.trajectories, record.trajectories.config
    proxy, facts, statistics = settings["collection"]["proxy"], settings["corpus_facts"], record.statistics()
    asked = ", ".join(f"{name} {number}" for name, number in settings["num_questions"].items())
    spread = ", ".join(
        f"{name} {mean:.4f} ± {std:.4f}"
        for name, mean, std in zip(record.fields, statistics.mean, statistics.std, strict=True)
    )
    rows = {
        "trajectories": f"{len(trajectories.lengths)}: {config.trajectories_per_set} for each number of candidates per "
        f"step in {', '.join(f'{n:,}' for n in config.candidates_per_step)}",
        "steps": f"at most {config.steps}, mean {trajectories.lengths.mean():.1f}; {config.tokens_per_step:,} tokens a "
        f"step; a trajectory ends when {config.target_tokens:,} target tokens are used",
        "feedbacks": f"{record.num_feedbacks:,}: one after every step of every trajectory",
        "proxies": f"{settings['proxy_parameters']:,} parameters each: LLaMA blocks, width {proxy['width']}, "
        f"{proxy['layers']} layers, vocabulary {proxy['vocab_size']}, from scratch, AdamW {proxy['learning_rate']:g}",
        "tokens trained": f"{record.num_feedbacks * config.tokens_per_step:,} over all proxies",
        "questions": f"{asked}: pairs of at most {settings['collection']['questions']['max_tokens']} tokens; "
        f"{settings['question_tokens']:,} tokens in each evaluation",
        "feedback": f"{spread}: mean ± std of {statistics.count:,} values, start states included; in nats",
        "time": f"{record.seconds / 60:.1f} minutes for the feedback on one CPU core, shared with other work",
        "topics of target documents": f"linear classifier; {facts['classifier_accuracy']:.1%} of "
        f"{facts['classifier_held_out_documents']:,} held-out *source* documents right; on target documents unknown",
        "agent": f"next-mix squared error (Eq. 4) on {len(result.training)} trajectories of the set with "
        f"{config.candidates_per_step[-1]:,} candidates; weights after {result.best_update} updates, the best "
        f"of {len(result.validation_curve)} looks at {len(result.validation)} validation trajectories",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def report(record: FeedbackRecord, result: SFTResult, rollouts: Mapping[str, Rollout]) -> str:
    """What a run found, as Markdown tables: coverage, feedback, error, what the agent does."""
    return f"""# Report

## Trajectories by set

{coverage_table(record)}

Target share: summed weight of the 26 target domains, mean over the trajectories that reach the step. Score terms: mean
Jensen-Shannon divergence to the mix before, and to the target distribution.

## Feedback by set, at the last step of each trajectory

{final_feedback_table(record)}

## What moves the feedback

{response_table(record)}

Pearson correlations over all {record.num_feedbacks:,} recorded steps.

## Validation during training

| updates | training error | validation error |
|---:|---:|---:|
{chr(10).join(f"| {u} | {a:.5f} | {b:.5f} |" for u, a, b in result.validation_curve)}

Kept: the weights after {result.best_update} updates.

## Next-mix error on {len(result.test)} test trajectories

{error_table(result.error)}

## What the agent does

{rollout_section(rollouts, record.fields)}
"""


def comparison(error: HeldOutError) -> str:
    """The held-out error in relation to the baselines, as a sentence."""
    last, mean = error.agent.mean() / error.repeat_last.mean(), error.agent.mean() / error.mean_at_step.mean()
    return f"The agent has {last:.2f} times the error of repeating the last mix, {mean:.2f} times that of the mean mix."


def error_table(error: HeldOutError) -> str:
    """Held-out errors of the agent and the baselines, mean and spread over trajectories."""
    rows = [
        ("agent", error.agent),
        ("repeat the last mix", error.repeat_last),
        ("mean training mix at that step", error.mean_at_step),
    ]
    lines = ["| proposal | mean squared error | std over trajectories | worst trajectory |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {e.mean():.5f} | {e.std():.5f} | {e.max():.5f} |" for name, e in rows]
    return "\n".join(lines)


def rollout_section(rollouts: Mapping[str, Rollout], fields: tuple[str, ...]) -> str:
    """Titled tables of closed loops."""
    parts = []
    for title, rollout in rollouts.items():
        changes = rollout.changes().mean(axis=0)
        parts.append(
            f"**{title[0].upper()}{title[1:]}** ({len(rollout.mixes)} proxies, real feedback at every step):\n\n"
            f"{rollout.table(fields)}\n\n"
            f"Mean total variation between its proposals and those it would make with every feedback at its mean: "
            f"{rollout.without_feedback.mean():.3f} (largest {rollout.without_feedback.max():.3f}). "
            f"From one mix to the next: {changes.mean():.3f} (largest {changes.max():.3f}, at step "
            f"{int(changes.argmax()) + 1})."
        )
    return "\n\n".join(parts)


def coverage_table(record: FeedbackRecord) -> str:
    """Where the trajectories of each set lie in the action space."""
    trajectories = record.trajectories
    share = trajectories.target_share()
    steps = sorted({1, *range(4, share.shape[1], 4)})
    lines = [
        "| candidates per step | mean length | "
        + " | ".join(f"step {t}" for t in steps)
        + " | change | distance to target |",
        "|---:|---:|" + "---:|" * (len(steps) + 2),
    ]
    for candidates in trajectories.config.candidates_per_step:
        members = trajectories.members(candidates)
        shares = " | ".join(_mean(share[members, t]) for t in steps)
        change, distance = _score_terms(trajectories, members)
        length = trajectories.lengths[members].mean()
        lines.append(f"| {candidates:,} | {length:.1f} | {shares} | {change:.3f} | {distance:.3f} |")
    return "\n".join(lines)


def final_feedback_table(record: FeedbackRecord) -> str:
    """Feedback after the last step, by set."""
    lines = ["| candidates per step | " + " | ".join(record.fields) + " |", "|---:|" + "---:|" * len(record.fields)]
    start = " | ".join(f"{x:.3f}" for x in record.feedback[0, 0])
    for candidates in record.trajectories.config.candidates_per_step:
        members = record.trajectories.members(candidates)
        final = record.feedback[members, record.trajectories.lengths[members]]
        cells = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(final.mean(axis=0), final.std(axis=0), strict=True))
        lines.append(f"| {candidates:,} | {cells} |")
    return "\n".join([*lines, f"| untrained proxy | {start} |"])


def response_table(record: FeedbackRecord) -> str:
    """How feedback goes with the step, and, among trajectories at the same step, with the mean target share so far."""
    trajectories = record.trajectories
    share = trajectories.target_share()[:, 1:]
    so_far = np.cumsum(share, axis=1) / np.arange(1, share.shape[1] + 1)
    reached = np.isfinite(share)
    steps = np.broadcast_to(np.arange(1.0, share.shape[1] + 1), share.shape)
    lines = ["| field | with the step | with the mean target share so far, at the same step |", "|---|---:|---:|"]
    for k, name in enumerate(record.fields):
        feedback = record.feedback[:, 1:, k]
        with_step = _correlation(steps[reached], feedback[reached])
        with_share = _correlation(_within_steps(so_far, reached), _within_steps(feedback, reached))
        lines.append(f"| {name} | {with_step:.2f} | {with_share:.2f} |")
    return "\n".join(lines)


def _within_steps(values: FloatArray, reached: npt.NDArray[np.bool_]) -> FloatArray:
    """(M, T) values that were reached, less the mean of their step, in one line."""
    counts = np.maximum(reached.sum(axis=0), 1)
    means = np.where(reached, values, 0.0).sum(axis=0) / counts
    return np.asarray((values - means)[reached], dtype=np.float64)


def _correlation(x: FloatArray, y: FloatArray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def _mean(values: FloatArray) -> str:
    present = values[np.isfinite(values)]
    return f"{present.mean():.2f}" if len(present) else "-"


def _score_terms(trajectories: Trajectories, members: IntArray) -> tuple[float, float]:
    """Mean divergence of each step's mix to the one before, and to the target distribution."""
    change, distance = [], []
    for number in members:
        mixes = trajectories.mixes[number, : trajectories.lengths[number] + 1]
        change.append(js_divergence(mixes[1:], mixes[:-1]))
        distance.append(js_divergence(mixes[1:], trajectories.target_distribution))
    return float(np.concatenate(change).mean()), float(np.concatenate(distance).mean())

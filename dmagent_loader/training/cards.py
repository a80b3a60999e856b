"""Model cards and reports, from what was run: every figure comes from the recorded set or from the training."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from dmagent_loader.mixture.simplex import FloatArray, IntArray, js_divergence
from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.train import CQLResult
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.sft import HeldOutError, SFTResult
from dmagent_loader.training.trajectories import Trajectories

FRONT_MATTER = """---
library_name: dmagent-loader
license: other
tags: [data-mixing, continual-pre-training]
---
"""


def sft_card(record: FeedbackRecord, result: SFTResult, notes: str) -> str:
    """The README.md of an agent after the supervised warm-up.

    Args:
        record: What the agent was trained on.
        result: The training.
        notes: What the text is and under which licences, and what else should be said; Markdown sections.
    """
    return f"""{FRONT_MATTER}
# Data mixing agent, supervised warm-up

A Transformer of {result.agent.num_parameters():,} parameters that reads the mixes used so far over 52 domains and the
feedback after each, and proposes the next mix (arXiv 2507.15640, section 3). This one imitates the trajectories that
the score of Algorithm 1 prefers, whatever they do to a model; it is where reinforcement learning starts, and the
paper's ablation.

## How it was trained

{_table({**record_rows(record), **sft_rows(record, result)})}

## Next-mix error on {len(result.test)} held-out expert trajectories

{error_table(result.error)}

Squared distance between predicted and actual mix, averaged over steps. Neither training nor the choice of the weights
saw these trajectories. {comparison(result.error)}

{_limits(record)}

{notes.strip()}
"""


def cql_card(record: FeedbackRecord, config: CQLConfig, result: CQLResult, notes: str) -> str:
    """The README.md of an agent after Conservative Q-Learning.

    Args:
        record: What the agent was trained on.
        config: Settings of the training.
        result: The training.
        notes: As in `sft_card`.
    """
    return f"""{FRONT_MATTER}
# Data mixing agent, Conservative Q-Learning

A Transformer of {result.agent.num_parameters():,} parameters that reads the mixes used so far over 52 domains and the
feedback after each, and proposes the next mix (arXiv 2507.15640, section 3). After a supervised warm-up it was trained
offline, on recorded trajectories of every quality, to propose what raises the feedback of both fields. Its critics lie
in ``critic/``; they are not needed to use it.

## How it was trained

{_table({**record_rows(record), **cql_rows(config, result)})}

{_limits(record)}

{notes.strip()}
"""


def record_card(record: FeedbackRecord, notes: str) -> str:
    """The README.md beside a recorded set.

    Args:
        record: The set.
        notes: As in `sft_card`.
    """
    count, steps = len(record.trajectories.lengths), record.trajectories.config.steps
    return f"""# Recorded set: mixing trajectories with feedback

{count} mixing trajectories over 52 domains (26 topics x source and target field), drawn by Algorithm 1 of
arXiv 2507.15640, with the feedback of a proxy language model after each step: what data mixing agents are trained on.
``recorded.safetensors`` holds the arrays, its header the settings as JSON;
`dmagent_loader.training.record.FeedbackRecord.load` reads it, and
``dmagent train-agent cql --recorded recorded.safetensors --output DIR`` trains both agents from it, without any text.

| array | shape | what |
|---|---|---|
| mixes | ({count}, {steps + 1}, 52) | row 0: start state; row t: mix of step t; 0 after the end |
| feedback | ({count}, {steps + 1}, {len(record.fields)}) | {", ".join(record.fields)}, nats per scored token; \
row 0: base model; NaN after the end |
| losses | ({count}, {steps + 1}) | mean training loss of each step, nats per token |
| lengths, candidates, starts | ({count},) | steps; candidates per step (the set); number of the start state |
| target_distribution | (52,) | that the score pulls to |

## How it was collected

{_table(record_rows(record))}

## Trajectories by set

{coverage_table(record)}

Target share: summed weight of the 26 target domains, mean over the trajectories that reach the step. Score terms: mean
Jensen-Shannon divergence to the mix before, and to the target distribution.

## Feedback by set, at the last step of each trajectory

{final_feedback_table(record)}

## What moves the feedback

{response_table(record)}

Pearson correlations over all {record.num_feedbacks:,} recorded steps.

{notes.strip()}
"""


def record_rows(record: FeedbackRecord) -> dict[str, str]:
    """Sizes and settings of trajectories, base models, proxies and feedback: name -> text."""
    settings, trajectories, config = record.settings, record.trajectories, record.trajectories.config
    collection, facts, statistics = settings["collection"], settings["corpus_facts"], record.statistics()
    proxy, bases, questions = collection["proxy"], collection["bases"], collection["questions"]
    asked = ", ".join(f"{name} {number}" for name, number in settings["num_questions"].items())
    spread = ", ".join(
        f"{name} {mean:.4f} ± {std:.4f}"
        for name, mean, std in zip(record.fields, statistics.mean, statistics.std, strict=True)
    )
    scored = "question and answer" if questions["score"] == "pair" else "the answer"
    form = ", multiple choice as stem and right choice" if questions["cloze"] else ""
    start = (
        f"{bases['models']} base models, each trained on {bases['tokens']:,} source tokens of a start state of its own"
    )
    return {
        "trajectories": f"{len(trajectories.lengths)}: {config.trajectories_per_set} for each number of candidates per "
        f"step in {', '.join(f'{n:,}' for n in config.candidates_per_step)}",
        "steps": f"at most {config.steps}, mean {trajectories.lengths.mean():.1f}; {config.tokens_per_step:,} tokens a "
        f"step; a trajectory ends when {config.target_tokens:,} target tokens are used",
        "start": start if bases["tokens"] else f"untrained proxies; {bases['models']} start states",
        "feedbacks": f"{record.num_feedbacks:,}: one after every step of every trajectory",
        "proxies": f"{settings['proxy_parameters']:,} parameters each: LLaMA blocks, width {proxy['width']}, "
        f"{proxy['layers']} layers, vocabulary {proxy['vocab_size']}, AdamW {proxy['learning_rate']:g}; scored with a "
        f"moving average of the weights ({proxy['averaging']:g})",
        "tokens trained": f"{record.num_feedbacks * config.tokens_per_step:,} over all proxies",
        "questions": f"{asked}: pairs of at most {questions['max_tokens']} tokens, {scored} scored{form}; "
        f"{settings['question_tokens']:,} tokens in each evaluation",
        "feedback": f"{spread}: mean ± std of {statistics.count:,} values, start states included; nats per token",
        "time": f"{record.seconds / 3600:.2f} hours of one worker for training and scoring the proxies",
        "topics of target documents": f"linear classifier; {facts['classifier_accuracy']:.1%} of "
        f"{facts['classifier_held_out_documents']:,} held-out *source* documents right; on target documents unknown",
    }


def sft_rows(record: FeedbackRecord, result: SFTResult) -> dict[str, str]:
    """What the warm-up did: name -> text."""
    return {
        "agent": f"next-mix squared error (Eq. 4) on {len(result.training)} expert trajectories; weights after "
        f"{result.best_update} updates, the best of {len(result.validation_curve)} looks at {len(result.validation)} "
        f"validation trajectories; standardisation {result.agent.config.standardization}"
    }


def cql_rows(config: CQLConfig, result: CQLResult) -> dict[str, str]:
    """What Conservative Q-Learning did: name -> text."""
    changed = ", ".join(f"{name} {value:g}" for name, value in asdict(config).items())
    return {
        "agent": f"Conservative Q-Learning (Eq. 5-7) on {len(result.trajectories)} trajectories, "
        f"{result.seconds:.0f} s; standardisation {result.agent.config.standardization}",
        "settings": changed,
    }


def sft_report(record: FeedbackRecord, result: SFTResult) -> str:
    """The curve and the held-out error of a warm-up, as Markdown tables."""
    return f"""# Supervised warm-up

| updates | training error | validation error |
|---:|---:|---:|
{chr(10).join(f"| {u} | {a:.5f} | {b:.5f} |" for u, a, b in result.validation_curve)}

Kept: the weights after {result.best_update} updates. On {len(result.test)} test trajectories:

{error_table(result.error)}
"""


def cql_report(result: CQLResult) -> str:
    """The curve of Conservative Q-Learning, as a Markdown table."""
    # Some are only there once the actor moves.
    names = list(dict.fromkeys(name for row in result.curve for name in row))
    rows = [" | ".join(f"{row[name]:.4g}" if name in row else "" for name in names) for row in result.curve]
    return (
        f"# Conservative Q-Learning\n\n| {' | '.join(names)} |\n|{'---:|' * len(names)}\n"
        + "".join(f"| {row} |\n" for row in rows)
        + f"\n{result.seconds:.0f} s.\n"
    )


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _limits(record: FeedbackRecord) -> str:
    config = record.trajectories.config
    return f"""## Limits

- Its feedback comes from proxies of {record.settings["proxy_parameters"] / 1e6:.2f}M parameters, trained on at most
  {config.steps * config.tokens_per_step:,} tokens; the paper's have 50M.
- It has seen one target field, one pair of question sets ({", ".join(record.fields)}) and
  {record.settings["collection"]["bases"]["models"]} start states; no history of more than {config.steps} steps."""


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


def coverage_table(record: FeedbackRecord) -> str:
    """Where the trajectories of each set lie in the action space."""
    trajectories = record.trajectories
    share = trajectories.target_share()
    every = max(4, (share.shape[1] - 1) // 8)
    steps = sorted({1, *range(every, share.shape[1], every)})
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
    start = " | ".join(f"{x:.3f}" for x in record.feedback[:, 0].mean(axis=0))
    for candidates in record.trajectories.config.candidates_per_step:
        members = record.trajectories.members(candidates)
        final = record.feedback[members, record.trajectories.lengths[members]]
        cells = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(final.mean(axis=0), final.std(axis=0), strict=True))
        lines.append(f"| {candidates:,} | {cells} |")
    return "\n".join([*lines, f"| base models | {start} |"])


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

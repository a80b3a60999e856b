"""Model cards and reports; every figure comes from the recorded set or from the training."""

from __future__ import annotations

from dataclasses import asdict

from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.train import CQLResult
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.sft import HeldOutError, SFTResult

FRONT_MATTER = """---
library_name: dmagent-loader
license: other
tags: [data-mixing, continual-pre-training]
---
"""


def sft_card(record: FeedbackRecord, result: SFTResult, notes: str) -> str:
    """Text of the README.md of an agent after the supervised warm-up.

    Args:
        record: The recorded set that the agent was trained on.
        result: The result of the training.
        notes: Description of the text and its licences, and other remarks: Markdown sections.
    """
    return f"""{FRONT_MATTER}
# Data mixing agent, supervised warm-up

A Transformer of {result.agent.num_parameters():,} parameters that reads the mixes used so far over 52 domains and the
feedback after each, and proposes the next mix (arXiv 2507.15640, section 3). This one imitates expert trajectories. It
is the starting point of reinforcement learning, and the paper's ablation.

## How it was trained

{fact_table({**record_rows(record), **sft_rows(record, result)})}

## Next-mix error on {len(result.test)} held-out expert trajectories

{error_table(result.error)}

Squared distance between predicted and actual mix, averaged over steps. These trajectories were used neither to train
nor to choose the weights. {comparison(result.error)}

{_limits(record)}

{notes.strip()}
"""


def cql_card(record: FeedbackRecord, config: CQLConfig, result: CQLResult, notes: str) -> str:
    """Text of the README.md of an agent after Conservative Q-Learning.

    Args:
        record: The recorded set that the agent was trained on.
        config: Settings of the training.
        result: The result of the training.
        notes: See `sft_card`.
    """
    return f"""{FRONT_MATTER}
# Data mixing agent, Conservative Q-Learning

A Transformer of {result.agent.num_parameters():,} parameters that reads the mixes used so far over 52 domains and the
feedback after each, and proposes the next mix (arXiv 2507.15640, section 3). After a supervised warm-up it was trained
offline, on recorded trajectories of every quality, to propose mixes that raise the feedback of both fields. Its critics
are in ``critic/``; they are not needed to use it.

## How it was trained

{fact_table({**record_rows(record), **cql_rows(config, result)})}

{_limits(record)}

{notes.strip()}
"""


def record_rows(record: FeedbackRecord) -> dict[str, str]:
    """Sizes and settings of trajectories, base models, proxies and feedback, as name -> text."""
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
    """Facts about the supervised warm-up, as name -> text."""
    return {
        "agent": f"next-mix squared error (Eq. 4) on {len(result.training)} expert trajectories; weights after "
        f"{result.best_update} updates, the best of {len(result.validation_curve)} evaluations on "
        f"{len(result.validation)} validation trajectories; standardisation {result.agent.config.standardization}"
    }


def cql_rows(config: CQLConfig, result: CQLResult) -> dict[str, str]:
    """Facts about the training with Conservative Q-Learning, as name -> text."""
    changed = ", ".join(f"{name} {value:g}" for name, value in asdict(config).items())
    return {
        "agent": f"Conservative Q-Learning (Eq. 5-7) on {len(result.trajectories)} trajectories, "
        f"{result.seconds:.0f} s; standardisation {result.agent.config.standardization}",
        "settings": changed,
    }


def sft_report(record: FeedbackRecord, result: SFTResult) -> str:
    """Training curve and held-out error of a warm-up, as Markdown tables."""
    return f"""# Supervised warm-up

| updates | training error | validation error |
|---:|---:|---:|
{chr(10).join(f"| {u} | {a:.5f} | {b:.5f} |" for u, a, b in result.validation_curve)}

The weights after {result.best_update} updates were kept. Error on {len(result.test)} test trajectories:

{error_table(result.error)}
"""


def cql_report(result: CQLResult) -> str:
    """Training curve of Conservative Q-Learning, as a Markdown table."""
    # Some columns appear only once the actor moves.
    names = list(dict.fromkeys(name for row in result.curve for name in row))
    rows = [" | ".join(f"{row[name]:.4g}" if name in row else "" for name in names) for row in result.curve]
    return (
        f"# Conservative Q-Learning\n\n| {' | '.join(names)} |\n|{'---:|' * len(names)}\n"
        + "".join(f"| {row} |\n" for row in rows)
        + f"\n{result.seconds:.0f} s.\n"
    )


def fact_table(rows: dict[str, str]) -> str:
    """A Markdown table of two columns without header."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _limits(record: FeedbackRecord) -> str:
    config = record.trajectories.config
    return f"""## Limits

- The feedback comes from proxies of {record.settings["proxy_parameters"] / 1e6:.2f}M parameters, trained on at most
  {config.steps * config.tokens_per_step:,} tokens; the paper's have 50M.
- The agent has seen one target field, one pair of question sets ({", ".join(record.fields)}),
  {record.settings["collection"]["bases"]["models"]} start states and histories of at most {config.steps} steps."""


def comparison(error: HeldOutError) -> str:
    """A sentence that compares the held-out error with the baselines."""
    last, mean = error.agent.mean() / error.repeat_last.mean(), error.agent.mean() / error.mean_at_step.mean()
    return (
        f"The agent's error is {last:.2f} times that of repeating the last mix, and {mean:.2f} times that of the mean "
        "mix."
    )


def error_table(error: HeldOutError) -> str:
    """Held-out errors of the agent and the baselines, with their spread over trajectories, as a Markdown table."""
    rows = [
        ("agent", error.agent),
        ("repeat the last mix", error.repeat_last),
        ("mean training mix at that step", error.mean_at_step),
    ]
    lines = ["| proposal | mean squared error | std over trajectories | worst trajectory |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {e.mean():.5f} | {e.std():.5f} | {e.max():.5f} |" for name, e in rows]
    return "\n".join(lines)

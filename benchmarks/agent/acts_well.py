"""Trial of agents: continual pre-training of a larger model under each policy, over several seeds.

    python -m benchmarks.agent.acts_well --run runs/full --data data --output runs/trial \
        --agents rl=runs/full/rl sft=runs/full/sft

The policies are the agents, the target distribution alone (naive), half of it, the start state alone, and 16 random
static mixes. For each seed, a base model is pre-trained on the source field. Results are kept in the output directory:
a second call, also with more agents, does not repeat finished runs. The program prints the tables and writes
`tables.md`, `trial.safetensors`, `mixes.png` and `coverage.png`.

The unit of the objective is taken from the recorded set in `--run`. If it does not exist yet, the runs are made and a
later call writes the tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.agent.coverage import set_table
from benchmarks.agent.mixes import coverage_chart, steered_run, trajectories_chart
from benchmarks.agent.rollout import change_by_feedback
from benchmarks.agent.trial import RANDOM, TrialConfig, run_trial, static_policies
from benchmarks.agent.trial_record import TrialRecord
from benchmarks.agent.trial_tables import feedback_table, markdown, readings, run_table
from dmagent_loader import DomainSpace, MixingAgent
from dmagent_loader._report.charts import png_bytes
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import full_config

UNSEEN = {"general": "env/mmlu_test_sample.jsonl.gz", "math": "env/math_test_sample.jsonl.gz"}
QUESTIONS = QuestionConfig(max_tokens=128, max_questions=(64, 24), batch_tokens=512)
UNSEEN_QUESTIONS = QuestionConfig(max_tokens=128, max_questions=(150, 60), batch_tokens=512)


def tables(trial: TrialRecord, record: FeedbackRecord, agents: dict[str, MixingAgent]) -> str:
    """All tables, as Markdown."""
    statistics = record.statistics()
    random = [name for name in trial.names if name.startswith(RANDOM)]
    others = [name for name in trial.names if not name.startswith(RANDOM)]
    best = trial.best(random, statistics)
    parts = ["# At the end of the runs", f"Best of {len(random)} random static mixes, on the feedback: {best}."]
    parts += read_at(trial, record, [*others, best], agents, best, None)
    share = {name: trial.read(name, statistics).objective.mean() for name in random}
    listed = ", ".join(f"{name.removeprefix(RANDOM)}: {value:.2f}" for name, value in share.items())
    parts += [f"Objective of the random static mixes: {listed}."]

    compared = [name for name in (*agents, "naive", "static 50/50") if name in trial.names]
    levels = {0.25, 0.5, 0.75, trial.target_tokens(compared) / trial.target_tokens(["naive"])}
    for level in sorted(level * trial.target_tokens(["naive"]) for level in levels):
        reaching = [name for name in trial.names if trial.target_tokens([name]) >= level]
        static = [name for name in reaching if name in random]
        chosen = [name for name in reaching if name in others]
        parts.append(f"# At equal target tokens: {level:,.0f}")
        ended = [name for name in others if name not in chosen]
        parts.append(
            f"Ended with fewer: {', '.join(ended) or 'none'}; random static mixes that reached it: {len(static)}."
        )
        if static:
            best_here = trial.best(static, statistics, target_tokens=level)
            parts.append(f"Best of these, on the feedback at this point: {best_here}.")
            parts += read_at(trial, record, [*chosen, best_here], agents, best_here, level)
        else:
            parts += read_at(trial, record, chosen, agents, None, level)
    if agents:
        parts += ["# Effect of the feedback on the agents' proposals", feedback_effect_table(trial, agents)]
    return "\n\n".join([*parts, "# The recorded sets", set_table(record)]) + "\n"


def read_at(
    trial: TrialRecord,
    record: FeedbackRecord,
    names: list[str],
    agents: dict[str, MixingAgent],
    best: str | None,
    target_tokens: float | None,
) -> list[str]:
    """Three tables of the same readings: feedback, feedback on unseen questions, and training data."""
    read = readings(trial, names, record.statistics(), target_tokens=target_tokens)
    references = [*([best] if best else []), *(name for name in agents if "sft" in name.lower() and name in names)]
    return [
        feedback_table(read, trial.fields, references),
        "On unseen questions, used neither to train nor to choose anything:",
        feedback_table(read, trial.fields, references, unseen=True),
        run_table(read),
    ]


def feedback_effect_table(trial: TrialRecord, agents: dict[str, MixingAgent]) -> str:
    """Total variation between each agent's proposals and those that it would make if the feedback stayed constant."""
    rows = []
    for name, agent in agents.items():
        number = trial.names.index(name)
        changes = []
        for mixes, feedback, length in zip(
            trial.mixes[number], trial.feedback[number], trial.lengths[number], strict=True
        ):
            known = slice(int(length) + 1)
            changes.append(change_by_feedback(agent, trial.fields, mixes[known], feedback[known]))
        joined = np.concatenate(changes)
        rows.append([name, f"{joined.mean():.3f}", f"{joined.max():.3f}"])
    return markdown(["agent", "mean", "largest"], rows)


def pictures(trial: TrialRecord, record: FeedbackRecord, agents: dict[str, MixingAgent], output: Path) -> None:
    """Draws the mixes of the agents' first runs, and the coverage of the recorded sets."""
    space = DomainSpace.canonical()
    trajectories = record.trajectories
    chart = coverage_chart(
        trajectories.mixes,
        trajectories.lengths,
        trajectories.candidates,
        space,
        title="Where the recorded trajectories lie",
    )
    (output / "coverage.png").write_bytes(png_bytes(chart))
    runs = []
    for name in agents:
        number = trial.names.index(name)
        known = slice(int(trial.lengths[number, 0]) + 1)
        runs.append(
            steered_run(
                name,
                trial.mixes[number, 0, known],
                trial.feedback[number, 0, known],
                domains=space.names,
                fields=trial.fields,
                tokens_per_step=trial.tokens_per_step,
            )
        )
    if runs:
        (output / "mixes.png").write_bytes(png_bytes(trajectories_chart(runs, space, title="What the agents did")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with corpus/ and recorded.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="folder with the question files")
    parser.add_argument("--agents", nargs="*", default=[], metavar="NAME=PATH", help="checkpoints of the agents")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.workers == 1:
        torch.set_num_threads(1)
    corpus = Corpus.load(arguments.run / "corpus")
    files = {field: arguments.data / name for field, name in full_config().questions.items()}
    read = ProxyQuestions.from_files(files, corpus.tokenizer(), QUESTIONS)
    unseen = ProxyQuestions.from_files(
        {k: arguments.data / v for k, v in UNSEEN.items()}, corpus.tokenizer(), UNSEEN_QUESTIONS
    )
    paths = dict(entry.split("=", 1) for entry in arguments.agents)
    agents = {name: MixingAgent.from_pretrained(path) for name, path in paths.items()}
    config = TrialConfig()
    trial = run_trial(
        {**agents, **static_policies(corpus, config)},
        corpus,
        read,
        unseen,
        config,
        arguments.output,
        workers=Workers(count=arguments.workers),
        device=arguments.device,
    )
    trial.save(arguments.output / "trial.safetensors")
    print(f"{len(trial.names)} policies, {trial.seconds / 60:.0f} minutes of runs")
    recorded = arguments.run / "recorded.safetensors"
    if not recorded.exists():
        print(f"{recorded} does not exist yet: call again when it does, for the tables")
        return
    record = FeedbackRecord.load(recorded)
    if record.settings["questions"] != read.fingerprint or record.settings["corpus"] != corpus.fingerprint:
        raise SystemExit(f"{recorded} was collected with another corpus or other questions than these runs")
    text = tables(trial, record, agents)
    (arguments.output / "tables.md").write_text(text, encoding="utf-8")
    print(text)
    pictures(trial, record, agents, arguments.output)


if __name__ == "__main__":
    main()

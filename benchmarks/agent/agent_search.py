"""Comparison of settings of the warm-up and of Conservative Q-Learning.

    python -m benchmarks.agent.agent_search --run DIR --data DIR --output DIR [--variants NAME ...] [--table]

Trains agents with different settings on a recorded set, without 12 trajectories of each of its sets. Two measurements
are independent of the training: how the critics rank the held-out trajectories, and what the agent achieves when it
steers eight proxies (two streams of new rows from each of the four base models). The runs of `acts_well` are not used,
so that settings chosen here can be tested there.

`--run` is the output of ``dmagent train-agent feedback`` with the full settings, `--data` holds the question files.
`--output` keeps one file for each variant: a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.agent.held_out_q import held_out_q
from benchmarks.agent.rollout import ClosedLoop, LoopConfig
from benchmarks.agent.stream_numbers import SEARCH
from dmagent_loader import DomainSpace, MixingAgent
from dmagent_loader._files import write_atomically
from dmagent_loader.agent import AgentConfig
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.policies import Policy, StaticPolicy
from dmagent_loader.training.cql.train import train_cql
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import start_states, train_bases
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.sft import train_sft
from dmagent_loader.training.stages import BASES, PipelineConfig, full_config, with_settings

HELD_OUT_PER_SET = 12
STREAMS = 2
SHOWN_STEPS = (1, 20, 60)
# 400 updates instead of the bundled agent's 1,200, to compare all settings at the same length.
SHORT = {"updates": 400, "warmup_updates": 100}

# Warm-up alone, with one change each. "frozen" standardises feedback without the run's first feedback as origin.
SFT: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft N=10000": {"sft": {"expert_share": None}},
    "sft N=1": {"sft": {"expert_share": None, "expert_candidates": 1}},
    "sft top 5%": {"sft": {"expert_share": 0.05, "validation": 3, "test": 3}},
    "sft all": {"sft": {"expert_share": 1.0}},
    "sft frozen": {"agent": {"standardization": "frozen"}},
    "sft 3 times longer": {"sft": {"updates": 900}},
}
# Conservative Q-Learning from the first of them, unless "sft" says otherwise.
CQL: dict[str, dict[str, Any]] = {
    "cql": {"cql": SHORT},
    "cql alpha 0": {"cql": SHORT | {"alpha": 0.0}},
    "cql alpha 0.01": {"cql": SHORT | {"alpha": 0.01}},
    "cql trace 0.9": {"cql": SHORT | {"trace": 0.9}},
    "cql trace 0.5": {"cql": SHORT | {"trace": 0.5}},
    "cql trace 0.9 alpha 0.005": {"cql": SHORT | {"trace": 0.9, "alpha": 0.005}},
    "cql trace 0.9 imitation 1": {"cql": SHORT | {"trace": 0.9, "bc_weight": 1.0}},
    "cql trace 0.9 discount 1": {"cql": SHORT | {"trace": 0.9, "discount": 1.0}},
    "cql discount 0.95": {"cql": SHORT | {"discount": 0.95}},
    "cql imitation 1": {"cql": SHORT | {"bc_weight": 1.0}},
    "cql one critic": {"cql": SHORT | {"num_critics": 1}},
    "cql actor rate x3": {"cql": SHORT | {"actor_learning_rate": 3e-4}},
    "cql from N=10000": {"sft": {"expert_share": None}, "cql": SHORT},
    "cql 1200": {"cql": {}},
    "cql 1200, seed 1": {"cql": {"seed": 1}},
    "cql trace 0.9 1200": {"cql": {"trace": 0.9}},
}
# The agents that come with the package; their training included the held-out trajectories.
BUNDLED = {"bundled sft": "dmagent-sft", "bundled rl": "dmagent-rl"}
TARGET_SHARES = {"static 25%": 0.25, "static 50%": 0.5, "static 75%": 0.75, "naive": 1.0}
VARIANTS = [*TARGET_SHARES, *SFT, *CQL, *BUNDLED]


class Search:
    """Data that all variants share: the record, the held-out trajectories, and the proxies to steer."""

    def __init__(self, run: Path, data: Path, output: Path) -> None:
        self.config, self.output = full_config(), output
        self.corpus = Corpus.load(run / "corpus")
        self.record = FeedbackRecord.load(run / "recorded.safetensors")
        feedback = self.config.feedback
        files = {field: data / name for field, name in self.config.questions.items()}
        self.questions = ProxyQuestions.from_files(files, self.corpus.tokenizer(), feedback.questions)
        self.starts = start_states(self.corpus.start_state, feedback.bases)
        self.bases = train_bases(
            self.corpus,
            self.starts,
            feedback.bases,
            feedback.proxy,
            run / BASES,
            row_tokens=feedback.row_tokens,
        )
        trajectories = self.record.trajectories
        draw = np.random.default_rng(5)
        self.held_out = np.sort(
            np.concatenate(
                [
                    draw.choice(trajectories.members(count), HELD_OUT_PER_SET, replace=False)
                    for count in trajectories.config.candidates_per_step
                ]
            )
        )
        kept = np.setdiff1d(np.arange(len(trajectories.lengths)), self.held_out)
        self.training = dataclasses.replace(
            self.record,
            trajectories=trajectories.subset(kept),
            feedback=self.record.feedback[kept],
            losses=self.record.losses[kept],
        )

    def measure(self, name: str) -> dict[str, Any]:
        """Trains one variant and returns its figures."""
        if name in TARGET_SHARES:
            share = TARGET_SHARES[name]
            mix = (1 - share) * self.corpus.start_state + share * self.corpus.target_distribution
            return self.steer(StaticPolicy(mix))
        if name in BUNDLED:
            return self.steer(MixingAgent.from_pretrained(BUNDLED[name]))
        settings = dict({**SFT, **CQL}[name])
        shape = AgentConfig(max_steps=self.record.trajectories.config.steps, **settings.pop("agent", {}))
        config = with_settings(PipelineConfig(), settings)
        agent, facts = self.warm_up(config, shape)
        if name in CQL:
            started = time.process_time()
            result = train_cql(self.training, agent, config.cql, progress=False)
            agent = result.agent
            judged = held_out_q(self.record, agent, result.critics, self.held_out, discount=config.cql.discount)
            facts = {**dataclasses.asdict(judged), "cpu_seconds": time.process_time() - started}
        agent.save_pretrained(self.output / name.replace(" ", "_"))
        return facts | self.steer(agent)

    def warm_up(self, config: PipelineConfig, shape: AgentConfig) -> tuple[MixingAgent, dict[str, Any]]:
        """Trains an agent by imitation; returns it with its figures."""
        started = time.process_time()
        result = train_sft(self.training, config.sft, shape)
        facts = {
            "next_mix_error": float(result.error.agent.mean()),
            "repeat_last": float(result.error.repeat_last.mean()),
            "cpu_seconds": time.process_time() - started,
        }
        return result.agent, facts

    def steer(self, policy: Policy) -> dict[str, Any]:
        """Results of a policy that steers the proxies: changes of feedback in units of their spread in the record."""
        feedback, numbers = self.config.feedback, len(self.starts)
        runs = STREAMS * numbers
        start = np.tile(self.starts, (STREAMS, 1))
        trainer = ProxyTrainer(
            runs, feedback.proxy, start={key: torch.cat([value] * STREAMS) for key, value in self.bases.items()}
        )
        first = self.questions.feedback(trainer.averaged)
        loop = ClosedLoop(
            [policy] * runs,
            trainer,
            self.corpus,
            LoopConfig(
                steps=self.config.trajectories.steps,
                tokens_per_step=self.config.trajectories.tokens_per_step,
                target_tokens=self.config.trajectories.target_tokens,
                row_tokens=feedback.row_tokens,
                seed=9,
            ),
            numbers=[SEARCH + number for number in range(runs)],
            start_state=start[0],
            fields=tuple(self.config.questions),
            base_feedback=first,
        )
        loop.mixes[:, 0] = start
        while loop.advance():
            loop.feedback[loop.active, loop.step] = self.questions.feedback(trainer.averaged)
        lengths = (loop.mixes.sum(axis=-1) > 0).sum(axis=1) - 1
        last = loop.feedback[np.arange(runs), lengths]
        gains = (last - first) / np.array(self.record.statistics().std)
        is_target = np.array([name.startswith(f"{TARGET}/") for name in DomainSpace.canonical().names])
        shares = loop.mixes[..., is_target].sum(axis=-1)
        return {
            "gains": gains.tolist(),
            "nats": last.tolist(),
            # Mean over the runs that have not ended by then.
            "target_share": [
                float(shares[lengths >= step, step].mean()) for step in SHOWN_STEPS if (lengths >= step).any()
            ],
            "lengths": lengths.tolist(),
        }


def table(output: Path) -> str:
    """All results so far as a Markdown table; ± is the standard error of the paired differences over eight proxies."""
    rows = [
        "| variant | objective | minus static 50% | general | math | target share at step 1, 20, 60 "
        "| critics: rank correlation | within steps | advantage |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    results = {}
    for name in VARIANTS:
        path = output / f"{name.replace(' ', '_')}.json"
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
    reference = np.array(results["static 50%"]["gains"]).mean(axis=1) if "static 50%" in results else None
    for name, facts in results.items():
        gains = np.array(facts["gains"])
        objective = gains.mean(axis=1)
        cells = [name, f"{objective.mean():.2f}"]
        if reference is None:
            cells.append("")
        else:
            # Both ran from the same base models on the same rows: the differences are paired.
            difference = objective - reference
            cells.append(f"{difference.mean():+.2f} ± {difference.std(ddof=1) / np.sqrt(len(difference)):.2f}")
        cells += [f"{value:.2f}" for value in gains.mean(axis=0)]
        cells.append(", ".join(f"{share:.2f}" for share in facts["target_share"]))
        names = ("rank_correlation", "rank_correlation_within_steps", "advantage")
        cells += [f"{facts[key]:.2f}" if key in facts else "" for key in names]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME")
    parser.add_argument("--table", action="store_true", help="only print the table of finished variants")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        search = Search(args.run, args.data, args.output)
        for name in args.variants:
            path = args.output / f"{name.replace(' ', '_')}.json"
            if path.exists():
                continue
            started = time.perf_counter()
            facts = search.measure(name)
            write_atomically(path, json.dumps(facts, indent=1).encode())
            print(f"{name}: {np.mean(facts['gains']):.2f} ({time.perf_counter() - started:.0f} s)", flush=True)
    print(table(args.output))


if __name__ == "__main__":
    main()

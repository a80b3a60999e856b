"""Trains a mixing agent on your own text, shows what it learnt, and asks it for a mix: a complete script.

    python examples/train_your_own_agent.py --data DATA --target target_law --questions general=env/mmlu.jsonl \
        law=env/bar_exam.jsonl --output runs/law-agent

DATA holds `source/<Topic>.jsonl(.gz)`, one file per topic (names: dmagent_loader.mixture.CANONICAL_TOPICS), and
`<target>/*.jsonl(.gz)`, all with a column `text`, and the question files with the columns `question` and `answer`, the
field to keep first. Run it again to continue after a break.

With --small it takes minutes and makes an agent that only shows that everything works; without, it makes 384
trajectories: about an hour on two cores with --workers 2. `dmagent train-agent` does the same from the command line. To
train an agent on a recorded set, without any text (`recorded-math` needs a checkout; elsewhere pass a file):

    dmagent train-agent cql --recorded recorded-math --output runs/again
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from dmagent_loader import MixingAgent
from dmagent_loader.mixture import History
from dmagent_loader.training import CONFIGS, FeedbackRecord, Pipeline, Workers, with_settings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", default="target_math", help="folder of the target documents in DATA")
    parser.add_argument(
        "--questions",
        nargs=2,
        metavar="FIELD=FILE",
        default=["general=env/mmlu_val.jsonl.gz", "math=env/math_train_500.jsonl.gz"],
        help="question files in DATA: the field to keep, then the one to learn",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--settings", type=Path, help="JSON file with settings to change")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def look_at(record: FeedbackRecord) -> None:
    """Prints the feedback and the mix of the worst, the median and the best trajectory."""
    gains = record.statistics().std
    lengths = record.trajectories.lengths
    rows = range(len(lengths))
    change = record.feedback[rows, lengths] - record.feedback[:, 0]
    order = (change / gains).mean(axis=1).argsort()
    share = record.trajectories.target_share()
    print(f"{len(lengths)} trajectories, {record.num_feedbacks} feedbacks; change of feedback from start to end:")
    for title, number in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
        scores = ", ".join(f"{name} {value:+.3f}" for name, value in zip(record.fields, change[number], strict=True))
        mean = share[number, 1 : lengths[number] + 1].mean()
        print(f"  {title}: {scores} nats with a mean target share of {mean:.2f} over {lengths[number]} steps")


def ask(agent: MixingAgent, record: FeedbackRecord) -> None:
    """Prints the agent's first mix for the start of the first recorded trajectory."""
    history = History(
        domains=agent.config.domains,
        fields=record.fields,
        mixes=record.trajectories.mixes[0, :1],
        feedback=record.feedback[0, :1],
    )
    mix = agent.propose(history)
    top = sorted(zip(agent.config.domains, mix, strict=True), key=lambda entry: -entry[1])[:5]
    print("the agent's first mix begins with " + ", ".join(f"{name} {weight:.3f}" for name, weight in top))


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = CONFIGS["small" if args.small else "full"]()
    if args.settings is not None:
        config = with_settings(config, json.loads(args.settings.read_text(encoding="utf-8")))
    questions = dict(entry.split("=", 1) for entry in args.questions)
    config = with_settings(config, {"target": args.target, "questions": questions})
    pipeline = Pipeline(
        config=config,
        output=args.output,
        data=args.data,
        workers=Workers(count=args.workers),
        device=args.device,
    )
    record = pipeline.record()
    look_at(record)
    agent = pipeline.cql()
    ask(agent, record)
    print(f"to use it: AgentWeightedSampler(shards, agent={str(args.output / 'rl')!r}, ...)")


if __name__ == "__main__":
    main()

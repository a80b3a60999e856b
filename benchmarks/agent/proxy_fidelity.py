"""Agreement of proxies of different sizes about the ranking of the same trajectories.

    python -m benchmarks.agent.proxy_fidelity --run DIR --data DIR --output DIR [--sizes 0.06M 0.5M ...] [--table]

Takes 24 trajectories of a recorded set, 6 of each of its sets, and trains proxies of other sizes along them, from base
models of their own size and on new rows. It prints the rank correlations of their scores with each other and with the
recorded ones. The recorded size is trained again on new rows, to show how much noise alone lowers the correlations.

`--run` is the output of ``dmagent train-agent feedback``: ``corpus/``, ``trajectories.safetensors`` and, for the table,
``recorded.safetensors``. `--data` holds the question files. A run that was killed continues where it stopped.
``--table`` prints the table of the finished sizes and trains nothing. Only every tenth step is scored.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.agent.fidelity import FidelityConfig, fidelity_table, score_trajectories, spread_sample
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import BaseConfig
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import full_config
from dmagent_loader.training.trajectories import Trajectories

FILES = full_config().questions
QUESTIONS = QuestionConfig(max_tokens=128, max_questions=(64, 24), batch_tokens=256)
SMALL = ProxyConfig(rows_per_update=4, learning_rate=1.5e-3, warmup_updates=20, averaging=0.95, seed=1)
# All base models are trained on the same number of tokens, a fifth of that of the recorded ones, to limit the cost.
SIZES = {
    "0.06M": (
        replace(SMALL, width=32, heads=2, feed_forward=84, learning_rate=2e-3),
        BaseConfig(tokens=600_000, learning_rate=4e-3, seed=1),
    ),
    "0.5M": (
        replace(SMALL, width=112, layers=3, feed_forward=256, learning_rate=1.2e-3),
        BaseConfig(tokens=600_000, learning_rate=2e-3, seed=1),
    ),
    "1.7M": (
        replace(SMALL, width=176, layers=4, feed_forward=468, learning_rate=9e-4),
        BaseConfig(tokens=600_000, learning_rate=1.5e-3, seed=1),
    ),
    "3.7M": (
        replace(SMALL, width=240, layers=5, feed_forward=640, learning_rate=8e-4),
        BaseConfig(tokens=600_000, learning_rate=1.2e-3, seed=1),
    ),
    "0.16M-again": (SMALL, BaseConfig(tokens=600_000, seed=1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--per-set", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30, help="most steps of a trajectory (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="only print the table of finished sizes")
    args = parser.parse_args()

    everything = Trajectories.load(args.run / "trajectories.safetensors")
    numbers = spread_sample(everything, args.per_set)
    trajectories = everything.subset(numbers).shortened(args.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        corpus = Corpus.load(args.run / "corpus")
        files = {field: args.data / name for field, name in FILES.items()}
        questions = ProxyQuestions.from_files(files, corpus.tokenizer(), QUESTIONS)
        for name in args.sizes:
            proxy, bases = SIZES[name]
            print(f"{name}: {proxy.num_parameters:,} parameters, {len(numbers)} trajectories", flush=True)
            started = time.perf_counter()
            scores = score_trajectories(
                trajectories,
                corpus,
                questions,
                FidelityConfig(
                    feedback=FeedbackConfig(bases=bases, proxy=proxy, questions=QUESTIONS, seed=1), evaluate_every=10
                ),
                args.output / name,
                device=args.device,
            )
            np.save(args.output / f"{name}.npy", scores)
            facts = {"parameters": proxy.num_parameters, "numbers": numbers.tolist(), "steps": args.steps}
            (args.output / f"{name}.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)

    feedback = {}
    if (args.run / "recorded.safetensors").exists():
        record = FeedbackRecord.load(args.run / "recorded.safetensors")
        feedback["recorded"] = record.feedback[numbers, : trajectories.config.steps + 1]
    for name in SIZES:
        if (args.output / f"{name}.npy").exists():
            facts = json.loads((args.output / f"{name}.json").read_text(encoding="utf-8"))
            if facts["numbers"] == numbers.tolist() and facts["steps"] == args.steps:
                feedback[name] = np.load(args.output / f"{name}.npy")
    print(f"done: {', '.join(feedback) or 'nothing yet'}; trajectories {numbers.tolist()}")
    if len(feedback) > 1:
        print(fidelity_table(trajectories, feedback, tuple(FILES), steps=(20,)))


if __name__ == "__main__":
    main()

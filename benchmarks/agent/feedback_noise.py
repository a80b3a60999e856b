"""Signal-to-noise ratio of the feedback for each way of scoring.

    python -m benchmarks.agent.feedback_noise --corpus DIR --data DIR [--steps 20] [--base-tokens 500000]

Trains one base model on the source field, then 4 runs for each of 5 target shares, which differ only in their rows. For
each way of scoring (answer or pair, choices listed or left out, raw or averaged weights, number of questions) it prints
the standard deviation between mixes over that between runs of one mix. `--corpus` is the folder ``corpus/`` that
``dmagent train-agent`` writes, `--data` holds the question files. The defaults take a few minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.agent.noise import NoiseConfig, measure_noise, noise_table
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import BaseConfig, train_bases
from dmagent_loader.training.stages import full_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--base-tokens", type=int, default=500_000)
    parser.add_argument("--questions", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    started = time.perf_counter()
    corpus = Corpus.load(args.corpus)
    config = NoiseConfig(
        steps=args.steps, tokens_per_step=args.tokens_per_step, runs=args.runs, num_questions=tuple(args.questions)
    )
    with tempfile.TemporaryDirectory() as folder:
        base = train_bases(
            corpus,
            corpus.start_state[None],
            BaseConfig(models=1, tokens=args.base_tokens),
            config.proxy,
            Path(folder),
            row_tokens=config.row_tokens,
            device=args.device,
        )
    files = {field: args.data / name for field, name in full_config().questions.items()}
    with tqdm(total=config.steps, desc="runs", unit="step") as bar:
        measured = measure_noise(corpus, files, base, config, device=args.device, on_step=bar.update)
    print(
        f"{len(config.shares)} target shares x {config.runs} runs, {config.steps} steps of {config.tokens_per_step} "
        f"tokens, base model of {args.base_tokens} tokens; {time.perf_counter() - started:.0f} s"
    )
    print(noise_table(measured, config.shares))


if __name__ == "__main__":
    main()

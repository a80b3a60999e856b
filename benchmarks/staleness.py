"""How late a new mix takes effect, and what decisions cost: runs the Trainer example in each way of loading data.

    make demo && python benchmarks/staleness.py

For torch workers 0 and 2, gradient accumulation 1 and 4, and 1 and 2 processes: the staleness of the decisions in
samples (and in optimizer steps), the duration of one decision and of one evaluation, and the share of the run's time
that evaluations took, all from the Trainer's own log history.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "huggingface_trainer.py"


def run(args: argparse.Namespace, workers: int, accumulation: int, processes: int, own_loader: bool) -> str:
    with tempfile.TemporaryDirectory() as output:
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        steps = args.samples // (args.batch_size * accumulation * processes)
        command = [*launch, str(EXAMPLE), "--shards", args.shards, "--tokenizer", args.tokenizer, "--environment"]
        command += [*args.environment, "--output", output, "--cpu", "--report-to", "none", "--exhausted", "repeat"]
        command += ["--batch-size", str(args.batch_size), "--accumulation", str(accumulation)]
        command += ["--workers", str(workers), "--max-steps", str(steps), "--save-steps", "100000"]
        command += ["--samples-per-reweight", str(args.samples // 5), "--max-questions", str(args.max_questions)]
        command += ["--zero-look-ahead"] if own_loader else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    # The decision before the first step is left out: nothing has been fetched then.
    decisions = [entry for entry in history if "dmagent/staleness_samples" in entry][1:]
    stale = {int(entry["dmagent/staleness_samples"]) for entry in decisions}
    per_step = args.batch_size * accumulation * processes
    decision = 1000 * statistics.median(entry["dmagent/decision_seconds"] for entry in decisions)
    evaluation = statistics.median(entry["dmagent/evaluation_seconds"] for entry in decisions)
    samples = f"{min(stale)}" if len(stale) == 1 else f"{min(stale)}-{max(stale)}"
    loader = "own" if own_loader else "stock"
    return (
        f"{loader:>6} {processes:>9} {workers:>7} {accumulation:>12} {samples:>10} {max(stale) / per_step:>6.2f} "
        f"{decision:>11.1f} {evaluation:>12.2f} {decisions[-1]['dmagent/evaluation_share']:>9.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="demo_output/shards")
    parser.add_argument("--tokenizer", default="demo_output/base_model")
    parser.add_argument(
        "--environment", nargs="+", default=[f"{f}=demo_output/corpus/env/{f}.jsonl" for f in ("general", "code")]
    )
    parser.add_argument("--samples", type=int, default=640, help="of each run, over all ranks (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of each process (default: %(default)s)")
    parser.add_argument("--max-questions", type=int, default=60, help="of each field (default: %(default)s)")
    args = parser.parse_args()
    print(
        f"{'loader':>6} {'processes':>9} {'workers':>7} {'accumulation':>12} {'staleness':>10} {'steps':>6} "
        f"{'decision ms':>11} {'evaluation s':>12} {'of run':>9}"
    )
    for own_loader, processes, workers, accumulation in itertools.product((False, True), (1, 2), (0, 2), (1, 4)):
        print(run(args, workers, accumulation, processes, own_loader), flush=True)


if __name__ == "__main__":
    main()

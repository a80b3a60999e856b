"""Runs the comparison, or prints its tables; it can be stopped and called again.

python -m benchmarks.comparison run --data DATA --work build/tasks --output build/tasks/comparison.jsonl
python -m benchmarks.comparison tables --output build/tasks/comparison.jsonl
python -m benchmarks.comparison pictures --output build/tasks/comparison.jsonl --folder build/tasks
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.comparison.pictures import pareto
from benchmarks.comparison.policies import add_policies, compared
from benchmarks.comparison.runs import Comparison, tasks, work_list
from benchmarks.comparison.tables import tables
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing")
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--work", type=Path, default=Path("build/tasks"), help="for corpora, base models, probes, paths")
    run.add_argument("--streams", type=int, default=2, help="streams of each task, an even number")
    run.add_argument("--splits", nargs="*", default=["test", "validation", "train"], help="tasks of these splits alone")
    add_policies(run, None, [])
    show = commands.add_parser("tables", help="print the tables of what is there")
    show.add_argument("--reference", nargs="*", default=["natural 30%", "influence"], help="policies to compare with")
    draw = commands.add_parser("pictures", help="draw what policies keep against what they acquire")
    draw.add_argument("--folder", type=Path, default=Path("build/tasks"))
    for command in (run, show, draw):
        command.add_argument("--output", type=Path, default=Path("build/tasks/comparison.jsonl"))
    arguments = parser.parse_args()
    if arguments.command == "tables":
        print(tables(arguments.output, arguments.reference))
        return
    if arguments.command == "pictures":
        for split in ("test", "validation"):
            print(pareto(arguments.output, arguments.folder, split))
        return
    if arguments.streams < 2 or arguments.streams % 2:
        parser.error(f"--streams is {arguments.streams}; replays need pairs of streams")
    torch.set_num_threads(1)
    chosen = compared(arguments.also, arguments.policies)
    specs = [spec for spec in tasks() if spec.split in arguments.splits]
    comparison = Comparison(
        ProxySimulator(TaskLibrary(arguments.data, arguments.work)),
        chosen,
        arguments.output,
        arguments.work / "paths",
    )
    comparison.run(work_list(specs, chosen, arguments.streams))


if __name__ == "__main__":
    main()

"""Collects the calibration record of `dmagent-plus` from the table of docs/influence-results.md and its probes.

    python -m benchmarks.influence.calibration --work build/influence --output training_record/plus

`--work` is the folder of `benchmarks.influence.table`, which has trained the clones and measured the influence.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dmagent_loader.mixture.domains import NUM_TOPICS, DomainSpace
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration

NAMES = DomainSpace.canonical().names
SIZE, STEPS = "0.16M", 80
STREAMS = (0, 1)
REPEATS = (0, 1000, 2000, 3000)
CLONE_STREAMS = (100, 101, 102, 103)


def measured(path: Path) -> Influence:
    """A measurement of the table; older files do not list fields and domains, but keep their order."""
    value = json.loads(path.read_text(encoding="utf-8"))
    first = next(iter(value["scores"].values()))
    return Influence.from_json({"fields": list(value["scores"]), "domains": list(first), **value})


def collect(table: Path, work: Path) -> Calibration:
    """The record of all environments of the table."""
    lines = [json.loads(text) for text in table.read_text(encoding="utf-8").splitlines()]
    runs = [line for line in lines if line["size"] == SIZE and line["steps"] == STEPS]
    environments = tuple(dict.fromkeys(line["environment"] for line in runs))
    parts: dict[str, list[FloatArray]] = {name: [] for name in ("truth", "values", "errors", "groups")}
    natural, topics = [], []
    for environment in environments:
        start = work / "probes" / f"{environment}-{SIZE}"
        draws = [
            [m for repeat in REPEATS if (m := Path(f"{start}-{stream + repeat}-32-default.json")).exists()]
            for stream in STREAMS
        ]
        influences = [measured(paths[0]).averaged([measured(path) for path in paths[1:]]) for paths in draws]
        places = [NAMES.index(name) for name in influences[0].domains]
        clones = [json.loads(Path(f"{start}-{stream}-clone.json").read_text())["gains"] for stream in CLONE_STREAMS]
        parts["truth"].append(spread(np.mean(clones, axis=0).T, places))
        parts["values"].append(np.stack([spread(found.values(), places) for found in influences]))
        parts["errors"].append(np.stack([spread(found.errors(), places) for found in influences]))
        by_group = [np.array([found.by_questions[name] for name in found.fields]) for found in influences]
        parts["groups"].append(np.stack([spread(group, places) for group in by_group]))
        natural.append(halves(runs, environment, "natural 30%"))
        topics.append(halves(runs, environment, "question topics"))
    return Calibration(
        environments=environments,
        **{name: np.stack(listed) for name, listed in parts.items()},
        natural=np.stack(natural),
        topics=np.stack(topics),
        run_environment=np.array([environments.index(line["environment"]) for line in runs]),
        run_mix=np.array([line["mix"] for line in runs]),
        run_gains=np.array([line["gains"] for line in runs]),
    )


def spread(values: FloatArray, places: list[int]) -> FloatArray:
    """Values of the domains with text, (..., domains), among the 52, (..., 52); NaN elsewhere."""
    result = np.full((*values.shape[:-1], len(NAMES)), np.nan)
    result[..., places] = values
    return result


def halves(runs: list[dict], environment: str, policy: str) -> FloatArray:  # type: ignore[type-arg]
    """The mix of a policy, with half of the weight in each field: (52,)."""
    line = next(line for line in runs if line["environment"] == environment and line["policy"] == policy)
    mix = np.array(line["mix"])
    for half in (slice(None, NUM_TOPICS), slice(NUM_TOPICS, None)):
        mix[half] /= 2 * mix[half].sum()
    return mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path("benchmarks/results/influence.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("build/influence"))
    parser.add_argument("--output", type=Path, default=Path("training_record/plus"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    collect(arguments.table, arguments.work).save(arguments.output / CALIBRATION)


if __name__ == "__main__":
    main()

"""Regressions of `dmagent fit-mix` on RegMix's public tables: 17 domains of The Pile, 512 runs of 1M parameters.

    python -m benchmarks.regmix --data DATA/regmix          # writes benchmarks/results/regmix.json
    python -m benchmarks.regmix --print                     # the tables of docs/baselines.md

DATA/regmix holds the files of github.com/sail-sg/regmix (MIT), folder ``data``: ``train_mixture_1m.csv``,
``train_pile_loss_1m.csv`` and, for 1m, 60m and 1B, ``test_mixture_*.csv`` and ``test_pile_loss_*.csv``. Fits see runs
of 1M parameters only. About a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import LogLinearLaw, ProxyTable, Regression, rank_correlation

RESULTS = Path(__file__).parent / "results" / "regmix.json"
SIZES = ("1m", "60m", "1B")
PILE_CC = "metric/the_pile_pile_cc_val_loss"
METHODS = {
    "lightgbm": lambda table: Regression(table, "lightgbm"),
    "linear": lambda table: Regression(table, "linear"),
    "log-linear": lambda table: Regression(table, "log-linear"),
    "olmix": LogLinearLaw,
}
NUMBERS = (32, 64, 128, 256)
"""Numbers of runs in smaller fits."""
DRAWS = 5


def correlations(predicted: FloatArray, test: ProxyTable) -> dict[str, float | None]:
    """Rank correlations: of the loss on Pile-CC, of the mean loss, and the least and mean over metrics.

    None: some predictions are all the same.
    """
    by_metric = rank_correlation(predicted, test.losses)
    mean = rank_correlation(predicted.mean(axis=1)[:, None], test.losses.mean(axis=1)[:, None])
    found = {
        "pile_cc": by_metric[test.metrics.index(PILE_CC)],
        "mean_loss": mean[0],
        "least": by_metric.min(),
        "average": by_metric.mean(),
    }
    return {name: None if np.isnan(value) else round(float(value), 4) for name, value in found.items()}


def tables(data: Path) -> tuple[ProxyTable, dict[str, ProxyTable]]:
    """Training runs, and test runs by size."""
    train = ProxyTable.from_csv(data / "train_mixture_1m.csv", data / "train_pile_loss_1m.csv")
    return train, {
        size: ProxyTable.from_csv(data / f"test_mixture_{size}.csv", data / f"test_pile_loss_{size}.csv")
        for size in SIZES
    }


def measured(data: Path) -> dict[str, Any]:
    """All fits."""
    train, tests = tables(data)
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"runs": {size: len(test) for size, test in tests.items()}, "all": {}, "fewer": []}
    for name, method in METHODS.items():
        started = time.perf_counter()
        law = method(train)
        seconds = time.perf_counter() - started
        result["all"][name] = {size: correlations(law.predict(test.mixes), test) for size, test in tests.items()}
        result["all"][name]["fit_seconds"] = round(seconds, 1)
    for number in NUMBERS:
        for draw in range(DRAWS):
            part = train.subset(rng.choice(len(train), number, replace=False))
            for name, method in METHODS.items():
                try:
                    found = correlations(method(part).predict(tests["1m"].mixes), tests["1m"])
                except ConfigurationError:  # too few runs for trees
                    found = dict.fromkeys(("pile_cc", "mean_loss", "least", "average"))
                result["fewer"].append({"runs": number, "draw": draw, "method": name, **found})
    # The part of what is missing to 1 that no fit to small runs can close: the same mixes at two sizes.
    same = {size: test for size, test in tests.items() if test.mixes.shape == tests["1m"].mixes.shape}
    result["1m_against"] = {size: correlations(tests["1m"].losses, test) for size, test in same.items() if size != "1m"}
    return result


def printed(result: dict[str, Any]) -> str:
    """The tables of docs/baselines.md."""
    lines = ["| fit to 512 runs of 1M | 256 runs of 1M | 256 runs of 60M | 64 runs of 1B |", "|---|---:|---:|---:|"]
    for name, found in result["all"].items():
        cells = [f"{found[size]['pile_cc']:.2f} / {found[size]['mean_loss']:.2f}" for size in SIZES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| runs | {' | '.join(METHODS)} |", "|---:|" + "---:|" * len(METHODS)]
    for number in NUMBERS:
        cells = []
        for name in METHODS:
            values = [row["average"] for row in result["fewer"] if (row["runs"], row["method"]) == (number, name)]
            cells.append("-" if None in values else f"{np.mean(values):.2f}")
        lines.append(f"| {number} | {' | '.join(cells)} |")
    cells = [f"{result['all'][name]['1m']['average']:.2f}" for name in METHODS]
    lines.append(f"| 512 | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures or prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true")
    args = parser.parse_args()
    if not args.print:
        if args.data is None:
            parser.error("--data is needed")
        args.output.write_text(json.dumps(measured(args.data), indent=1) + "\n")
    print(printed(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()

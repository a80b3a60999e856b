"""``dmagent fit-mix``: the best mix according to a table of proxy runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import SOURCE, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray, validate_mix

if TYPE_CHECKING:
    from dmagent_loader.policies.baselines import ProxyTable

METHODS = ("regmix", "olmix")
REGRESSORS = ("lightgbm", "linear", "log-linear")
FOLDS = 5
DEFAULT_KL = 0.1


def add_fit_mix_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``fit-mix``."""
    parser = subparsers.add_parser(
        "fit-mix",
        help="fit RegMix or Olmix to a table of your proxy runs, and write the mix it predicts to be best",
        description=(
            "Fits a regression from the mixes of proxy runs to their losses, prints how well it ranks runs that it has "
            "not seen (Spearman), and writes the mix it predicts to be best as JSON: domain -> weight, for "
            "StaticPolicy or initial_mix. Needs the extra [baselines], except for the regressors linear and "
            "log-linear."
        ),
    )
    files = (
        "CSV file with columns mix/<domain> and loss/<metric>; or one file of mixes and one of losses, matched by a "
    )
    parser.add_argument(
        "table", nargs="+", type=Path, metavar="TABLE", help=f"{files}column 'index'. Lower losses are better"
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="(default: %(default)s)")
    parser.add_argument(
        "--regressor", choices=REGRESSORS, default=REGRESSORS[0], help="with regmix (default: %(default)s)"
    )
    parser.add_argument(
        "--kl", type=float, default=DEFAULT_KL, help="with olmix: weight of the divergence from the prior (%(default)s)"
    )
    parser.add_argument(
        "--prior",
        type=Path,
        metavar="FILE.json",
        help="natural shares: domain -> weight or number of rows (default: the mean of the proxies' mixes)",
    )
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="metric to minimise; several count equally (default: all metrics)",
    )
    parser.add_argument(
        "--test",
        nargs="+",
        type=Path,
        metavar="TABLE",
        help=f"runs to test the ranking on, as TABLE (default: {FOLDS}-fold cross-validation)",
    )
    parser.add_argument("--run-tokens", type=int, metavar="N", help="tokens that a proxy was trained on, for its cost")
    parser.add_argument("--parameters", type=int, metavar="N", help="parameters of a proxy, for its cost")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file for the mix")
    parser.set_defaults(run=fit_mix)


def fit_mix(args: argparse.Namespace) -> int:
    """Fits, tests, prints and writes.

    Raises:
        ConfigurationError: A table or setting is invalid, or the output cannot be written.
        DomainError: The test table has other domains.
        MissingExtraError: The packages of the extra [baselines] are not installed.
    """
    # Imported here, because it loads torch, which would delay the help of the other commands.
    from dmagent_loader.policies.baselines import LogLinearLaw, Olmix, ProxyTable, RegMix, Regression, rank_correlation

    def read(paths: list[Path]) -> ProxyTable:
        if len(paths) > 2:
            raise ConfigurationError(f"a table is one file or two, but there are {len(paths)}: {shown(paths)}")
        return ProxyTable.from_csv(*paths, run_tokens=args.run_tokens, parameters=args.parameters)

    def predictions(train: ProxyTable, mixes: FloatArray) -> FloatArray:
        law = LogLinearLaw(train) if args.method == "olmix" else Regression(train, args.regressor, seed=args.seed)
        return law.predict(mixes)

    table = read(args.table)
    metrics = None if args.metric is None else dict.fromkeys(args.metric, 1.0)
    weights = table.metric_weights(metrics)
    if args.test is None:
        tested, label = table, f"{FOLDS}-fold cross-validation"
        predicted = np.zeros_like(table.losses)
        order = np.random.default_rng(args.seed).permutation(len(table))
        if len(table) < 2 * FOLDS:
            raise ConfigurationError(f"{len(table)} proxy runs are too few for a fit: give at least {2 * FOLDS}")
        for fold in np.array_split(order, FOLDS):
            train = table.subset(np.setdiff1d(order, fold))
            predicted[fold] = predictions(train, table.mixes[fold])
    else:
        tested, label = read(args.test).ordered(table.domains), "test runs"
        if tested.metrics != table.metrics:
            raise ConfigurationError(
                f"the test runs have the metrics {shown(list(tested.metrics))}, but the table has "
                f"{shown(list(table.metrics))}: give the same losses for both"
            )
        predicted = predictions(table, tested.mixes)
    print(f"{len(table)} proxy runs, {len(table.domains)} domains, {len(table.metrics)} metrics")
    print(f"rank correlation (Spearman) on {len(tested)} runs, {label}:")
    width = max(map(len, table.metrics))
    for name, value in zip(table.metrics, rank_correlation(predicted, tested.losses), strict=True):
        print(f"  {name:<{width}}  {value:.3f}")
    objective = rank_correlation((predicted @ weights)[:, None], (tested.losses @ weights)[:, None])[0]
    print(f"  {'objective':<{width}}  {objective:.3f}")
    print(f"cost of the proxies: {_cost(table)}")
    space = DomainSpace.from_names(table.domains, fields=dict.fromkeys(table.domains, SOURCE))
    prior = _prior(args.prior, table)
    policy = (
        Olmix(space, prior, table=table, metrics=metrics, kl=args.kl)
        if args.method == "olmix"
        else RegMix(space, prior, table=table, regressor=args.regressor, metrics=metrics, seed=args.seed)
    )
    mix = policy.solve() if isinstance(policy, Olmix) else policy.mix
    print("mix (prior):")
    width = max(map(len, table.domains))
    for name, weight, natural in zip(table.domains, mix, prior, strict=True):
        print(f"  {name:<{width}}  {weight:.4f}  ({natural:.4f})")
    text = json.dumps(dict(zip(table.domains, mix.tolist(), strict=True)), indent=2)
    try:
        write_atomically(args.output, f"{text}\n".encode())
    except OSError as error:
        raise ConfigurationError(f"{args.output} cannot be written: {error}; pass another --output") from error
    print(f"wrote {args.output}")
    return 0


def _cost(table: ProxyTable) -> str:
    if table.tokens is None:
        return "unknown (--run-tokens, --parameters)"
    flops = "" if table.flops is None else f", {table.flops:.3g} FLOPs"
    return f"{table.tokens:.4g} tokens{flops}"


def _prior(path: Path | None, table: ProxyTable) -> FloatArray:
    """Natural shares: (D,), sums to 1.

    Raises:
        ConfigurationError: The file is not a JSON object of weights by domain.
        DomainError: It names another domain.
    """
    if path is None:
        return np.asarray(table.mixes.mean(axis=0), dtype=np.float64)
    try:
        weights: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the prior {str(path)!r} cannot be read: {error}") from error
    if not isinstance(weights, dict):
        raise ConfigurationError(f"the prior in {path} is a JSON {type(weights).__name__}, not an object of weights")
    return validate_mix(weights, table.domains, renormalize=True)

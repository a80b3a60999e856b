"""``dmagent fit-mix``: the best mix according to a table of proxy runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader._validation import is_finite_number, whole_number
from dmagent_loader.errors import ConfigurationError, DomainError, MixError
from dmagent_loader.mixture.domains import SOURCE, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray, validate_mix

if TYPE_CHECKING:
    from dmagent_loader.policies.baselines import ProxyTable
    from dmagent_loader.policies.baselines.regmix import Regressor

METHODS = ("regmix", "olmix")
REGRESSORS: tuple[Regressor, ...] = ("lightgbm", "linear", "log-linear")
FOLDS = 5
DEFAULT_KL = 0.1
OBJECTIVE = "objective"


def configure_fit_mix(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``fit-mix``."""
    parser.description = (
        "Fits a regression from the mixes of proxy runs to their losses, prints how well it ranks runs that it has "
        "not seen (Spearman), and writes the mix it predicts to be best as JSON: domain -> weight, for "
        "StaticPolicy or initial_mix. Olmix and the regressor lightgbm need the extra [baselines]."
    )
    files = (
        "CSV file with columns mix/<domain> and loss/<metric>; or one file of mixes and one of losses, matched by a "
    )
    parser.add_argument(
        "table", nargs="+", type=Path, metavar="TABLE", help=f"{files}column 'index'. Lower losses are better"
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="method to fit (default: %(default)s)")
    parser.add_argument(
        "--regressor", choices=REGRESSORS, help=f"with regmix (default: {REGRESSORS[0]}, which needs 50 runs)"
    )
    parser.add_argument(
        "--kl", type=float, help=f"with olmix: weight of the divergence from the prior (default: {DEFAULT_KL})"
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
        action="extend",
        type=Path,
        metavar="TABLE",
        help=f"runs to test the ranking on, as TABLE (default: {FOLDS}-fold cross-validation)",
    )
    parser.add_argument("--run-tokens", type=int, metavar="N", help="tokens that a proxy was trained on, for its cost")
    parser.add_argument("--parameters", type=int, metavar="N", help="parameters of a proxy, for its cost")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fit (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file for the mix")
    parser.set_defaults(run=fit_mix)


def fit_mix(args: argparse.Namespace) -> int:
    """Fits, tests, prints and writes.

    Raises:
        ConfigurationError: A table or option is invalid, there are too few runs, or the output cannot be written.
        DomainError: The test table has other domains.
        MissingExtraError: The packages of the extra [baselines] are not installed.
    """
    # Imported here, because it loads torch, which would delay the help of the other commands.
    from dmagent_loader.policies.baselines import LogLinearLaw, Olmix, ProxyTable, RegMix, Regression, rank_correlation
    from dmagent_loader.policies.baselines.regmix import LEAST_TREE_RUNS

    is_olmix = args.method == "olmix"
    _check_options(args, is_olmix=is_olmix)
    regressor: Regressor = args.regressor or REGRESSORS[0]
    kl = DEFAULT_KL if args.kl is None else args.kl

    def read(paths: list[Path]) -> ProxyTable:
        return ProxyTable.from_csv(*paths, run_tokens=args.run_tokens, parameters=args.parameters)

    def fitted(train: ProxyTable) -> LogLinearLaw | Regression:
        return LogLinearLaw(train) if is_olmix else Regression(train, regressor, seed=args.seed)

    table = read(args.table)
    weights = table.metric_weights(_metrics(args.metric, table))
    prior = _prior(args.prior, table)
    table.check_variation()
    table.check_coverage(prior)
    needs_trees = not is_olmix and regressor == "lightgbm"
    least = LEAST_TREE_RUNS if needs_trees else 2 * FOLDS
    if needs_trees and args.test is None:
        least = math.ceil(least * FOLDS / (FOLDS - 1))  # each fold is left out of a fit
    if len(table) < least:
        remedy = ", or choose --regressor log-linear or --method olmix" if needs_trees else ""
        raise ConfigurationError(f"{len(table)} proxy runs are too few for this fit: give at least {least}{remedy}")
    tested = table if args.test is None else read(args.test).ordered(table.domains, table.metrics)
    space = DomainSpace.from_names(table.domains, fields=dict.fromkeys(table.domains, SOURCE))
    metrics = dict(zip(table.metrics, weights.tolist(), strict=True))
    policy = (
        Olmix(space, prior, table=table, metrics=metrics, kl=kl)
        if is_olmix
        else RegMix(space, prior, table=table, regressor=regressor, metrics=metrics, seed=args.seed)
    )
    if args.test is None:
        label = f"{FOLDS}-fold cross-validation"
        predicted = np.zeros_like(table.losses)
        order = np.random.default_rng(args.seed).permutation(len(table))
        for fold in np.array_split(order, FOLDS):
            predicted[fold] = fitted(table.subset(np.setdiff1d(order, fold))).predict(table.mixes[fold])
    else:
        label = "test runs"
        fit = policy.law if isinstance(policy, Olmix) else policy.regression
        predicted = fit.predict(tested.mixes)
    print(", ".join(_counted(n, of) for n, of in ((len(table), "proxy run"), (len(table.domains), "domain"))), end="")
    print(f", {_counted(len(table.metrics), 'metric')}")
    print(f"rank correlation (Spearman) on {_counted(len(tested), 'run')}, {label}:")
    width = max(map(len, [*table.metrics, OBJECTIVE]))
    for name, value in zip(table.metrics, rank_correlation(predicted, tested.losses), strict=True):
        print(f"  {name:<{width}}  {value:.3f}")
    found = float(rank_correlation((predicted @ weights)[:, None], (tested.losses @ weights)[:, None])[0])
    print(f"  {OBJECTIVE:<{width}}  {found:.3f}")
    if not found > 0:
        print(
            f"warning: the fit does not rank these runs (correlation {found:.3f} of the objective), so the mix is no "
            "better than the prior as far as they show: add proxy runs or try another method",
            file=sys.stderr,
        )
    print(f"cost of the proxies: {_cost(table)}")
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


def _check_options(args: argparse.Namespace, *, is_olmix: bool) -> None:
    """Checks the options before the fit, which may take minutes.

    Raises:
        ConfigurationError: An option is invalid, or the output cannot be written.
    """
    for name, value, least in (
        ("--seed", args.seed, 0),
        ("--run-tokens", args.run_tokens, 1),
        ("--parameters", args.parameters, 1),
    ):
        if value is not None:
            whole_number(name, value, least=least)
    if args.kl is not None and (not is_finite_number(args.kl) or args.kl <= 0):
        raise ConfigurationError(f"--kl is {args.kl:g}; it must be a positive number")
    ignored = ("--regressor", args.regressor, "regmix") if is_olmix else ("--kl", args.kl, "olmix")
    if ignored[1] is not None:
        print(f"warning: {ignored[0]} has no effect without --method {ignored[2]}", file=sys.stderr)
    for option, paths in (("TABLE", args.table), ("--test", args.test)):
        if paths is not None and len(paths) > 2:
            raise ConfigurationError(
                f"{option} is one file or two, but there are {len(paths)}: {', '.join(map(str, paths))}"
            )
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        fault = "it is a folder" if args.output.is_dir() else f"there is no folder {args.output.parent}"
        raise ConfigurationError(f"{args.output} cannot be written: {fault}; pass another --output")


def _metrics(names: list[str] | None, table: ProxyTable) -> dict[str, float] | None:
    """Weights of the metrics that the user names; None: all.

    Raises:
        ConfigurationError: The table does not have one of them.
    """
    for name in names or ():
        if name not in table.metrics:
            raise ConfigurationError(f"--metric {name} is not in the table: choose from {', '.join(table.metrics)}")
    return None if names is None else dict.fromkeys(names, 1.0)


def _counted(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"


def _cost(table: ProxyTable) -> str:
    if table.tokens is None:
        return "unknown (--run-tokens, --parameters)"
    flops = "" if table.flops is None else f", {table.flops:.3g} FLOPs"
    return f"{table.tokens:.4g} tokens{flops}"


def _prior(path: Path | None, table: ProxyTable) -> FloatArray:
    """Natural shares: (D,), sums to 1.

    Raises:
        ConfigurationError: The file is not a JSON object of weights by domain, or names another domain.
    """
    if path is None:
        return np.asarray(table.mixes.mean(axis=0), dtype=np.float64)
    try:
        weights: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the prior {str(path)!r} cannot be read: {error}") from error
    if not isinstance(weights, dict):
        raise ConfigurationError(
            f"the prior in {path} is a JSON {type(weights).__name__}: it must be an object, domain -> weight"
        )
    try:
        return validate_mix(weights, table.domains, renormalize=True)
    except (DomainError, MixError) as error:
        raise ConfigurationError(f"the prior in {path} does not fit the table: {error}") from error

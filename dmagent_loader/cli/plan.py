"""``dmagent simulate`` predicts the samples of a planned run."""

from __future__ import annotations

import argparse

import numpy as np

from dmagent_loader.cli.once import Once
from dmagent_loader.cli.storage import add_storage_arguments, storage_lines
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.exhaustion import EXHAUSTION_RULES
from dmagent_loader.mixture.ledger import INITIAL, LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.shards import ShardCollection, load_manifest


def configure_simulate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``simulate``."""
    parser.description = (
        "Simulates the plan of a run with a fixed mix, or a mix that changes linearly, and prints the number of "
        "samples of each domain. A mix is NAME=WEIGHT,...; a name is a domain, or a field, whose weight is split "
        "by rows."
    )
    parser.add_argument(
        "--shards", action=Once, required=True, metavar="MANIFEST", help="manifest.json of the shards, or its folder"
    )
    parser.add_argument("--mix", required=True, metavar="NAME=W,...", help="for example source=0.6,target=0.4")
    parser.add_argument("--final-mix", metavar="NAME=W,...", help="the mix reached linearly after --steps steps")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="reweighting steps (default: %(default)s)")
    parser.add_argument(
        "--samples-per-reweight", type=int, default=64_000, metavar="N", help="samples per step (default: %(default)s)"
    )
    parser.add_argument(
        "--exhausted", choices=EXHAUSTION_RULES, help="rule for all domains (default: repeat source, stop target)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample order (default: %(default)s)")
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of the shard indexes (default: $DMAGENT_CACHE_DIR)")
    add_storage_arguments(parser)
    parser.set_defaults(run=simulate)


def simulate(args: argparse.Namespace) -> int:
    """Prints the number of samples of each domain."""
    for option in ("steps", "samples_per_reweight"):
        if getattr(args, option) < 1:
            raise ConfigurationError(f"--{option.replace('_', '-')} is {getattr(args, option)}; it must be at least 1")
    shards = load_manifest(args.shards)
    collection = ShardCollection.open(shards, cache_dir=args.cache_dir)
    space = DomainSpace.from_names(shards)
    rows = [collection.shard_rows(d) for d in range(len(space))]
    plan = Plan(space, rows, seed=args.seed, exhausted=args.exhausted)
    sizes = plan.num_rows.astype(np.float64)
    first = parse_mix(args.mix, space, sizes)
    final = first if args.final_mix is None else parse_mix(args.final_mix, space, sizes)
    for step in range(args.steps if args.final_mix is not None else 1):
        part = step / max(1, args.steps - 1)
        mix = (1 - part) * first + part * final
        start = step * args.samples_per_reweight
        entry = LedgerEntry(start=start, mix=tuple(mix.tolist()), decided_by=INITIAL, decided_at=start)
        plan.append(entry)
        if plan.end is not None and plan.end <= start + args.samples_per_reweight:
            break
    budget = args.steps * args.samples_per_reweight
    failure = plan.failure
    last = failure[0] if failure is not None else plan.end
    stop = budget if last is None else min(budget, last)
    counts = plan.counts(stop)
    ends = {name: index for index, names in reversed(plan.changes()) for name in names if index <= stop}
    width = max(len("domain"), *(len(name) for name in space.names))
    print(f"{'domain':{width}}  {'rows':>12}  {'samples':>12}  {'share':>7}  {'epochs':>8}  used up at sample")
    for name, total, count in zip(space.names, plan.num_rows, counts, strict=True):
        used_up = f"{ends[name]:,}" if name in ends else "-"
        print(f"{name:{width}}  {total:>12,}  {count:>12,}  {count / stop:>7.2%}  {count / total:>8.2f}  {used_up}")
    reason = "a field is used up" if stop < budget else f"the budget of {args.steps} steps is spent"
    if failure is not None and failure[0] < budget:
        reason = f"the run fails there, because {', '.join(failure[1])} are used up and the rule is 'error'"
    print(f"the run ends after {stop:,} samples (step {stop / args.samples_per_reweight:.1f}): {reason}")
    if args.storage:
        print("\n".join(storage_lines(args, collection, plan.shuffle, counts)))
    return 0 if failure is None or failure[0] >= budget else 1


def parse_mix(text: str, space: DomainSpace, rows: FloatArray) -> FloatArray:
    """``NAME=WEIGHT,...`` over domains and fields as a mix: (D,), sums to 1.

    Raises:
        ConfigurationError: The text cannot be read, has an unknown name, or does not sum to 1.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if name.strip() in weights:
            raise ConfigurationError(f"mix {text!r} names {name.strip()!r} twice: name it once")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise ConfigurationError(
                f"mix {text!r}: {part!r} is not NAME=WEIGHT; write for example source=0.6,target=0.4"
            )
    return space.mix(weights, shares=rows)

"""Rows per second that each loader delivers from the same text in the same mix, against the peers and the limit.

    python benchmarks/throughput.py --data ../shared/data

Makes the data first (benchmarks/data.py). Each measurement is a process of its own, in the environment of its loader;
each round measures all of them in another random order. Before the rounds every loader is checked: the rows that it
delivers must be rows of the shards, recognised by content, in the mix that was asked for. A peer that fails the check
is left out, and the page says why; if ours fails it, nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import measuring
from loaders import LOADERS
from prepared import ROW_TOKENS, Prepared

OURS = "dmagent"
ROWS, BATCHES = "items", "batches"
WORKERS = (0, 1, 2)
WEBDATASET_AIM = {"packed": 10.0, "text": 5.0}
TAR_AIM = 3.0
LIMIT_AIM = 0.6
TITLES = {"packed": f"Packed rows of {ROW_TOKENS:,} tokens", "text": "Rows of text"}

Configuration = tuple[str, str, int]
"""(loader, level, workers)."""


def configurations(names: list[str], kind: str, quick: bool) -> Iterator[Configuration]:
    """Everything that is measured."""
    for name in names:
        entry = LOADERS[name]
        if kind in entry.kinds:
            if ROWS in entry.levels and not (quick and BATCHES in entry.levels):
                yield name, ROWS, 0
            if BATCHES in entry.levels:
                yield from ((name, BATCHES, workers) for workers in ((1,) if quick else WORKERS))


def label(each: Configuration) -> str:
    """Key of a configuration in the results."""
    return "/".join(map(str, each))


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Checks and measures every loader that is asked for and installed, on one kind of rows."""
    environments = data.pythons(args)
    names = [name for name in args.loaders if LOADERS[name].environment in environments]
    prepared = Prepared(args.bench_data / kind)

    def child(command: str, each: Configuration, rows: int) -> dict[str, Any]:
        name, level, workers = each
        words = [command, name, "--data", str(prepared.folder), "--level", level, "--workers", str(workers)]
        words += ["--seconds", str(args.seconds), "--rows", str(rows)]
        return data.run(environments[LOADERS[name].environment], words, args.prefix.split())

    wanted = list(configurations(names, kind, args.quick))
    results: dict[str, Any] = {
        "about": about(prepared),
        "seconds": args.seconds,
        "missing": [LOADERS[name].title for name in args.loaders if name not in names],
        "checks": {},
        "refused": {},
        "first": {},
        "versions": {},
    }

    def rate(each: Configuration) -> float:
        measured = child("convert+check+measure" if args.quick else "measure", each, rows=1_000)
        results["first"].setdefault(label(each), []).append(measured["first"])
        return float(measured["rows_per_second"])

    for each in [] if args.quick else wanted:
        try:
            checked = child("check", each, rows=8_000)
        except SystemExit as error:
            if each[0] == OURS:
                raise
            results["refused"][label(each)] = str(error).strip().splitlines()[-1]
            measuring.say(f"left out {kind}/{label(each)}: {error}")
            continue
        results["versions"] |= checked.pop("versions")
        results["checks"][label(each)] = checked
        measuring.say(f"checked {kind}/{label(each)}: {checked}")
    works = {label(each): (lambda each=each: rate(each)) for each in wanted if label(each) not in results["refused"]}
    results["rates"] = measuring.interleaved(works, args.repeats, loud=kind)
    if not args.quick and any(aim.met is False for aim in aims_of(kind, results)):
        results["profile"] = child("profile", (OURS, BATCHES, 0), rows=0)["profile"]
    return results


def about(prepared: Prepared) -> dict[str, Any]:
    """The size of the data."""
    paths = [Path(tar) for name in prepared.domains for tar in prepared.tars(name)]
    return {
        "domains": len(prepared.domains),
        "shards": len(paths),
        "gigabytes": sum(path.stat().st_size for path in paths) / 1e9,
        "rows": sum(prepared.num_rows(name) for name in prepared.domains),
        "row_bytes": prepared.mean_row_bytes,
    }


def rates_of(results: dict[str, Any], name: str) -> dict[tuple[str, int], list[float]]:
    """(level, workers) -> rows per second of each round."""
    split = {tuple(key.split("/")): values for key, values in results["rates"].items()}
    return {(level, int(workers)): values for (its, level, workers), values in split.items() if its == name}


def best(results: dict[str, Any], names: list[str], level: str) -> tuple[str, list[float]] | None:
    """The fastest of some loaders at a level, each with the workers that suit it, and its rates."""
    candidates = [
        (measuring.median(values), name, values)
        for name in names
        for (its_level, _), values in rates_of(results, name).items()
        if its_level == level
    ]
    return max(candidates)[1:] if candidates else None


def aims(results: dict[str, Any]) -> list[measuring.Aim]:
    return [aim for kind, measured in results.items() for aim in aims_of(kind, measured)]


def aims_of(kind: str, results: dict[str, Any]) -> list[measuring.Aim]:
    """The aims for one kind of rows; each must hold for single rows and for batches."""
    readers = {reads: [n for n, e in LOADERS.items() if e.reads == reads and n != OURS] for reads in ("tar", "own")}
    factor, rows = WEBDATASET_AIM[kind], TITLES[kind].lower()
    found = [
        _aim(results, ["wds"], factor, f"{rows}: >= {factor:g}x webdataset RandomMix"),
        _aim(results, readers["tar"], TAR_AIM, f"{rows}: >= {TAR_AIM:g}x the best other reader of the same tar files"),
        _aim(results, readers["own"], 1.0, f"{rows}: ahead of the best reader of a format of its own"),
    ]
    if kind == "packed":
        found.append(_limit_aim(results, f"{rows}, two cores: >= {LIMIT_AIM:.0%} of reading the same rows by preadv"))
    return found


def _aim(results: dict[str, Any], peers: list[str], factor: float, what: str) -> measuring.Aim:
    ratios, words = [], []
    for level, title in ((ROWS, "rows"), (BATCHES, "batches")):
        ours, peer = best(results, [OURS], level), best(results, peers, level)
        if ours and peer:
            ratios.append(measuring.median_ratio(ours[1], peer[1]))
            words.append(f"{title} {ratios[-1]:.2f}x ({LOADERS[peer[0]].title})")
    return measuring.Aim(what, ", ".join(words) or "-", min(ratios) >= factor if ratios else None)


def _limit_aim(results: dict[str, Any], what: str) -> measuring.Aim:
    limit = best(results, ["limit_rows"], ROWS)
    shares, words = [], []
    for level, title in ((ROWS, "rows"), (BATCHES, "batches")):
        ours = best(results, [OURS], level)
        if ours and limit:
            shares.append(measuring.median_ratio(ours[1], limit[1]))
            words.append(f"{title} {shares[-1]:.0%}")
    return measuring.Aim(what, ", ".join(words) or "-", max(shares) >= LIMIT_AIM if shares else None)


def _bound(results: dict[str, Any]) -> str:
    """What of the limit torch's loader leaves to anyone, and how much of that is ours."""
    rates = {name: best(results, [name], level) for name, level in (("limit_rows", ROWS), ("limit_torch", BATCHES))}
    ours = best(results, [OURS], BATCHES)
    if ours is None or None in rates.values():
        return ""
    read, hand_over = (1e6 / measuring.median(found[1]) for found in rates.values() if found)
    own = 1e6 / measuring.median(ours[1])
    return (
        f"A row in a batch takes this package {own:.1f} us. A bare `preadv` of it takes {read:.1f} us, and torch's "
        f"loader, passing the same ready rows again and again, {hand_over:.1f} us. So nobody can reach more than "
        f"{read / (read + hand_over):.0%} of the limit through that loader, even without a plan, a checksum or a "
        f"decoder; this package reaches {(read + hand_over) / own:.0%} of that. Reading ahead in another thread is "
        "slower: after each `preadv` it needs the interpreter lock, which the delivering thread holds. Mapped files "
        "need no call per row, but a file that is truncated while it is mapped kills the process, where `preadv` "
        "raises an error that names the shard."
    )


def section(results: dict[str, Any]) -> str:
    parts = ["## Delivered samples", _method({measured["seconds"] for measured in results.values()})]
    for kind, measured in results.items():
        size = measured["about"]
        parts += [
            f"### {TITLES[kind]}",
            f"{size['domains']} domains, {size['shards']} shards, {size['rows']:,} rows, {size['gigabytes']:.2f} GB; "
            f"{size['row_bytes']:,.0f} bytes a row on average in this mix.",
            _table(kind, measured),
            f"![Rows per second of each loader, {kind}](images/bench_throughput_{kind}.png)",
        ]
        if measured["missing"]:
            parts.append(f"Not installed, so not measured: {', '.join(measured['missing'])}.")
        if refused := measured.get("refused"):
            reasons = "; ".join(f"`{name}` ({reason})" for name, reason in refused.items())
            parts.append(f"Failed the check, so not measured: {reasons}.")
        if "profile" in measured:
            parts.append("Profile of this package (batches without workers, cProfile, own time of each function):")
            parts.append(measured["profile"])
        if kind == "packed" and (bound := _bound(measured)):
            parts.append(bound)
    return "\n\n".join([*parts, FAIRNESS.strip(), measuring.aims_table(aims(results))])


def _method(seconds: set[float]) -> str:
    timed = " or ".join(f"{each:g}" for each in sorted(seconds, reverse=True))
    return f"""\
All loaders deliver the same rows in the same unequal, static mix; files are in the page cache. Each loader was checked
first: it delivers rows of the shards, recognised by their whole content, in the requested mix. Each measurement is a
separate process, warmed up and then timed for {timed} seconds; every round goes through all of them in another random
order.

- *rows/s*: single decoded rows from the loader's iterator, without workers.
- *batches, N workers*: rows per second in batches of 32 from the loader's own DataLoader, texts as a list, tokens as
  one int64 tensor. All collate alike: rows are stacked as they are stored and widened at once.
- *ours / it*: this package over that loader, each with the workers that suit it; median of the ratios of the rounds.
- *spread*: largest minus smallest over the median, the worst of the row. *first*: seconds from opening the data to the
  first batch, without workers."""


def _table(kind: str, results: dict[str, Any]) -> str:
    header = ["loader", "rows/s", *(f"batches, {w} workers" for w in WORKERS)]
    header += ["M tokens/s" if kind == "packed" else "MB/s", "ours / it, rows", "batches", "spread", "first"]
    unit = ROW_TOKENS if kind == "packed" else results["about"]["row_bytes"]
    rows = []
    for name, entry in LOADERS.items():
        rates = rates_of(results, name)
        if not rates:
            continue
        medians = {key: measuring.median(values) for key, values in rates.items()}
        ratios = []
        for level in (ROWS, BATCHES):
            ours, its = best(results, [OURS], level), best(results, [name], level)
            ratios.append(f"{measuring.median_ratio(ours[1], its[1]):.2f}" if ours and its else None)
        first = results["first"].get(label((name, BATCHES, 0)))
        rows.append(
            [
                f"**{entry.title}**" if name == OURS else entry.title,
                *(medians.get(key) for key in ((ROWS, 0), *((BATCHES, workers) for workers in WORKERS))),
                max(medians.values()) * unit / 1e6,
                *ratios,
                f"{max(measuring.spread(values) for values in rates.values()):.0%}",
                measuring.median(first) if first else None,
            ]
        )
    return measuring.table(header, rows)


FAIRNESS = """\
How to read this table:

- In favour of the others: this package shuffles, verifies a checksum for each row, and keeps the mix exactly at every
  prefix; the tar readers, litdata and the Arrow copies run without a shuffle. litdata stops at the end of its first
  domain; the time to restart it is not counted. Their own formats, and energon's index files, were written beforehand.
- In favour of this package: no other shuffle buffer or cache was tuned, and only one machine with local files was
  measured; reading from remote storage is another matter.
- This package reads packed rows a batch at a time (`decode="lazy"` with `collate_packed`, see
  [A loop of your own](trainers/plain-loop.md#faster-batches-of-packed-rows)); *rows/s* is without that. Texts are read
  row by row.
- With workers, the time that torch takes to pass a batch from process to process bounds the others: the limit *by
  torch* passes the same ready batch again and again. This package passes batches of packed rows through shared memory
  that it uses again; texts take torch's way.
- This package adds keys, domains and indices to each batch; Megatron-core adds labels, a loss mask and positions, which
  it does not collate in one step; the others deliver only tokens. Megatron-core and the Arrow copies compute the order
  of the whole run first.
"""


def charts(results: dict[str, Any], folder: Path) -> None:
    """A bar for each loader and level."""
    from matplotlib.figure import Figure

    shades = {(ROWS, 0): "#111111", (BATCHES, 0): "#0b3c6f", (BATCHES, 1): "#4f86bd", (BATCHES, 2): "#a9c9e6"}
    titles = {(ROWS, 0): "rows", **{(BATCHES, w): f"batches, {w} workers" for w in WORKERS}}
    for kind, measured in results.items():
        names = [name for name in LOADERS if rates_of(measured, name)]
        figure = Figure(figsize=(9, 0.75 * len(names) + 1.2), layout="constrained")
        axes = figure.subplots()
        for place, (key, shade) in enumerate(shades.items()):
            at, lengths, errors = [], [], [[], []]
            for row, name in enumerate(names):
                values = rates_of(measured, name).get(key)
                if values:
                    middle = measuring.median(values)
                    at.append(row + 0.2 * (place - 1.5))
                    lengths.append(middle)
                    errors[0].append(middle - min(values))
                    errors[1].append(max(values) - middle)
            if at:
                axes.barh(at, lengths, 0.18, xerr=errors, color=shade, label=titles[key], ecolor="#888888")
        axes.set_yticks(range(len(names)), [LOADERS[name].title for name in names])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("rows per second (log scale); lines: smallest and largest repeat")
        axes.set_title(TITLES[kind], loc="left", fontweight="bold")
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.set_xlim(left=100)
        figure.legend(loc="outside lower center", ncols=len(shades), fontsize=9)
        figure.savefig(folder / f"bench_throughput_{kind}.png", dpi=110)


def main() -> None:
    parser = measuring.parser(__doc__, "throughput", parts=data.KINDS)
    data.options(parser)
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: %(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.seconds = 1, 0.2
    data.make(args)
    parts = {kind: (lambda kind=kind: measure(kind, args)) for kind in data.KINDS}
    results = measuring.measured_parts(args, parts)
    print(section(results))
    measuring.save(args, results, {name: v for part in results.values() for name, v in part["versions"].items()})


if __name__ == "__main__":
    main()

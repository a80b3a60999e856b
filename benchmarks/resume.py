"""How long a run takes to go on: seconds from a saved state to the first sample, after 1e3 ... 1e9 consumed samples.

    python benchmarks/resume.py [--streaming-python PYTHON]

Ours in a new process and inside one, with 52 and with 1,000 domains; and, from the same shards, loaders that skip what
they have consumed (webdataset, datasets, accelerate) or keep a state of their own (datasets, mosaicml-streaming, which
needs an environment of its own). Peers run as far as their time allows; beyond, the straight line through their last
points is followed, and the tables say so.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import resume_peers
from measuring import Aim, aims_table, measured_parts, median, number, parser, save, say, table
from resume_ours import CONSUMED, MOST_DECISIONS, ROWS, TOO_LONG, Ours

DOMAINS = (52, 1000)
PEER_CONSUMED = (1000, 3000, 10_000)
BOUNDED = "datasets, load_state_dict()"
"""This peer skips inside a shard only, so that its line ends where its shards do, and is not followed."""

STREAMING_CONSUMED = (1000, 10_000, 100_000, 1_000_000, 10_000_000)
PARTS = ("few_domains", "many_domains", "long_ledgers", "peers", "streaming")
_HERE = Path(__file__).parent


def peers(ours: Ours, repeats: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Each peer as far as it comes in reasonable time."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, resume in resume_peers.IN_THIS_ENVIRONMENT.items():
        found[name] = []
        for consumed in PEER_CONSUMED[: 1 if quick else None]:
            times = [resume(ours.shards, consumed) for _ in range(repeats)]
            found[name].append({"consumed": consumed, "seconds": times})
            say(f"{name}, {consumed:.0e}: {median(times):.2f} s")
            if median(times) > TOO_LONG:
                break
    return found


def streaming(python: str | None, folder: Path, repeats: int, quick: bool) -> list[dict[str, Any]] | None:
    """mosaicml-streaming in its own environment; None without one."""
    if python is None:
        say("mosaicml-streaming left out: pass the Python of an environment that has it as --streaming-python")
        return None
    found = []
    for consumed in STREAMING_CONSUMED[: 1 if quick else None]:
        settings = {
            "folder": str(folder / "mds"),
            "domains": 52,
            "rows": 20 if quick else ROWS[52],
            "consumed": consumed,
        }
        path = folder / "streaming.json"
        path.write_text(json.dumps(settings))
        command = [python, str(_HERE / "resume_peers.py"), "streaming", str(path)]
        times = []
        for _ in range(repeats):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
            times.append(json.loads(done.stdout.splitlines()[-1])["seconds"])
        found.append({"consumed": consumed, "seconds": times})
        say(f"mosaicml-streaming, {consumed:.0e}: {median(times):.2f} s")
        if median(times) > TOO_LONG:
            break
    return found


def straight_line(name: str, points: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Seconds per sample along a peer's two last points, and how straight its points lie; None: they do not grow.

    Straight is how much of the last increase per sample the one before it had; 1 is a straight line.
    """
    if len(points) < 3 or name == BOUNDED:
        return None
    (n0, t0), (n1, t1), (n2, t2) = [(p["consumed"], median(p["seconds"])) for p in points[-3:]]
    slope = (t2 - t1) / (n2 - n1)
    return (slope, (t1 - t0) / (n1 - n0) / slope) if slope * n2 > t2 / 2 else None


def aims(results: dict[str, Any]) -> list[Aim]:
    """Below a second for 1,000 domains, whatever was consumed."""
    ours = results["many_domains"]
    slowest = max(ours, key=lambda row: median(row["inside"]))
    full = [row for row in ours if row["decisions"] == ours[-1]["decisions"]]
    flat = median(full[-1]["inside"]) / median(full[0]["inside"])
    longest = [row for row in results["long_ledgers"] if row["domains"] == DOMAINS[-1]][-1]
    long = median(longest["inside"])
    most = median(slowest["inside"])
    return [
        Aim("resuming with 1,000 domains takes < 1 s, after 1e3 ... 1e9 samples", f"{number(most)} s", most < 1),
        Aim(
            f"it is flat: after {full[-1]['consumed']:.0e} samples as after {full[0]['consumed']:.0e}, both with "
            f"{full[0]['decisions']} decisions (at most 1.25 times)",
            f"{number(flat)} times",
            flat <= 1.25,
        ),
        Aim(
            f"resuming with 1,000 domains takes < 1 s after {longest['decisions']:,} decisions, too",
            f"{number(long)} s",
            long < 1,
        ),
    ]


def section(results: dict[str, Any]) -> str:
    """Markdown of all tables."""
    parts = [
        "## Resuming",
        "Seconds from a saved state to the first sample, inside a process, with the shards open. A decision every "
        f"64,000 samples up to {MOST_DECISIONS} (the paper's number), later spread evenly. The other loaders read the "
        "same 52 domains with a mix that cannot change; values marked ~ are extrapolated along the straight line "
        "through a loader's last two points.",
        "![Seconds to resume](images/bench_resume.png)",
        _against_peers(results),
        "The steps of this package, in seconds. *Open* builds the sampler from cached indexes; *load* reads the JSON "
        "state, checks it against the shards, and replays the ledger.",
        _steps([*results["few_domains"], *results["many_domains"]]),
        f"After {CONSUMED[-1]:.0e} samples, by the number of decisions in the ledger:",
        _steps(results["long_ledgers"]),
        "Profile of the last line (inside a process, cProfile, own time of each function):",
        results["long_ledgers"][-1]["profile"],
    ]
    return "\n\n".join([*parts, aims_table(aims(results))])


def _against_peers(results: dict[str, Any]) -> str:
    ours = {
        f"ours, {domains:,} domains": {
            r["consumed"]: r["inside"]
            for r in [*results["few_domains"], *results["many_domains"]]
            if r["domains"] == domains
        }
        for domains in DOMAINS
    }
    measured = _peer_points(results)
    rows = []
    for consumed in CONSUMED:
        cells: list[str] = [_duration(median(times[consumed])) if consumed in times else "-" for times in ours.values()]
        for name, points in measured.items():
            times = next((p["seconds"] for p in points if p["consumed"] == consumed), None)
            line = straight_line(name, points)
            if times is not None:
                cells.append(_duration(median(times)))
            elif line is not None and consumed > points[-1]["consumed"]:
                cells.append("~" + _duration(_followed(points, line[0], consumed)))
            else:
                cells.append("-")
        rows.append((f"{consumed:.0e}", *cells))
    text = table(("consumed", *ours, *measured), rows)
    straight = [
        f"{name}: {1e6 * line[0]:.3g} µs per sample; the slope before that was {line[1]:.2f} times as steep"
        for name, points in measured.items()
        if (line := straight_line(name, points)) is not None
    ]
    return text + ("\n\nThe straight lines: " + "; ".join(straight) + "." if straight else "")


def _our_points(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {f"ours, {rows[0]['domains']:,} domains": rows for rows in (results["few_domains"], results["many_domains"])}


def _peer_points(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    measured = dict(results["peers"])
    if results.get("streaming"):
        measured["mosaicml-streaming, load_state_dict()"] = results["streaming"]
    return measured


def _followed(points: list[dict[str, Any]], slope: float, consumed: int) -> float:
    return median(points[-1]["seconds"]) + slope * (consumed - points[-1]["consumed"])


def _steps(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        steps = {name: median(run[name] for run in row["fresh"]) for name in ("import", "open", "load", "first")}
        size = f"{row['state_bytes'] / 1e3:,.1f}"
        cells.append(
            (
                f"{row['domains']:,}",
                f"{row['consumed']:.0e}",
                f"{row['decisions']:,}",
                size,
                median(row["inside"]),
                *steps.values(),
            )
        )
    header = ("domains", "consumed", "decisions", "state, kB", "inside a process", "new one: import", "open", "load")
    return table((*header, "first sample"), cells)


def _duration(value: float) -> str:
    """Seconds, from two minutes on in minutes, hours or days."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return f"{number(value / length)} {unit}"
    return f"{number(value)} s"


def charts(results: dict[str, Any], folder: Path) -> None:
    """``bench_resume.png``: seconds against samples consumed; dotted where a line is only followed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for name, rows in _our_points(results).items():
        axis.plot([row["consumed"] for row in rows], [median(row["inside"]) for row in rows], "o-", label=name)
    for name, points in _peer_points(results).items():
        (drawn,) = axis.plot(
            [p["consumed"] for p in points], [median(p["seconds"]) for p in points], "s--", markersize=4, label=name
        )
        line = straight_line(name, points)
        if line is not None:
            ends = [points[-1]["consumed"], CONSUMED[-1]]
            axis.plot(ends, [_followed(points, line[0], end) for end in ends], ":", color=drawn.get_color())
    axis.set(xscale="log", yscale="log", xlabel="samples consumed", ylabel="seconds to the next sample")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "bench_resume.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__, "resume", parts=PARTS)
    options.add_argument("--data", type=Path, help="folder for shards that are made once (default: a temporary one)")
    options.add_argument("--streaming-python", help="Python of an environment with mosaicml-streaming")
    args = options.parse_args()
    repeats, quick = (1 if args.quick else args.repeats), args.quick
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or Path(scratch)
        ours = {domains: Ours(data, domains, quick) for domains in DOMAINS}
        results = measured_parts(
            args,
            {
                "few_domains": lambda: ours[DOMAINS[0]].whole_run(repeats, quick),
                "many_domains": lambda: ours[DOMAINS[1]].whole_run(repeats, quick),
                "long_ledgers": lambda: [row for run in ours.values() for row in run.long_ledgers(repeats, quick)],
                "peers": lambda: peers(ours[DOMAINS[0]], repeats, quick),
                "streaming": lambda: streaming(args.streaming_python, data, repeats, quick),
            },
        )
    save(args, results)
    if len(results) == len(PARTS):
        print(section(results))


if __name__ == "__main__":
    main()

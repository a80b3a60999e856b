"""What all benchmark programs share: repeats, the machine, results as JSON, tables.

A benchmark program ``benchmarks/NAME.py``

- is a script with the options of :func:`parser`; it prints its table and calls :func:`save` once, with ``results``: a
  JSON-serialisable dict of raw repeats and of what is needed to describe them;
- defines ``section(results) -> str``, the Markdown of its section in docs/benchmarks.md, from ``## Title`` to the table
  of its aims (:func:`aims_table`), with no figure that is not taken from ``results``;
- defines ``aims(results) -> list[Aim]``: the summary at the top of the page is made from them;
- may define ``charts(results, folder) -> None``, which writes ``folder/bench_*.png``.

``benchmarks/report.py`` lists the programs and writes the page.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import importlib.metadata
import json
import os
import platform
import pstats
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("dmagent-loader", "torch", "numpy", "webdataset", "transformers", "lm-eval", "datasets", "isal")
PROFILED = 15
"""Functions in a profile."""

SCHEMA_VERSION = 1
_STARTED = time.time()
_part_minutes: dict[str, float] = {}


def parser(doc: str, name: str, repeats: int = 5, parts: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Options that every program has: ``--output``, ``--repeats`` and ``--quick``.

    Args:
        doc: The program's docstring.
        name: Of the program; its results go to ``benchmarks/results/NAME.json`` unless told otherwise.
        repeats: Default of ``--repeats``. What is published has at least 5.
        parts: Names of the parts of a program that can be measured one after the other (``--parts``), for
            :func:`measured_parts`.
    """
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="results, as JSON")
    options.add_argument("--repeats", type=int, default=repeats, help="of each measurement (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="one short repeat, to see that the program runs")
    if parts:
        options.add_argument("--parts", nargs="+", choices=parts, help="measure these, keep the rest of --output")
    return options


def measured_parts(args: argparse.Namespace, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Measures a program's parts: all, or those that ``--parts`` names, beside the results that ``--output`` holds.

    Args:
        args: Of :func:`parser`, which was given the names of the parts.
        parts: Name -> measurement, in order.

    Returns:
        Name -> what the measurement returned, or what an earlier call has saved of it.
    """
    kept: dict[str, Any] = {}
    if args.parts and set(args.parts) != set(parts):
        earlier = load(args.output) if args.output.exists() else {"quick": args.quick, "results": {}}
        if earlier["quick"] != args.quick:
            raise SystemExit(f"{args.output} is of a run with another --quick: its parts cannot be joined")
        kept = earlier["results"]
        _part_minutes.update(earlier.get("part_minutes", {}))
    results = {}
    for name, measure in parts.items():
        if not args.parts or name in args.parts:
            started = time.time()
            results[name] = measure()
            _part_minutes[name] = round((time.time() - started) / 60, 2)
        elif name in kept:
            results[name] = kept[name]
    return results


def say(line: str) -> None:
    """Progress, for whoever waits."""
    print(line, file=sys.stderr, flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock duration of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleaved(
    works: Mapping[str, Callable[[], float]], repeats: int, *, seed: int = 0, loud: str | None = None
) -> dict[str, list[float]]:
    """Calls every work ``repeats`` times, each round in another random order.

    What disturbs a machine for a while then disturbs all of them, so ratios between the results stay fair.

    Args:
        works: Name -> work that returns its own measurement.
        repeats: Rounds.
        seed: Of the order.
        loud: Say each measurement, after this word.

    Returns:
        Name -> one measurement for each round.
    """
    order = random.Random(seed)
    values: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        names = list(works)
        order.shuffle(names)
        for name in names:
            values[name].append(works[name]())
            if loud is not None:
                say(f"{loud} {turn + 1}/{repeats} {name}: {number(values[name][-1])}")
    return values


def median(values: Iterable[float]) -> float:
    """Median; everything that is published is one."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how much of a difference may be chance."""
    return (max(values) - min(values)) / median(values)


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median over the rounds of ours / peer, for results of :func:`interleaved`."""
    return median(a / b for a, b in zip(ours, peer, strict=True))


@dataclasses.dataclass(frozen=True)
class Aim:
    """What was aimed at, and what was measured.

    Attributes:
        what: The aim in words, with its bound: ``decision of the agent at step 80 < 5 ms``.
        measured: The measured figure with its unit: ``4.1 ms``.
        met: Whether the measurement meets the aim; None where it could not be measured, and ``measured`` says why.
    """

    what: str
    measured: str
    met: bool | None


def aims_table(aims: Sequence[Aim]) -> str:
    """Markdown table of aims."""
    return table(("aim", "measured", ""), [aim_cells(aim) for aim in aims], right=False)


def aim_cells(aim: Aim) -> tuple[str, str, str]:
    """An aim as the cells of a table's row."""
    return aim.what, aim.measured, {True: "met", False: "**not met**", None: "not measured"}[aim.met]


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: bool = True) -> str:
    """Markdown table that also reads well in a terminal.

    Args:
        header: Names of the columns.
        rows: Cells; floats are written by :func:`number`, None as a dash.
        right: Whether the columns after the first are aligned to the right.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [list(header), *cells])) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if right and i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * (w - 1) + ":" if right and i else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rules), *(line(row) for row in cells)])


def profiled(work: Callable[[], object]) -> str:
    """Markdown table of the functions in which one call spends its time (cProfile: own time of each)."""
    profiler = cProfile.Profile()
    profiler.enable()
    work()
    profiler.disable()
    stats = pstats.Stats(profiler)
    total = stats.total_tt  # type: ignore[attr-defined]
    lines = []
    for (file, line, function), (_, calls, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        place = function if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{line} {function}"
        lines.append((own, (f"`{place}`", calls, f"{own / total:.1%}")))
    lines.sort(reverse=True)
    return table(("function", "calls", "share"), [line for _, line in lines[:PROFILED]])


def number(value: float) -> str:
    """Three significant digits, thousands separated: ``0.00123``, ``12.3``, ``1,230``."""
    if value == 0 or value != value:
        return f"{value:g}"
    if abs(value) >= 100:
        digits = len(str(int(abs(value))))
        return f"{round(value, 3 - digits):,.0f}"
    text = f"{value:.3g}"
    return f"{value:.2e}" if "e" in text else text


def machine(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """The machine and the versions, without what names the machine or its folders."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions(packages),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version, for those that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(args: argparse.Namespace, results: Mapping[str, Any], packages: Mapping[str, str] | None = None) -> None:
    """Writes the results with the machine and the command, for benchmarks/report.py.

    Args:
        args: Of :func:`parser`.
        results: What ``section`` and ``charts`` of the program take.
        packages: Versions of packages that lie in other environments.
    """
    machine_ = machine()
    machine_["packages"] = {**machine_["packages"], **(packages or {})}
    record = {
        "schema_version": SCHEMA_VERSION,
        "command": _command(),
        "quick": bool(args.quick),
        "minutes": round(sum(_part_minutes.values()) or (time.time() - _STARTED) / 60, 1),
        "part_minutes": _part_minutes,
        "machine": machine_,
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"results: {args.output}", file=sys.stderr)


def load(path: Path) -> dict[str, Any]:
    """A record of :func:`save`."""
    record: dict[str, Any] = json.loads(path.read_text())
    if record.get("schema_version") != SCHEMA_VERSION:
        raise SystemExit(
            f"{path} has schema {record.get('schema_version')}, not {SCHEMA_VERSION}: run its program again"
        )
    return record


def _command() -> str:
    """The command line that measures all parts; of absolute paths only the last part, they belong to one machine."""
    words, in_parts = ["python", f"benchmarks/{Path(sys.argv[0]).name}"], False
    for word in sys.argv[1:]:
        in_parts = word == "--parts" or (in_parts and not word.startswith("-"))
        if not in_parts:
            words.append(Path(word).name if word.startswith("/") else word)
    return " ".join(words)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""

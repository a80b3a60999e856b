"""Writes docs/benchmarks.md and its charts from the results of all benchmark programs.

    python benchmarks/report.py

Reads ``benchmarks/results/NAME.json`` of every program in :data:`PROGRAMS`, asks the program for its section, its aims
and its charts, and puts them together. No figure is typed by hand. Results that are missing are left out and named.
What disturbed the machine during the run is said in ``benchmarks/results/remarks.md``, by whoever ran it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import measuring

PROGRAMS = ("throughput", "dynamics", "resume", "scale", "environment")
"""In the order of their sections. Names of modules of this folder."""

DOCS = Path(__file__).parent.parent / "docs"

HEAD = """\
# Benchmarks

Written by `make bench` from the measurements of the programs in `benchmarks/`; the raw repeats are in
`benchmarks/results/`. Rates and ratios are medians of at least five repeats; ratios compare measurements of the same
run on the same machine. First calls, one-time builds and the runs of the Trainer were measured once. Profiles name
functions as they were called at the time of the run.
"""


def page(records: dict[str, dict[str, Any]], remarks: str = "") -> str:
    """The whole page.

    Args:
        records: Name of the program -> its record, as :func:`measuring.save` wrote it.
        remarks: On the circumstances of the run.
    """
    programs = {name: importlib.import_module(name) for name in records}
    sections = {name: programs[name].section(record["results"]).strip() for name, record in records.items()}
    rows = [
        (*measuring.aim_cells(aim), f"[{name}](#{_anchor(sections[name])})")
        for name, record in records.items()
        for aim in programs[name].aims(record["results"])
    ]
    parts = [HEAD]
    if any(record["quick"] for record in records.values()):
        parts.append(
            "**These are figures of `make bench-quick`: one short repeat. They only show that the programs run.**"
        )
    parts += [
        _machine(records),
        *([remarks] if remarks else []),
        "## Aims",
        measuring.table(("aim", "measured", "", "section"), rows, right=False),
    ]
    for name, record in records.items():
        parts += [sections[name], f"`{record['command']}`, {record['minutes']:g} minutes."]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _machine(records: dict[str, dict[str, Any]]) -> str:
    """One description for each machine, with the programs that ran on it where they differ."""
    by_machine: dict[str, list[str]] = {}
    packages: dict[str, set[str]] = {}
    for name, record in records.items():
        machine = record["machine"]
        words = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB, {machine['system']}"
        by_machine.setdefault(f"{words}, Python {machine['python']}", []).append(name)
        for package, version in machine["packages"].items():
            packages.setdefault(package, set()).add(version)
    lines = [f"- {', '.join(names)}: {words}." for words, names in by_machine.items()]
    if len(by_machine) == 1:
        lines = [f"Machine: {words}." for words in by_machine]
    names = [f"{package} {' and '.join(sorted(found))}" for package, found in sorted(packages.items())]
    return "\n".join(lines) + f"\n\nVersions: {', '.join(names)}."


def _anchor(section: str) -> str:
    """The anchor that GitHub gives the first heading of a section."""
    title = section.splitlines()[0].lstrip("#").strip().lower()
    return "".join(c for c in title.replace(" ", "-") if c.isalnum() or c in "-_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="folder of NAME.json files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write benchmarks.md and images/ into")
    args = parser.parse_args()
    files = {name: args.results / f"{name}.json" for name in PROGRAMS}
    missing = [name for name, path in files.items() if not path.exists()]
    if missing:
        print(f"no results of {', '.join(missing)}: left out of the page", file=sys.stderr)
    records = {name: measuring.load(path) for name, path in files.items() if name not in missing}
    images = args.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, record in records.items():
        charts = getattr(importlib.import_module(name), "charts", None)
        if charts is not None:
            charts(record["results"], images)
    remarks = args.results / "remarks.md"
    (args.docs / "benchmarks.md").write_text(page(records, remarks.read_text() if remarks.exists() else ""))
    print(args.docs / "benchmarks.md")


if __name__ == "__main__":
    main()

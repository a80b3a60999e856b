"""How the loader grows: 10,000 ranks, 1,000 domains, 1,000,000 shards, simulated in one process.

    python benchmarks/scale.py

The plan needs no other process, so that a rank of any number of ranks can be measured by itself. Measured are: planning
1,024 samples of one rank as each size grows tenfold; the same against drawing domains independently with numpy, and
against a blend as Megatron-core makes it; memory; how fast shards are indexed (against Python's tarfile, and against
reading the same bytes) and opened again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import scale_plan
import scale_shards
from measuring import Aim, aims_table, measured_parts, median, median_ratio, number, parser, save, say, table

MANY_SHARDS = 1_000_000
ROWS, ROW_BYTES = 4, 200
"""Of a tiny shard."""

PARTS = ("growth", "profile", "peers", "plan_memory", "index", "collections", "whole")
_R = TypeVar("_R")


def in_fresh_process(work: Callable[..., _R], *args: Any) -> _R:
    """Calls a function in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def collections(data: Path, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Opening many tiny shards: the first time, when they are indexed, and again; in fresh processes."""
    counts = (100, 400) if quick else scale_shards.COUNTS
    folder = data / f"tiny-{max(counts)}"
    scale_shards.write_shards(folder, max(counts), ROWS, ROW_BYTES)
    found = []
    for count in counts:
        cache = data / "index-cache"
        shutil.rmtree(cache, ignore_errors=True)
        first = in_fresh_process(scale_shards.collection, str(folder), count, str(cache))
        again = [in_fresh_process(scale_shards.collection, str(folder), count, str(cache)) for _ in range(repeats)]
        shutil.rmtree(cache, ignore_errors=True)
        found.append({"shards": count, "first": first, "again": again})
        say(f"{count} shards: indexed in {first['open_seconds']:.1f} s")
    return found


def whole(data: Path, repeats: int, quick: bool) -> dict[str, Any]:
    """A sampler over `MANY_SHARDS` links to few shards, in fresh processes: once from their own indexes, then again."""
    shards = 2_000 if quick else MANY_SHARDS
    paths = scale_shards.write_shards(data / "few", -(-shards // scale_shards.LINKS_OF_A_FILE), ROWS, ROW_BYTES)
    cache = data / "links-cache"
    folders = scale_shards.link_shards(paths, data / f"links-{shards}", cache, shards)
    shutil.rmtree(cache / "overview", ignore_errors=True)
    first = in_fresh_process(scale_shards.sampler, folders, str(cache))
    again = [in_fresh_process(scale_shards.sampler, folders, str(cache)) for _ in range(repeats)]
    for measured in (first, *again):
        say(f"{shards} shards: opened in {measured['open_seconds']:.1f} s, {measured['peak_mb']:.1f} MB")
    return {"first": first, "again": again}


def aims(results: dict[str, Any]) -> list[Aim]:
    """Planning below 1 ms per 1,024 samples, memory below 200 MB."""
    largest = results["growth"]["ranks"][-1]
    # Each size was varied from this point, which so was measured several times.
    same = [p for points in results["growth"].values() for p in points if _sizes(p) == _sizes(largest)]
    planned = median([ms for p in same for ms in p["own_ms"]])
    whole = results["whole"]
    whole_mb = max(run["peak_mb"] for run in (whole["first"], *whole["again"]))
    called = median([ms for p in same for ms in p["call_ms"]])
    sizes = f"{largest['ranks']:,} ranks, {largest['domains']:,} domains, {largest['shards']:,} shards"
    return [
        Aim(
            f"planning 1,024 samples of one rank takes < 1 ms in full run ({sizes})",
            f"{number(planned)} ms ({number(called)} ms in a call of its own)",
            planned < 1,
        ),
        Aim(
            f"a sampler over {whole['first']['shards']:,} shards needs < 200 MB in a process",
            f"{number(whole_mb)} MB",
            whole_mb < 200,
        ),
    ]


def _sizes(point: dict[str, Any]) -> list[int]:
    return [point[name] for name in scale_plan.VARIED]


def section(results: dict[str, Any]) -> str:
    """Markdown of all tables."""
    parts = [
        "## Scale",
        "The base case has 1,000 domains, 1,000,000 shards of 500 to 1,500 rows, 10,000 ranks and 80 decisions; each "
        "row changes one size. Milliseconds for 1,024 samples of one rank, 10,000 apart, long after the start "
        "(sample 1,000,000,000): as a running loader plans them, 16,384 per call; 1,024 per call; and the first call. "
        "(With 10,000 shards, 16,384 samples of one rank span 16 passes over all data, each of which begins with an "
        "order of the shards of every domain.)",
        "![Planning time as each size grows](images/bench_scale.png)",
    ]
    header = ("", "in full run", "in one call", "first call", "a new mix", "building the plan")
    rows = []
    for name, points in results["growth"].items():
        for p in points:
            cells = (median(p["own_ms"]), median(p["call_ms"]), p["first_ms"], p["append_ms"], p["build_ms"])
            rows.append((f"{p[name]:,} {name}", *cells))
    profile = (
        "Profile of planning in a running loader, at these sizes (cProfile, own time of each function):\n\n"
        + results["profile"]
    )
    parts += [table(header, rows), profile, _peers(results["peers"]), _memory(results), _index(results["index"])]
    return "\n\n".join([*parts, aims_table(aims(results))])


def _peers(peers: list[dict[str, Any]]) -> str:
    rows = []
    for row in peers:
        cells: list[object] = [f"{row['domains']:,}", median(row["plan"])]
        for name in ("draws", "blend"):
            cells += [median(row[name]), median_ratio(row["plan"], row[name])] if name in row else [None, None]
        rows.append(cells)
    header = ("domains", "plan", "numpy draws", "plan / draws", "Megatron-core blend", "plan / blend")
    return (
        "1,024 consecutive samples, ms. Independent draws by numpy keep no mix, name no row and cannot be resumed. The "
        "blend (`build_blending_indices`, C++) is fixed for all samples before the run begins, and names no row "
        "either.\n\n" + table(header, rows)
    )


def _memory(results: dict[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for row in results["collections"]:
        first, again = row["first"], row["again"]
        cells = [median(a[name] for a in again) for name in ("open_seconds", "fingerprint_seconds", "peak_mb")]
        rows.append((f"{row['shards']:,}", first["open_seconds"], *cells))
    first, again = results["whole"]["first"], results["whole"]["again"]
    tail = [median(a[name] for a in again) for name in ("open_seconds", "fingerprint_seconds", "peak_mb")]
    rows.append((f"{first['shards']:,}, a sampler", None, *tail))
    header = ("tiny shards", "indexed and opened, s", "opened again, s", "fingerprint, s", "memory, MB")
    plan = median(run["peak_mb"] for run in results["plan_memory"])
    sizes = results["plan_memory"][0]
    return (
        "Opening real shards of 4 rows of 200 bytes, in 1,000 domains, each time in a new process; after the first "
        "time the indexes are cached. Memory: the peak of the collection and of reading 1,024 rows, above the imports. "
        "The last line opens links to a few such shards, as a whole sampler with "
        f"{first['decisions']} changes of the mix, and computes the fingerprint as it opens. "
        "If every shard's own index has to be read, because the overviews "
        f"are missing, it takes {number(first['open_seconds'])} s and {number(first['peak_mb'])} MB, measured once.\n\n"
        + table(header, rows)
        + f"\n\nThe plan alone, with {sizes['shards']:,} shards, {sizes['domains']:,} domains and "
        f"{sizes['decisions']} decisions, after 64 x 1,024 samples of one of {sizes['ranks']:,} ranks: "
        f"{number(plan)} MB (measured)."
    )


def _index(kinds: list[dict[str, Any]]) -> str:
    rows = []
    for kind in kinds:
        times = {name: median(values) for name, values in kind["seconds"].items()}
        for cache in ("cold", "warm"):
            one, eight = times[f"{cache} index 1"], times[f"{cache} index 8"]
            best = min(one, eight)
            rows.append(
                (
                    f"{kind['kind']}, {cache}",
                    f"{kind['mb'] / one:,.0f}",
                    f"{kind['mb'] / eight:,.0f}",
                    kind["shards"] / best,
                    kind["rows"] / best,
                    times[f"{cache} tarfile"] / best,
                    times[f"{cache} read"] / best,
                )
            )
    header = ("rows", "MB/s, 1 thread", "MB/s, 8 threads", "shards/s", "rows/s", "x tarfile", "of reading")
    return (
        "Indexing (every byte is read and checked), from the disk and from the page cache. *x tarfile*: speed relative "
        "to listing the members with Python's tarfile, which skips the payloads. *Of reading*: share of the speed at "
        "which one thread reads the same bytes and does nothing else.\n\n" + table(header, rows)
    )


def charts(results: dict[str, Any], folder: Path) -> None:
    """``bench_scale.png``: planning against each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results["growth"]), figsize=(12, 3.2), sharey=True)
    for axis, (name, points) in zip(axes, results["growth"].items(), strict=True):
        sizes = [p[name] for p in points]
        axis.plot(sizes, [median(p["own_ms"]) for p in points], "o-", label="in full run")
        axis.plot(sizes, [median(p["call_ms"]) for p in points], "s--", label="in one call")
        axis.axhline(1, color="grey", linewidth=1, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel=name)
    axes[0].set_ylabel("ms per 1,024 samples")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "bench_scale.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__, "scale", parts=PARTS)
    options.add_argument("--data", type=Path, help="folder for shards that are made once (default: a temporary one)")
    args = options.parse_args()
    repeats, quick = (1 if args.quick else args.repeats), args.quick
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or Path(scratch)
        results = measured_parts(
            args,
            {
                "growth": lambda: scale_plan.growth(repeats, quick),
                "profile": lambda: scale_plan.profile(quick),
                "peers": lambda: scale_plan.against_peers(repeats, quick),
                "plan_memory": lambda: [in_fresh_process(scale_plan.memory, quick) for _ in range(repeats)],
                "index": lambda: scale_shards.index_rates(data, repeats, quick),
                "collections": lambda: collections(data, repeats, quick),
                "whole": lambda: whole(data, repeats, quick),
            },
        )
    save(args, results)
    if len(results) == len(PARTS):
        print(section(results))


if __name__ == "__main__":
    main()

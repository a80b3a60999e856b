"""``dmagent state`` describes a saved run and compares it with shards; ``dmagent replay`` lists its samples."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmagent_loader._run.differences import DomainDifference, differences
from dmagent_loader._run.segments import RunData, read_segments
from dmagent_loader._run.state import rebuild_state
from dmagent_loader._validation import whole_number
from dmagent_loader.cli.once import Once
from dmagent_loader.cli.saved_states import find_saved_state
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.exhaustion import EXHAUSTION_RULES, exhaustion_rules
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.rest_of_pass import ShardSet
from dmagent_loader.mixture.segment import Segment
from dmagent_loader.mixture.sharding import StreamLayout, ranks_key
from dmagent_loader.shards import PackedRows, PackText, RowSource, ShardCollection, load_manifest
from dmagent_loader.shards.index.cache import default_cache_dir
from dmagent_loader.shards.writing.packing import load_tokenizer

_BATCH = 4096
_STATE_HELP = "a saved state_dict() as JSON, a checkpoint, or a folder of one run's checkpoints"


def configure_state(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``state``."""
    parser.description = (
        "Prints the progress of a saved run. With --shards, also every difference between these shards and those "
        "of the run, and what load_state_dict(state) and load_state_dict(state, data='changed') would do. Nothing "
        "is changed. Exit status 1 if an exact resumption is not possible."
    )
    parser.add_argument("state", help=_STATE_HELP)
    parser.add_argument(
        "--shards", action=Once, metavar="MANIFEST", help="manifest.json of the shards to resume with, or its folder"
    )
    parser.add_argument(
        "--exhausted", choices=EXHAUSTION_RULES, help="rule for all domains (default: the rules of the run)"
    )
    parser.add_argument("--shuffle-window", type=int, metavar="N", help="rows per window (default: that of the run)")
    parser.add_argument("--shuffle-shards", type=int, metavar="N", help="shards per window (default: that of the run)")
    _add_shard_arguments(parser)
    parser.set_defaults(run=state)


def configure_replay(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``replay``."""
    parser.description = (
        "Prints a JSON line for each sample: global index, domain, shard, row and key. Shards are numbered as in "
        "the list that the run had at that sample. The order follows from the state alone; the keys are read from "
        "the shards. The samples of a single rank depend on the batch size, too, and on the sample at which it "
        "began, with --start."
    )
    parser.add_argument("state", help=_STATE_HELP)
    parser.add_argument(
        "--shards",
        action="append",
        default=[],
        metavar="MANIFEST",
        help="manifest.json of the shards, or its folder; several if the data changed; without it, keys are left out",
    )
    parser.add_argument(
        "--start",
        type=int,
        default=0,
        metavar="N",
        help="first global index; with --rank, the one at which the run began or was resumed (default: 0)",
    )
    parser.add_argument(
        "--stop", type=int, metavar="N", help="global index to stop before (default: the consumed samples)"
    )
    parser.add_argument("--rank", type=int, default=0, help="data-parallel rank to list (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of a rank in a batch (default: %(default)s)")
    parser.add_argument("--own-shards", action="store_true", help="the run dealt its samples by lane (docs/order.md)")
    _add_shard_arguments(parser)
    parser.set_defaults(run=replay)


def _add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer of a run with pack=PackText(...), for --shards: a tokenizer.json, or a folder written by "
        "save_pretrained",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of the shard indexes (default: $DMAGENT_CACHE_DIR)")


def state(args: argparse.Namespace) -> int:
    """Describes a saved state."""
    saved = find_saved_state(Path(args.state)).state
    run = rebuild_state(saved)
    _check_tokenizer(args, saved["packing"])
    plan, consumed = run.plan, run.consumed
    segment = f", {len(plan.segments)} segments, the last from sample {plan.begin:,} on" * (len(plan.segments) > 1)
    print(f"a run of {consumed:,} samples{segment}, with {len(saved['measurements'])} decisions, seed {plan.seed}")
    if saved["packing"] is not None:
        print(f"its documents were packed when they were read: {saved['packing']}")
    drawn, left = plan.drawn(consumed), plan.rows_left(consumed)
    weights = plan.ledger.in_force(consumed).weights()
    table = [("domain", "weight", "samples", "rows", "left of this pass", "rule")]
    for number, name in enumerate(plan.space.names):
        rows = f"{plan.num_rows[number]:,}"
        table.append(
            (name, f"{weights[number]:.4f}", f"{drawn[name]:,}", rows, f"{left[number]:,}", plan.rules[number])
        )
    table += [(domain.name, "-", f"{drawn[domain.name]:,}", "-", "-", "removed") for domain in plan.removed]
    _print_table(table)
    bad = saved["bad_rows"]["counts"]
    if bad:
        print(f"bad rows that were replaced: {', '.join(f'{name} {count:,}' for name, count in bad.items())}")
    if args.shards is None:
        return 0
    return _compare(args, saved, plan, consumed)


def _check_tokenizer(args: argparse.Namespace, packing: str | None) -> None:
    """Refuses shards without the tokenizer that makes the rows of the run from them, and a tokenizer without effect."""
    if args.tokenizer is not None and (packing is None or not args.shards):
        reason = "the run read rows as the shards store them" if packing is None else "it is for the rows of --shards"
        raise ConfigurationError(f"--tokenizer has no effect, because {reason}: leave it out")
    if args.tokenizer is None and packing is not None and args.shards:
        raise ConfigurationError(
            f"the run packed its documents while it read them ({packing}), so no shard stores its rows: pass the "
            "tokenizer of the run (--tokenizer tokenizer.json, or the folder of save_pretrained), or leave --shards out"
        )


def _open_rows(manifest: str, packing: str | None, args: argparse.Namespace) -> RowSource:
    """The rows of a run in the shards of a manifest."""
    collection = ShardCollection.open(load_manifest(manifest), cache_dir=args.cache_dir, on_damage="skip")
    if packing is None:
        return collection
    pack = PackText.described(packing, load_tokenizer(args.tokenizer))
    cache_dir = default_cache_dir() if args.cache_dir is None else Path(args.cache_dir)
    return PackedRows.open(collection, pack, cache_dir=cache_dir, max_bad=1.0)


def _compare(args: argparse.Namespace, saved: Mapping[str, Any], plan: Plan, consumed: int) -> int:
    collection, present = _present(args, saved["packing"], plan)
    before = read_segments(saved)[-1]
    same_settings = (present.rules, present.shuffle) == (plan.rules, plan.shuffle)
    print()
    if collection.fingerprint == saved["fingerprint"] and same_settings:
        print(f"{args.shards} has the data of the run:")
        print(f"load_state_dict(state) resumes exactly at sample {consumed:,}, with data='changed' too")
        return 0
    found = differences(before, present)
    print(f"{args.shards} differs from the data of the run:")
    print("\n".join(f"  {line}" for line in found.lines()))
    print()
    print("load_state_dict(state) is refused, because the order of the samples that are left would be another")
    changed = plan.changed(consumed, present.space, present.shards, rules=present.rules, shuffle=present.shuffle)
    print(f"load_state_dict(state, data='changed') begins segment {len(changed.segments)} of the run:")
    weights, left = changed.ledger.in_force(consumed).weights(), changed.rows_left(consumed)
    kinds = {domain.name: domain for domain in found.domains}
    table = [("domain", "weight", "rows", "left of this pass", "")]
    for number, name in enumerate(changed.space.names):
        rows, remark = f"{changed.num_rows[number]:,}", _remark(kinds[name])
        table.append((name, f"{weights[number]:.4f}", rows, f"{left[number]:,}", remark))
    _print_table(table, indent="  ")
    for domain in changed.removed:
        print(f"  {domain.name} leaves: its weight goes to the other domains of {domain.field!r}")
    return 1


def _remark(domain: DomainDifference) -> str:
    if domain.kind == "new":
        return "new: no weight until the next decision or set_mix()"
    if domain.is_same:
        return ""
    joins = domain.changed.num_rows + domain.new.num_rows
    return f"{joins:,} rows join" if joins else "shards leave"


def _print_table(rows: Sequence[tuple[str, ...]], *, indent: str = "") -> None:
    """Prints rows in columns: the first and the last flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, last in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:-1], strict=True)]
        print(f"{indent}{'  '.join([f'{first:{widths[0]}}', *cells, last])}".rstrip())


def _present(args: argparse.Namespace, packing: str | None, plan: Plan) -> tuple[RowSource, RunData]:
    """The shards on the command line, with the settings of the run where the command line has none."""
    collection = _open_rows(args.shards, packing, args)
    shards = collection.domains
    fields = {domain.name: domain.field for segment in plan.segments for domain in segment.space.domains}
    space = DomainSpace.from_names(shards, fields={name: fields[name] for name in shards if name in fields})
    exhausted: Any = args.exhausted
    if exhausted is None:
        exhausted = {name: rule for name, rule in zip(plan.space.names, plan.rules, strict=True) if name in shards}
    shuffle = plan.shuffle
    if args.shuffle_window is not None:
        shuffle = replace(shuffle, window=whole_number("--shuffle-window", args.shuffle_window, least=1))
    if args.shuffle_shards is not None:
        shuffle = replace(shuffle, shards=whole_number("--shuffle-shards", args.shuffle_shards, least=1))
    numbers = range(len(space))
    return collection, RunData(
        space=space,
        rules=exhaustion_rules(space, exhausted),
        shuffle=shuffle,
        shards=ShardSet([collection.shard_rows(d) for d in numbers], [collection.shard_contents(d) for d in numbers]),
        names=[collection.shard_names(d) for d in numbers],
    )


def replay(args: argparse.Namespace) -> int:
    """Prints the samples of a run."""
    saved = find_saved_state(Path(args.state)).state
    run = rebuild_state(saved)
    plan, consumed = run.plan, run.consumed
    if not 0 <= args.rank < args.world_size:
        raise ConfigurationError(
            f"rank {args.rank} is outside a world of {args.world_size} ranks: pass a smaller --rank, or --world-size"
        )
    if args.start < 0:
        raise ConfigurationError(f"--start is {args.start}; the first sample is number 0")
    stop = consumed if args.stop is None else args.stop
    if stop < args.start:
        raise ConfigurationError(
            f"--start is {args.start}, but the list stops before sample {stop} "
            f"({'the consumed samples' if args.stop is None else '--stop'}), so it would be empty: pass a larger --stop"
        )
    end = plan.ends_by(stop) if stop >= plan.begin else None
    if end is not None and end < stop:
        print(f"the run ends at sample {end}, because its data are used up", file=sys.stderr)
        stop = end
    _check_tokenizer(args, saved["packing"])
    keys = _Keys({path: _open_rows(path, saved["packing"], args) for path in args.shards}) if args.shards else None
    replaced = dict(saved["bad_rows"]["replaced"])
    ends = [*(segment.begin for segment in plan.segments[1:]), stop]
    for number, (segment, last) in enumerate(zip(plan.segments, ends, strict=True)):
        layout = StreamLayout(
            base=max(args.start, segment.begin),
            key=ranks_key(plan.seed),
            rank=args.rank,
            world_size=args.world_size,
            batch_size=whole_number("--batch-size", args.batch_size, least=1),
        )
        more = {"segment": number} if len(plan.segments) > 1 else {}
        # Global batches are dealt whole: only the end of the data makes one smaller.
        last = min(last, stop)
        batches = -(-max(0, last - layout.base) // layout.global_batch)
        end = segment.ends_by(layout.base + (batches + 1) * layout.global_batch)
        num_samples = batches * layout.own_batch
        for first in range(0, num_samples, _BATCH):
            laned = segment if args.own_shards else None
            indices = layout.indices(first, min(_BATCH, num_samples - first), end, laned)
            _print_samples(segment, indices[indices < last], replaced, keys, more)
    return 0


def _print_samples(
    segment: Segment, indices: Any, replaced: Mapping[int, int], keys: _Keys | None, more: Mapping[str, Any]
) -> None:
    located = segment.locate(indices)
    columns = (indices, located.domain, located.shard, located.row)
    for index, domain, shard, row in zip(*(column.tolist() for column in columns), strict=True):
        planned: dict[str, Any] = {}
        if attempt := replaced.get(index):
            planned = {"instead_of": {"shard": shard, "row": row}}
            shard, row = segment.replacement(index, domain, attempt)
        line = {"index": index, "domain": segment.space.names[domain], "shard": shard, "row": row}
        if keys is not None:
            line["key"] = keys.find(segment, index, domain, shard, row)
        print(json.dumps({**line, **more, **planned}))


class _Keys:
    """Keys of rows, read from shards that are found by their content.

    Args:
        opened: Manifest -> rows of its shards.
    """

    def __init__(self, opened: Mapping[str, RowSource]) -> None:
        self._manifests = list(opened)
        self._found: dict[tuple[str, int, int], tuple[RowSource, int, int]] = {}
        for collection in opened.values():
            for domain, name in enumerate(collection.domains):
                contents, rows = collection.shard_contents(domain).tolist(), collection.shard_rows(domain).tolist()
                for shard, key in enumerate(zip(contents, rows, strict=True)):
                    self._found.setdefault((name, *key), (collection, domain, shard))

    def find(self, segment: Segment, index: int, domain: int, shard: int, row: int) -> str:
        """The key of a row.

        Raises:
            StateError: None of the manifests has its shard.
        """
        name, shards = segment.space.names[domain], segment.shards
        content, rows = int(shards.contents[domain][shard]), int(shards.rows[domain][shard])
        found = self._found.get((name, content, rows))
        if found is None:
            raise StateError(
                f"sample {index} was read from shard {shard} of domain {name!r} with {rows} rows, which "
                f"{', '.join(self._manifests)} does not have: pass the manifest that had it as well (--shards may come "
                "several times), or leave --shards out to list samples without keys"
            )
        collection, number, position = found
        return collection.read(number, position, row).key

"""Damages many shards in many ways and counts what is noticed.

    python -m benchmarks.reliability.campaign --count 10000

Each damage is tried on the same file with this package and with webdataset, which reads with Python's `tarfile` in
stream mode. Three moments: before the shard was ever indexed; the same with the ``manifest.json`` that ``dmagent
shard`` writes; and after it was indexed, with size and time as they were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import webdataset.tariterators

from benchmarks.reliability.damage import BLOCK, KINDS, LAYOUTS, Damaged, Row, Shard, make_shard
from dmagent_loader.errors import ShardError
from dmagent_loader.shards import ShardCollection

MOMENTS = ("before", "with manifest", "after")

DETECTED = "detected"
HARMLESS = "harmless"
LOST = "rows lost silently"
CHANGED = "bytes changed silently"


@dataclass(frozen=True, kw_only=True)
class Skipping:
    """What comes of a damaged shard if damage is to be skipped.

    Attributes:
        rows_lost: Of the shard.
        rows_reported: As lost, by the account.
        unreported_rows: Rows that were not as written, although no damage was reported.
        partial_rows: Rows that lacked members.
        partial_rows_beside_whole_ones: Those of them that could have been known by another row that was delivered,
            which has all of their extensions and more.
    """

    rows_lost: int
    rows_reported: int
    unreported_rows: int = 0
    partial_rows: int = 0
    partial_rows_beside_whole_ones: int = 0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One damage and what became of it.

    Attributes:
        kind, layout, moment: Which damage, of which shard, when.
        outcome: What this package made of it, asked to refuse damage.
        stage: ``"open"`` or ``"read"``: where it was noticed.
        is_known_limit: Nothing in the file tells it from a whole one (`told_by_nothing`).
        is_named: The error names the shard.
        skipping: What it made of it, asked to skip damage.
        webdataset: What webdataset made of it.
        webdataset_rows_lost: Without an error.
    """

    kind: str
    layout: str
    moment: str
    outcome: str
    stage: str
    is_known_limit: bool
    is_named: bool
    skipping: Skipping
    webdataset: str
    webdataset_rows_lost: int


def run_trial(kind: str, layout: str, moment: str, rng: random.Random, folder: Path) -> Trial | None:
    """Damages one shard; None if the damage changed no byte."""
    shard = make_shard(layout, rng)
    damaged = KINDS[kind](shard, rng)
    if damaged.data == shard.data:
        return None
    for left in folder.rglob("*"):
        if left.is_file():
            left.unlink()
    path = folder / "out" / "source" / "a" / "a-000000.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard.data)
    if moment == "with manifest":
        _write_manifest(folder / "out", shard)
    elif moment == "after":
        _open(path, folder, "raise")
    _damage(path, damaged)
    outcome, stage, message = _read_strictly(path, folder, shard)
    skipping = _read_leniently(path, folder, shard)
    theirs, their_loss = _read_with_webdataset(path, shard)
    return Trial(
        kind=kind,
        layout=layout,
        moment=moment,
        outcome=outcome,
        stage=stage,
        is_known_limit=moment == "before" and told_by_nothing(shard, damaged),
        is_named=path.name in message,
        skipping=skipping,
        webdataset=theirs,
        webdataset_rows_lost=their_loss,
    )


def _headers_fit(shard: Shard, damaged: bytes) -> bool:
    """Whether each header that is another one now is a member's, with the name and the blocks of the one before.

    Its name field is cut off at the same place, because the whole name stands in an extended header; only the size
    within the last block, or times and owners, can then be another member's.
    """
    if len(damaged) != len(shard.data):
        return False
    for start, end in shard.headers:
        if damaged[start:end] != shard.data[start:end]:
            try:
                now, before = (
                    tarfile.TarInfo.frombuf(data[start:end], "utf-8", "surrogateescape")
                    for data in (damaged, shard.data)
                )
            except tarfile.HeaderError:
                return False
            blocks = [-(-header.size // BLOCK) for header in (now, before)]
            if not (now.isreg() and before.isreg()) or now.name != before.name or blocks[0] != blocks[1]:
                return False
    return True


def told_by_nothing(shard: Shard, damaged: Damaged) -> bool:
    """Whether a tar alone cannot show the damage.

    Payloads, and names that are too long for a header, have no checksum in a tar, so that the header of such a member
    may become that of another one; where as many bytes are missing as a member takes, a whole tar is left; and zeros at
    the end may be padding of up to 20 blocks besides the two blocks of the end marker.
    """
    if damaged.data is None:
        return False
    if not damaged.touches_headers(shard) or _headers_fit(shard, damaged.data):
        return True
    if len(damaged.data) < len(shard.data) and damaged.is_a_whole_tar():
        return True
    kept = len(damaged.data) - damaged.zeros_at_the_end()
    same = len(damaged.data) == len(shard.data) and damaged.data[:kept] == shard.data[:kept]
    # Zeros in the payload before are a payload that changed; those of the end begin where a header would.
    first_header = min((start for start, _ in shard.headers if start >= kept), default=shard.end)
    return same and len(shard.data) - first_header < 22 * BLOCK + BLOCK


def _write_manifest(root: Path, shard: Shard) -> None:
    record = {
        "path": "source/a/a-000000.tar",
        "rows": len(shard.rows),
        "bytes": len(shard.data),
        "sha256": hashlib.sha256(shard.data).hexdigest(),
    }
    (root / "manifest.json").write_text(json.dumps({"schema": 1, "domains": {"source/a": {"shards": [record]}}}))


def _damage(path: Path, damaged: Damaged) -> None:
    """In place and with the times it had: a disk does not tell when it loses bytes."""
    status = path.stat()
    if damaged.data is None:
        path.unlink()
        return
    with open(path, "r+b") as file:
        file.truncate(len(damaged.data))
        file.write(damaged.data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _open(path: Path, folder: Path, on_damage: str) -> ShardCollection:
    return ShardCollection.open(
        {"source/a": [str(path)]},
        on_damage=on_damage,  # type: ignore[arg-type]
        cache_dir=folder / "cache",
        progress=False,
    )


def _rows(collection: ShardCollection) -> list[Row]:
    samples = (collection.read(0, 0, row) for row in range(int(collection.num_rows[0])))
    return [(sample.key, {name: bytes(data) for name, data in sample.members.items()}) for sample in samples]


def _read_strictly(path: Path, folder: Path, shard: Shard) -> tuple[str, str, str]:
    stage = "open"
    try:
        collection = _open(path, folder, "raise")
        stage = "read"
        rows = _rows(collection)
    except ShardError as error:
        return DETECTED, stage, str(error)
    return _judge(rows, shard), stage, path.name


def _judge(rows: list[Row], shard: Shard) -> str:
    if rows == list(shard.rows):
        return HARMLESS
    return LOST if len(rows) < len(shard.rows) else CHANGED


def _read_leniently(path: Path, folder: Path, shard: Shard) -> Skipping:
    """A shard that cannot be used at all is refused under ``skip``, too; then everything is lost, and said to be."""
    total = len(shard.rows)
    try:
        collection = _open(path, folder, "skip")
        rows = _rows(collection)
    except ShardError:
        return Skipping(rows_lost=total, rows_reported=total)
    written = dict(shard.rows)
    partial = [set(members) for key, members in rows if set(members) < set(written.get(key, {}))]
    delivered = {frozenset(members) for _, members in rows}
    return Skipping(
        rows_lost=total - len(rows),
        rows_reported=sum(damage.rows_lost for damage in collection.damage),
        unreported_rows=0 if collection.damage else sum(written.get(key) != members for key, members in rows),
        partial_rows=len(partial),
        partial_rows_beside_whole_ones=sum(any(members < other for other in delivered) for members in partial),
    )


def _read_with_webdataset(path: Path, shard: Shard) -> tuple[str, int]:
    try:
        with open(path, "rb") as file:
            files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            rows = [
                (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
                for sample in webdataset.tariterators.group_by_keys(files)
            ]
    except Exception:  # tarfile's errors, the system's, and webdataset's ValueError
        return DETECTED, 0
    return _judge(rows, shard), max(0, len(shard.rows) - len(rows))


def run_campaign(count: int, seed: int) -> list[Trial]:
    """So many damages, dealt evenly to kinds, layouts and moments."""
    rng = random.Random(seed)
    combinations = [(kind, layout, moment) for kind in KINDS for layout in LAYOUTS for moment in MOMENTS]
    rng.shuffle(combinations)
    trials: list[Trial] = []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        number = 0
        while len(trials) < count:
            trial = run_trial(*combinations[number % len(combinations)], rng, Path(folder))
            number += 1
            if trial is not None:
                trials.append(trial)
    return trials


def unnoticed(trials: list[Trial]) -> list[Trial]:
    """The trials in which something was lost or changed without an error, although it could have been noticed."""
    return [trial for trial in trials if trial.outcome in (LOST, CHANGED) and not trial.is_known_limit]


def needlessly_partial(trial: Trial) -> bool:
    """Whether a row was delivered without all its members, although it could have been known by the other rows."""
    return trial.skipping.partial_rows_beside_whole_ones > 0 and not trial.is_known_limit


def tables(trials: list[Trial]) -> str:
    """Two tables in Markdown: by kind of damage, and by moment."""
    lines = [
        "| damage | tried | refused at open | refused at read | harmless | lost silently | changed silently "
        "| webdataset: lost silently | webdataset: changed silently |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_kind: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_kind[trial.kind].append(trial)
    lines += [_line(kind, by_kind[kind]) for kind in KINDS if by_kind[kind]]
    lines.append(_line("all", trials))
    lines += ["", "| moment | " + lines[0].removeprefix("| damage | "), lines[1]]
    lines += [_line(moment, [trial for trial in trials if trial.moment == moment]) for moment in MOMENTS]
    with_manifest = [trial for trial in trials if trial.moment == "with manifest" and trial.outcome == DETECTED]
    exact = sum(trial.skipping.rows_lost == trial.skipping.rows_reported for trial in with_manifest)
    unreported = sum(trial.skipping.unreported_rows for trial in trials if not trial.is_known_limit)
    named = sum(trial.is_named for trial in trials if trial.outcome == DETECTED)
    lines += [
        "",
        f"The error names the shard: {named} of {sum(trial.outcome == DETECTED for trial in trials)}. With `skip`: the "
        f"account of lost rows is exact with a manifest: {exact} of {len(with_manifest)}; rows delivered without all "
        f"their members: {sum(trial.skipping.partial_rows for trial in trials)}, of which another row or a manifest "
        f"could tell {sum(map(needlessly_partial, trials))}; changed rows where no damage was reported and a tar could "
        f"tell: {unreported}. Rows that webdataset lost without an error: "
        f"{sum(trial.webdataset_rows_lost for trial in trials)}.",
    ]
    return "\n".join(lines)


def _line(name: str, trials: list[Trial]) -> str:
    counts = Counter(
        f"{trial.outcome} {trial.stage}" if trial.outcome == DETECTED else trial.outcome for trial in trials
    )
    theirs = Counter(trial.webdataset for trial in trials)
    cells = [
        len(trials),
        counts[f"{DETECTED} open"],
        counts[f"{DETECTED} read"],
        counts[HARMLESS],
        counts[LOST],
        counts[CHANGED],
        theirs[LOST],
        theirs[CHANGED],
    ]
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Prints the tables, and fails if anything was lost that could have been noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("dmagent_loader").setLevel(logging.ERROR)
    trials = run_campaign(args.count, args.seed)
    print(tables(trials))
    silent = [trial for trial in trials if trial.outcome in (LOST, CHANGED)]
    missed = unnoticed(trials)
    print(f"\n{len(trials)} damages, {len(silent)} silent, {len(missed)} of them could have been noticed")
    for trial in missed[:20]:
        print(trial)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

"""``dmagent shard`` writes shards; ``dmagent index`` lists their contents."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from dmagent_loader._tasks import RayWorkers, Workers
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import FIELDS, hint_of_field
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.inputs.finding import domain_name
from dmagent_loader.shards.inputs.kinds import READ, kind_of_name
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.manifest import MANIFEST_NAME, Manifest, load_manifest, names_manifest
from dmagent_loader.shards.sources.remote import remote_names
from dmagent_loader.shards.sources.urls import is_local, local_path
from dmagent_loader.shards.tar import KeyEnd
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.output import REJECTS_NAME
from dmagent_loader.shards.writing.place import place_of
from dmagent_loader.shards.writing.writer import shard_files


def configure_shard(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``shard``."""
    defaults = ShardingConfig()
    parser.description = (
        "Writes OUTPUT/<field>/<domain>/<domain>-000000.tar ... and OUTPUT/manifest.json for the sampler. Without "
        "--tokenizer, every document is a row. With it, rows are packed with --sequence-length tokens, and the "
        "end-of-text token separates documents; tokens at the end that do not fill a row are dropped and counted. "
        "Run it again with other domains to add them, or after a kill to go on where it stood."
    )
    add_input_arguments(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--field", choices=["source", "target"], help="field of domains whose name has none")
    add_output_arguments(parser, "the shards")
    parser.add_argument("--append", action="store_true", help="add shards to domains that the folder holds")
    add_reading_arguments(parser)
    add_max_bad(parser, f"its {REJECTS_NAME}")
    parser.add_argument(
        "--keep-columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN",
        help="columns kept as a json member",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder written by save_pretrained")
    parser.add_argument("--eos-token", metavar="TOKEN", help="end-of-text token (default: the tokenizer's)")
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="let text that spells a special token become that token, as chat formats need (default: it stays text)",
    )
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens per packed row")
    parser.add_argument(
        "--shuffle-seed",
        type=int,
        default=defaults.shuffle_seed,
        metavar="N",
        help="seed of the order of a domain's documents (default: %(default)s)",
    )
    parser.add_argument("--keep-order", action="store_true", help="keep the order of the input instead")
    parser.add_argument("--rows-per-shard", type=int, metavar="N", help="maximum rows per shard")
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=defaults.max_shard_bytes,
        metavar="N",
        help="maximum bytes per shard, on average; its shards have equal numbers of rows (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-small",
        action="store_true",
        help="leave out domains with too little text for one row, with a warning (default: they are an error)",
    )
    add_worker_arguments(parser, "processes (default: one, in which the tokenizer uses all cores)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=shard)


def configure_index(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``index``."""
    parser.description = (
        "Indexes every shard (or reads its cached index) and prints a table. Exits with 1 on damage. With --beside "
        "or --to, also writes the indexes for everybody, so that a run on any machine starts without reading the "
        "shards through."
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="a manifest.json or its folder, NAME=PATTERN, or a path, brace pattern, glob or URL",
    )
    add_key_ends_at(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--beside",
        action="store_true",
        help="write the indexes beside the shards: NAME.tar.index for each, and shards.index in each folder",
    )
    where.add_argument(
        "--to",
        metavar="DIR",
        help="write the indexes to this folder or URL, for shards whose own folder cannot be written to; a run finds "
        "them with ReadingConfig(indexes=DIR)",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of the shard indexes (default: $DMAGENT_CACHE_DIR)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=index)


def shard(args: argparse.Namespace) -> int:
    """Writes the shards and prints a summary."""
    config = ShardingConfig(
        text_key=args.text_key,
        keep_columns=tuple(args.keep_columns),
        chat_template=args.chat_template,
        messages_key=args.messages_key,
        text_files=tuple(args.text_files),
        tar_member=args.tar_member,
        key_ends_at=args.key_ends_at,
        tokenizer=args.tokenizer,
        eos_token=args.eos_token,
        parse_special_tokens=args.parse_special_tokens,
        sequence_length=args.sequence_length,
        rows_per_shard=args.rows_per_shard,
        max_shard_bytes=args.max_shard_bytes,
        shuffle_seed=None if args.keep_order else args.shuffle_seed,
        max_bad=args.max_bad,
        skip_small=args.skip_small,
    )
    records = shard_files(
        input_domains(args),
        args.output,
        config,
        append=args.append,
        work_dir=args.work_dir,
        workers=workers_of(args),
        progress=not args.no_progress,
    )
    width = max(len(name) for name in records)
    for name, record in records.items():
        tokens = (
            "" if record.tokens is None else f", {record.tokens:,} tokens ({record.dropped_tokens} dropped at the end)"
        )
        if record.special_token_documents:
            meaning = "parsed" if args.parse_special_tokens else "kept as text"
            tokens += f", special tokens spelled in {record.special_token_documents:,} documents ({meaning})"
        empty = f", {record.empty_documents} empty documents left out" if record.empty_documents else ""
        if record.bad_records:
            empty += f", {record.bad_records} bad records left out (see {name}/{REJECTS_NAME})"
        print(
            f"{name:{width}}  {record.rows:>10,} rows in {len(record.shards)} shard(s), {record.bytes:,} bytes, "
            f"{record.documents:,} documents{tokens}{empty}"
        )
    print(f"wrote {place_of(args.output, args.work_dir).url(MANIFEST_NAME)}")
    if args.tokenizer is not None and importlib.util.find_spec("tiktoken") is None:
        print(
            "the package tiktoken is not installed, with which byte-level BPE tokenizers are several times faster (pip "
            "install tiktoken)",
            file=sys.stderr,
        )
    return 0


def index(args: argparse.Namespace) -> int:
    """Indexes the shards and prints the table; 1 if any is damaged."""
    shards, manifests = listed_shards(args.shards)
    collection = ShardCollection.open(
        shards,
        on_damage="skip",
        key_ends_at=args.key_ends_at,
        cache_dir=args.cache_dir,
        progress=not args.no_progress,
        manifests=manifests,
        indexes=not (args.beside or args.to),
    )
    print(collection.describe())
    for damage in collection.damage:
        print(damage)
    if args.beside or args.to:
        written = collection.write_indexes(args.to)
        print(f"wrote the indexes of {written:,} shard(s) {f'to {args.to}' if args.to else 'beside them'}")
    return 1 if collection.damage else 0


def add_input_arguments(where: argparse._MutuallyExclusiveGroup) -> None:
    """Adds the two ways to name the input; `input_domains` reads them."""
    where.add_argument(
        "--domain",
        action="append",
        metavar="NAME=PATH[,PATH...]",
        help="a domain, such as source/web=web.jsonl.gz; PATH is a file, a glob, a folder, a URL, or hf:DATASET; "
        "the endings of files say how they are read; repeatable",
    )
    where.add_argument(
        "--input",
        metavar="DIR",
        help="every data file in DIR, a folder or the URL of one, but not in the folders below it, is a domain named "
        "after the file; needs --field",
    )


def input_domains(args: argparse.Namespace) -> dict[str, list[str]]:
    """Domain -> inputs, from the arguments ``--domain``, ``--input`` and ``--field``."""
    domains = _domains_of_folder(args.input, args.text_files).items() if args.input else _named_domains(args.domain)
    return _with_fields(domains, args.field)


def add_output_arguments(parser: argparse.ArgumentParser, content: str) -> None:
    """Adds the folder or URL that is written to, and where the work for a URL is."""
    parser.add_argument(
        "--output", required=True, metavar="DIR", help=f"folder of {content}, or a URL such as s3://bucket/folder"
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="local folder for the work in progress of a URL (default: a folder in $DMAGENT_CACHE_DIR)",
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which part of the input is text; `read_options` reads it."""
    defaults = ReadOptions()
    parser.add_argument("--text-key", default=defaults.text_key, help="column with the text (default: %(default)s)")
    parser.add_argument(
        "--chat-template",
        metavar="PATH",
        help="render conversations by the chat template of this tokenizer, or by a .jinja file",
    )
    parser.add_argument(
        "--messages-key", default=defaults.messages_key, help="column with the messages (default: %(default)s)"
    )
    parser.add_argument(
        "--text-files",
        nargs="+",
        action="extend",
        default=[],
        metavar="ENDING",
        help="endings of plain text files, such as .txt .md, each of which is one document (default: none are read)",
    )
    parser.add_argument(
        "--tar-member", metavar="NAME", help="read tar shards, from this member of their rows, such as txt"
    )
    add_key_ends_at(parser)


def add_key_ends_at(parser: argparse.ArgumentParser) -> None:
    """Adds which files of a tar shard are one row."""
    parser.add_argument(
        "--key-ends-at",
        choices=get_args(KeyEnd),
        default="first-dot",
        help="the dot of a file name in a tar shard at which the key of its row ends (default: %(default)s)",
    )


def add_max_bad(parser: argparse.ArgumentParser, place: str) -> None:
    """Adds the number of records that may be left out."""
    parser.add_argument(
        "--max-bad",
        type=int,
        default=0,
        metavar="N",
        help=f"leave out up to N records of a domain that are no documents, and list them in {place} (default: 0)",
    )


def add_worker_arguments(parser: argparse.ArgumentParser, workers_help: str) -> None:
    """Adds where a job runs; `workers_of` reads it."""
    parser.add_argument(
        "--workers", type=int, metavar="N", help=f"{workers_help}; with --ray, the largest number of tasks at a time"
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="run on the Ray cluster of RAY_ADDRESS or of this machine, or else on a Ray that is started here (extra "
        "[ray])",
    )


def add_gpus_per_worker(parser: argparse.ArgumentParser) -> None:
    """Adds the GPUs of a worker, for jobs with a classifier."""
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        default=0.0,
        metavar="N",
        help="GPUs of a task on Ray, such as 1 or 0.5; a task without any sees none (default: 0)",
    )


def workers_of(args: argparse.Namespace) -> Workers:
    """Where a job runs, from the arguments of `add_worker_arguments` and `add_gpus_per_worker`."""
    gpus = getattr(args, "gpus_per_worker", 0.0)
    if args.ray:
        return RayWorkers(count=args.workers, gpus_per_worker=gpus)
    if gpus:
        raise ConfigurationError("--gpus-per-worker has no effect without --ray: choose the device with --device")
    return args.workers or 0


def read_options(args: argparse.Namespace) -> ReadOptions:
    """Which part of a record is the document, with all columns, from the arguments of `add_reading_arguments`."""
    return ReadOptions(
        text_key=args.text_key,
        keep_columns=None,
        chat_template=args.chat_template,
        messages_key=args.messages_key,
        text_files=tuple(args.text_files),
        tar_member=args.tar_member,
        key_ends_at=args.key_ends_at,
    )


def listed_shards(arguments: list[str]) -> tuple[dict[str, list[str]], list[Manifest]]:
    """Domain -> shards, and the manifests among the arguments: manifests, ``NAME=PATTERN``, or patterns."""
    shards: dict[str, list[str]] = {}
    manifests: list[Manifest] = []
    for argument in arguments:
        name, separator, pattern = argument.partition("=")
        if names_manifest(argument):
            manifests.append(load_manifest(argument))
            for domain, paths in manifests[-1].items():
                shards.setdefault(domain, []).extend(paths)
        elif separator and "://" not in name and not os.path.exists(argument):
            shards.setdefault(name, []).append(os.path.expanduser(pattern))
        else:
            shards.setdefault("(shards)", []).append(argument)
    return shards, manifests


def _domains_of_folder(folder: str, text_files: Sequence[str]) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    strays = []
    names = _names_in(folder)
    for name, url in names.items():
        if name.endswith(".idx") and f"{name.removesuffix('.idx')}.bin" in names:
            continue  # the other half of a pair of Megatron
        if name.endswith("/") or kind_of_name(name, text_files) is None:
            strays.append(name)
            continue
        domain = domain_name(name)
        if domain in domains:
            raise ConfigurationError(
                f"--input {folder!r}: {os.path.basename(domains[domain][0])!r} and {name!r} would both be domain "
                f"{domain!r}, the part before the first dot: rename one, or name the domains with --domain"
            )
        domains[domain] = [url]
    if not domains:
        raise ConfigurationError(
            f"--input {folder!r} holds no data files{f', only {strays[:5]}' if strays else ''}: pass a folder with one "
            f"file per domain; what is read: {READ}"
        )
    if strays:
        print(f"not read, because they are not data files: {', '.join(strays)}", file=sys.stderr)
        if any(name.endswith("/") for name in strays):
            print("--input does not read the folders in it: name them with --domain", file=sys.stderr)
    return domains


def _names_in(folder: str) -> dict[str, str]:
    """The names of the files in a folder, and of the folders with a slash, that are not hidden -> their URLs."""
    if is_local(folder):
        path = Path(local_path(folder))
        if not path.is_dir():
            raise ConfigurationError(f"--input {folder!r} is not a folder: pass a folder, or use --domain for a file")
        try:
            entries = list(path.iterdir())
        except OSError as error:
            raise ConfigurationError(f"--input {folder!r} cannot be listed ({error}): make it readable") from error
        found = {entry.name if entry.is_file() else f"{entry.name}/": str(entry) for entry in entries}
    else:
        root = folder.rstrip("/")
        below = ((url, url.removeprefix(f"{root}/").partition("/")) for url in remote_names(root))
        found = {name + slash: url for url, (name, slash, _) in below}
    return {name: url for name, url in sorted(found.items()) if not name.startswith(".")}


def _named_domains(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    for argument in arguments:
        name, _, paths = argument.partition("=")
        if not name or not paths:
            raise ConfigurationError(f"--domain {argument!r}: write NAME=PATH, for example source/web=web.jsonl.gz")
        yield name, list(_split(paths))


def _split(paths: str) -> Iterator[str]:
    """The paths between commas; a file or folder whose name has commas is one path."""
    parts = paths.split(",")
    while parts:
        # A shell leaves the ~ of NAME=~/path as it is.
        candidates = [os.path.expanduser(",".join(parts[:n])) for n in range(len(parts), 0, -1)]
        path = next((path for path in candidates[:-1] if os.path.exists(path)), candidates[-1])
        count = len(parts) - candidates.index(path)
        yield path
        del parts[:count]


def _with_fields(domains: Iterable[tuple[str, list[str]]], field: str | None) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for short, paths in domains:
        name = _with_field(short, field)
        if name in named:
            raise ConfigurationError(f"--domain {name!r} is given twice: list its files once, separated by commas")
        named[name] = paths
    return named


def _with_field(name: str, field: str | None) -> str:
    if "/" in name:
        prefix, _, rest = name.partition("/")
        if prefix not in FIELDS:
            hint = hint_of_field(name)
            print(
                f"domain {name!r} is neither source/{rest} nor target/{rest}{hint}: samplers will ask for its field",
                file=sys.stderr,
            )
        return name
    if field is None:
        raise ConfigurationError(f"domain {name!r} has no field: write source/{name} or target/{name}, or pass --field")
    return f"{field}/{name}"

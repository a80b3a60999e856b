"""``dmagent filter``: drops documents that should not be trained on, and counts them by reason."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dmagent_loader._files import only_writer, write_atomically
from dmagent_loader.cli.shards import add_input_arguments, add_reading_arguments, input_domains, read_options
from dmagent_loader.environment.questions import read_questions
from dmagent_loader.errors import ConfigurationError, DMAgentError
from dmagent_loader.labelling.classifier import load_classifier
from dmagent_loader.labelling.documents import FileDocuments
from dmagent_loader.labelling.files import PART_DOCUMENTS, SETTINGS_FILE, check_output, rows_file
from dmagent_loader.labelling.filtering import NGRAM, SHORTEST_QUESTION, DocumentFilter, FilterConfig, counts_text
from dmagent_loader.labelling.labels import batches

_DROPPED = "dropped"
_PARTIAL = ".partial"
_REASONS = "reasons"
"""Folder of the unfinished work with the reason of each document, in parts that are whole."""


def add_filter_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``filter``."""
    defaults = FilterConfig()
    parser = subparsers.add_parser(
        "filter",
        help="drop repeated, contaminated, short and low-quality documents",
        description=(
            "Writes the documents that are kept to OUTPUT/<field>/<domain>.jsonl.gz, for `dmagent shard --input "
            "OUTPUT/<field> --field <field>`, and the reason for each of the others to OUTPUT/dropped. Of repeated "
            "documents, the first is kept, over all domains in the order given. A job that was killed goes on where it "
            "stood when it is run again."
        ),
    )
    add_input_arguments(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--field", choices=["source", "target"], help="field of domains whose name has none")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the kept documents")
    add_reading_arguments(parser)
    parser.add_argument(
        "--min-characters", type=int, default=defaults.min_characters, metavar="N", help="least length of a document"
    )
    parser.add_argument("--max-characters", type=int, metavar="N", help="largest length of a document")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep exact duplicates, too")
    parser.add_argument(
        "--near-duplicates",
        type=float,
        metavar="SIMILARITY",
        help="also drop documents whose 5-word shingles are as similar to those of an earlier one, such as 0.8",
    )
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"question files (columns question, answer): drop documents with {NGRAM} consecutive words of a question",
    )
    parser.add_argument("--quality", metavar="NAME", help="folder or Hub id of NVIDIA's quality classifier")
    parser.add_argument(
        "--drop-quality",
        nargs="+",
        default=list(defaults.dropped_quality),
        metavar="LABEL",
        help="labels of the quality classifier that are dropped (default: Low)",
    )
    parser.add_argument("--device", help="torch device of the classifier (default: the GPU if there is one)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts in a batch (default: 64)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=filter_documents)


def filter_documents(args: argparse.Namespace) -> int:
    """Filters the documents and prints the counts.

    Raises:
        ConfigurationError: A setting cannot work or has no effect, or the output cannot be written to or holds inputs.
    """
    if not args.quality and tuple(args.drop_quality) != FilterConfig().dropped_quality:
        raise ConfigurationError("--drop-quality has no effect without --quality: name the classifier of quality")
    config = FilterConfig(
        min_characters=args.min_characters,
        max_characters=args.max_characters,
        exact_duplicates=not args.keep_duplicates,
        near_duplicates=args.near_duplicates,
        dropped_quality=tuple(args.drop_quality),
    )
    domains = {name: FileDocuments(name, paths, read_options(args)) for name, paths in input_domains(args).items()}
    check_output(args.output, (url for documents in domains.values() for url in documents.urls))
    output = Path(args.output)
    with only_writer(output, "documents"):
        _filter_domains(args, output, domains, config)
    for field in dict.fromkeys(name.split("/", 1)[0] for name in domains):
        print(f"wrote {output / field}; next: dmagent label or shard --input {output / field} --field {field}")
    return 0


def _filter_domains(
    args: argparse.Namespace, output: Path, domains: Mapping[str, FileDocuments], config: FilterConfig
) -> None:
    """Writes the kept and the dropped documents of all domains, or none."""
    questions = [f"{q.question} {q.answer}" for q in (read_questions(args.decontaminate) if args.decontaminate else [])]
    quality = load_classifier(args.quality, device=args.device, batch_size=args.batch_size) if args.quality else None
    partial = output / _PARTIAL
    settings = {
        "inputs": {name: documents.identity for name, documents in domains.items()},
        "questions": hashlib.sha256(json.dumps(questions).encode()).hexdigest(),
        "quality classifier": None if quality is None else quality.name,
        "documents of a part": PART_DOCUMENTS,
        **asdict(config),
    }
    try:
        _continue_in(output, domains, settings)
        checked = DocumentFilter(config, questions, quality)
        if questions:
            print(
                f"{checked.num_questions_checked:,} of {len(questions):,} questions are looked for; the others have "
                f"fewer than {SHORTEST_QUESTION} words"
            )
        for name, documents in domains.items():
            counts = _filter_domain(name, documents, checked, partial, progress=not args.no_progress)
            print(f"{name}: {counts_text(counts)}")
        for name in domains:
            for folder in ("", _DROPPED):
                final = output / folder / f"{name}.jsonl.gz"
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / folder / f"{name}.jsonl.gz", final)
        shutil.rmtree(partial)
    except DMAgentError:
        raise  # a ShardNotFoundError of an input is an OSError, too
    except OSError as error:
        raise ConfigurationError(f"{str(output)!r} cannot be written: {error}; pass another --output") from error
    finally:
        if not any(partial.glob(f"{_REASONS}/**/part-*")):
            shutil.rmtree(partial, ignore_errors=True)


def _continue_in(output: Path, domains: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Begins a job, or checks that the unfinished one in the folder is the same.

    Raises:
        ConfigurationError: It is another one; or the folder holds a domain already.
        OSError: The folder cannot be written to.
    """
    path, text = output / _PARTIAL / SETTINGS_FILE, json.dumps(settings)
    if path.exists():
        try:
            earlier = json.loads(path.read_bytes())
        except ValueError:
            earlier = {}
        differing = sorted(name for name, value in json.loads(text).items() if earlier.get(name) != value)
        if differing:
            raise ConfigurationError(
                f"{str(output)!r} holds unfinished work with other {', '.join(differing)}: run that command again, "
                f"remove {str(path.parent)!r}, or choose another --output"
            )
        print(f"{output}: an earlier call did not finish this job, which goes on where it stood", file=sys.stderr)
        return
    present = [name for name in domains if (output / f"{name}.jsonl.gz").exists()]
    if present:
        raise ConfigurationError(f"{str(output)!r} holds the domain(s) {present} already: choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _filter_domain(
    name: str, documents: FileDocuments, checked: DocumentFilter, folder: Path, *, progress: bool
) -> Counter[str | None]:
    """Writes the documents of one domain. What an earlier call found out about them is not found out again."""
    counts: Counter[str | None] = Counter()
    parts = folder / _REASONS / name
    parts.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = []
        for path in (folder / f"{name}.jsonl.gz", folder / _DROPPED / f"{name}.jsonl.gz"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(rows_file(path)))
        bar = stack.enter_context(
            tqdm(total=documents.size, unit="B", unit_scale=True, desc=f"filtering {name}", disable=not progress)
        )
        for number, batch in enumerate(batches(documents.read(bar.update), PART_DOCUMENTS)):
            part = parts / f"part-{number:06d}.json"
            if part.exists():
                reasons = json.loads(part.read_bytes())
                checked.recall(batch, reasons)
            else:
                reasons = checked.reasons(batch)
                write_atomically(part, json.dumps(reasons).encode())
            counts.update(reasons)
            for document, reason in zip(batch, reasons, strict=True):
                kept = {**document.columns, "text": document.text}
                row = kept if reason is None else {"origin": document.origin, "reason": reason}
                files[reason is not None](row)
    return counts

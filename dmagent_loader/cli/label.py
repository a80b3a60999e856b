"""``dmagent label`` finds the topic of every document."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from dmagent_loader.cli.classifying import (
    SHOWN_TOPICS,
    add_classifier_arguments,
    add_shards,
    known_share,
    labeller_of,
    open_shards,
    shard_documents,
)
from dmagent_loader.cli.shards import (
    add_gpus_per_worker,
    add_input_arguments,
    add_max_bad,
    add_output_arguments,
    add_reading_arguments,
    add_worker_arguments,
    input_domains,
    read_options,
    workers_of,
)
from dmagent_loader.errors import DomainError
from dmagent_loader.labelling.documents import DomainDocuments, FileDocuments
from dmagent_loader.labelling.files import LabelledDomain, label_domains
from dmagent_loader.labelling.sorting import LABELS, UNSURE_FOLDER
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards.writing.output import REJECTS_NAME
from dmagent_loader.shards.writing.place import place_of


def configure_label(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``label``."""
    parser.description = (
        "Writes the topic of every document to OUTPUT/labels/<domain>. With --split, the documents also go to "
        "OUTPUT/<field>/<topic>.jsonl.gz, for `dmagent shard --input OUTPUT/<field> --field <field>`, and those "
        "without a topic to OUTPUT/unsure. Labels that documents carry are used instead of the classifier. A job "
        "that was killed continues where it stood when it is run again."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    add_input_arguments(where)
    add_shards(where)
    parser.add_argument("--field", choices=["source", "target"], help="field of domains whose name has none")
    add_output_arguments(parser, "the labels")
    parser.add_argument("--split", action="store_true", help="also write the documents sorted by topic")
    add_reading_arguments(parser)
    add_max_bad(parser, f"{REJECTS_NAME} beside its labels")
    add_worker_arguments(parser, "processes (default: one)")
    add_gpus_per_worker(parser)
    add_classifier_arguments(parser)
    parser.set_defaults(run=label)


def label(args: argparse.Namespace) -> int:
    """Labels the documents and prints a summary."""
    labeller = labeller_of(args)
    domains: dict[str, DomainDocuments] = {}
    if args.shards:
        domains.update(shard_documents(*open_shards(args), args))
        fieldless = [name for name in domains if "/" not in name]
        if fieldless:
            raise DomainError(
                f"the domains {fieldless} have no field: write source/NAME=PATTERN or target/NAME=PATTERN"
            )
    else:
        for name, paths in input_domains(args).items():
            domains[name] = FileDocuments(name, paths, read_options(args))
    empty = [name for name, documents in domains.items() if not documents.size]
    if empty:
        print(f"dmagent label: the inputs of {empty} are empty", file=sys.stderr)
    counted = label_domains(
        domains,
        args.output,
        labeller,
        split=args.split,
        max_bad=args.max_bad,
        work_dir=args.work_dir,
        workers=workers_of(args),
        progress=not args.no_progress,
    )
    for name, found in counted.items():
        print(_labels_line(name, found))
    place = place_of(args.output, args.work_dir)
    print(f"wrote {place.url(LABELS)}")
    if args.split:
        sorted_fields = (name.split("/", 1)[0] for name, found in counted.items() if found.documents > found.unsure)
        for field in dict.fromkeys(sorted_fields):
            folder = place.url(field)
            print(f"wrote {folder}; next: dmagent shard --input {folder} --field {field} --output SHARDS")
        unsure = sum(found.unsure for found in counted.values())
        if unsure:
            folder = place.url(UNSURE_FOLDER)
            field = next(name.split("/", 1)[0] for name, found in counted.items() if found.unsure)
            print(
                f"{unsure:,} documents of unknown topic are in {folder}: shard them as domains of their own "
                f"(dmagent shard --domain {field}/other={folder}/{field}.jsonl.gz ...), or leave them out"
            )
    return 0


def _labels_line(name: str, found: LabelledDomain) -> str:
    total = max(1.0, float(found.counts.sum()))
    most = [i for i in np.argsort(-found.counts)[:SHOWN_TOPICS] if found.counts[i] > 0]
    topics = ", ".join(f"{CANONICAL_TOPICS[i]} {found.counts[i] / total:.0%}" for i in most)
    bad = f", {found.bad_records:,} bad records left out" if found.bad_records else ""
    known = known_share(found.documents, found.unsure, found.stated)
    return f"{name}: {found.documents:,} documents{bad}, {known}: {topics}"

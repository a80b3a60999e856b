"""``dmagent label`` finds the topics of documents, ``dmagent compose`` those of a sample of each domain, and ``dmagent
start-state`` those of the base model's own training data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dmagent_loader.cli.generate import add_sampling_arguments, language_model
from dmagent_loader.cli.shards import (
    add_gpus_per_worker,
    add_input_arguments,
    add_key_ends_at,
    add_max_bad,
    add_output_arguments,
    add_reading_arguments,
    add_worker_arguments,
    input_domains,
    listed_shards,
    read_options,
    workers_of,
)
from dmagent_loader.errors import ConfigurationError, DomainError, ShardError, ShardNotFoundError
from dmagent_loader.labelling.classifier import BUNDLED, load_classifier
from dmagent_loader.labelling.compose import MAX_ERROR, SampleConfig, compose
from dmagent_loader.labelling.documents import DomainDocuments, FileDocuments, JoinedDocuments, ShardDocuments
from dmagent_loader.labelling.files import LabelledDomain, label_domains
from dmagent_loader.labelling.generation import GenerationConfig
from dmagent_loader.labelling.labels import MIN_CONFIDENCE, LabelConfig, Labeller
from dmagent_loader.labelling.sorting import LABELS, UNSURE_FOLDER
from dmagent_loader.labelling.start_state import (
    MOST_DOCUMENTS,
    MOST_TEXTS,
    start_state_of_documents,
    start_state_of_model,
)
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.compositions import (
    COMPOSITIONS_NAME,
    START_STATE,
    Composition,
    compositions_text,
    load_compositions,
)
from dmagent_loader.shards.inputs.kinds import Kind, kind_of_name
from dmagent_loader.shards.inputs.records import Rejected
from dmagent_loader.shards.manifest import MANIFEST_NAME, Manifest, beside
from dmagent_loader.shards.sources.urls import is_local, local_path
from dmagent_loader.shards.sources.writing import refuse_unwritable, write_url
from dmagent_loader.shards.writing.collecting import check_bad
from dmagent_loader.shards.writing.output import REJECTS_NAME
from dmagent_loader.shards.writing.packing import TextTokenizer
from dmagent_loader.shards.writing.place import place_of

_SHOWN_TOPICS = 5


def add_label_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``label``, ``compose`` and ``start-state``."""
    _add_label(subparsers)
    _add_compose(subparsers)
    _add_start_state(subparsers)


def _add_label(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "label",
        help="find the topic of every document, and sort documents by topic",
        description=(
            "Writes the topic of every document to OUTPUT/labels/<domain>. With --split, the documents also go to "
            "OUTPUT/<field>/<topic>.jsonl.gz, for `dmagent shard --input OUTPUT/<field> --field <field>`, and those "
            "without a topic to OUTPUT/unsure. Labels that documents carry are used instead of the classifier. A job "
            "that was killed continues where it stood when it is run again."
        ),
    )
    where = parser.add_mutually_exclusive_group(required=True)
    add_input_arguments(where)
    where.add_argument(
        "--shards",
        nargs="+",
        action="extend",
        metavar="SHARDS",
        help="a manifest.json or its folder, or NAME=PATTERN",
    )
    parser.add_argument("--field", choices=["source", "target"], help="field of domains whose name has none")
    add_output_arguments(parser, "the labels")
    parser.add_argument("--split", action="store_true", help="also write the documents sorted by topic")
    add_reading_arguments(parser)
    add_max_bad(parser, f"{REJECTS_NAME} beside its labels")
    add_worker_arguments(parser, "processes (default: one)")
    add_gpus_per_worker(parser)
    add_classifier_arguments(parser)
    parser.set_defaults(run=label)


def _add_compose(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compose",
        help="measure the topics of each domain on a sample of its rows",
        description=(
            f"Writes {COMPOSITIONS_NAME} beside the manifest, from which a sampler takes the compositions by itself. "
            "The sample of each domain is as large as --max-error needs."
        ),
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="a manifest.json or its folder, or NAME=PATTERN")
    parser.add_argument(
        "--output", metavar="FILE", help=f"the file or its URL (default: {COMPOSITIONS_NAME} beside the manifest)"
    )
    _add_sample_arguments(parser, "largest sample of a domain (default: no limit)")
    add_text_key(parser)
    add_key_ends_at(parser)
    add_classifier_arguments(parser)
    parser.set_defaults(run=compose_shards)


def _add_start_state(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "start-state",
        help="measure the topics of the base model's own training data, or of texts that it writes",
        description=(
            "Writes a file for AgentWeightedSampler(start_state=FILE). With --data or --shards, the base model's "
            "training data are sampled. Where they are not available, --model samples texts that the model writes from "
            "the start token alone (paper, appendix B)."
        ),
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--data", nargs="+", action="extend", metavar="PATH", help="files, globs or folders of training documents"
    )
    where.add_argument(
        "--shards",
        nargs="+",
        action="extend",
        metavar="SHARDS",
        help="a manifest.json or its folder, or NAME=PATTERN",
    )
    where.add_argument("--model", metavar="NAME", help="folder or Hub id of a causal language model")
    parser.add_argument(
        "--output", default="start_state.json", metavar="FILE", help="the file or its URL (default: %(default)s)"
    )
    _add_sample_arguments(
        parser, f"largest sample (default: {MOST_DOCUMENTS:,} documents of files, {MOST_TEXTS:,} texts of a model)"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--keep-texts", type=Path, metavar="FILE.jsonl.gz", help="keep the model's texts")
    add_reading_arguments(parser)
    parser.add_argument(
        "--max-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out and count up to N records of --data that are no documents (default: 0)",
    )
    add_classifier_arguments(parser)
    parser.set_defaults(run=start_state)


def _add_sample_arguments(parser: argparse.ArgumentParser, documents_help: str) -> None:
    parser.add_argument(
        "--max-error",
        type=float,
        default=MAX_ERROR,
        metavar="X",
        help="expected total variation between the shares of the sample and those of all documents "
        "(default: %(default)s)",
    )
    parser.add_argument("--documents", type=int, metavar="N", help=documents_help)
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")


def add_text_key(parser: argparse.ArgumentParser) -> None:
    """Adds the column of json members that holds the text."""
    parser.add_argument("--text-key", default="text", help="column with the text (default: %(default)s)")


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `labeller_of` and `shard_documents` read."""
    parser.add_argument(
        "--classifier",
        default=BUNDLED,
        metavar="NAME",
        help="'linear' (bundled), or a folder or Hub id of NVIDIA's domain classifier or WebOrganizer's topic "
        "classifier (default: %(default)s)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=MIN_CONFIDENCE,
        metavar="P",
        help="least probability of a topic; below it, the answer is 'unsure' (default: %(default)s)",
    )
    parser.add_argument("--label-key", metavar="COLUMN", help="column with the label (default: the usual ones)")
    parser.add_argument("--ignore-labels", action="store_true", help="classify documents that carry a label, too")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer of packed rows")
    parser.add_argument("--eos-token", metavar="TOKEN", help="end-of-text token (default: the tokenizer's)")
    parser.add_argument("--device", help="torch device of the classifier (default: the GPU if there is one)")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="texts per batch (default: %(default)s)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


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


def compose_shards(args: argparse.Namespace) -> int:
    """Measures the compositions, writes each when it is measured and prints a summary; 1 if a domain has none."""
    labeller = labeller_of(args)
    collection, manifests = open_shards(args)
    output = args.output
    if output is None:
        if len(manifests) != 1:
            raise ConfigurationError(
                f"compositions go beside one {MANIFEST_NAME}, but {len(manifests)} were given: pass --output FILE"
            )
        output = beside(manifests[0].url, COMPOSITIONS_NAME)
    _check_folder(output)
    digests = {name: manifest.digest(name) for manifest in manifests for name in manifest}
    config = _sample_config(args)
    try:
        found = load_compositions(output)
    except ShardNotFoundError:
        found = {}
    status = 0
    for name, documents in shard_documents(collection, manifests, args).items():
        shards, progress = digests.get(name, ""), not args.no_progress
        try:
            found[name] = compose(name, documents, labeller, config, shards=shards, progress=progress)
        except ShardError as error:
            print(f"dmagent compose: {error}", file=sys.stderr)
            status = 1
            continue
        print(_composition_line(name, found[name]))
        _write(output, found)
    if status == 0:
        print(f"wrote {output}")
    return status


def start_state(args: argparse.Namespace) -> int:
    """Measures the start state, writes it and prints a summary."""
    labeller, config, progress = labeller_of(args), _sample_config(args), not args.no_progress
    generation = GenerationConfig(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    if args.model is None and args.keep_texts is not None:
        raise ConfigurationError("--keep-texts keeps the texts of a model, but no --model is given: leave it out")
    if args.model is None and generation != GenerationConfig(seed=args.seed):
        raise ConfigurationError("--temperature and --max-tokens are for the texts of a --model: leave them out")
    if args.data is None and args.max_bad:
        raise ConfigurationError("--max-bad is for the documents of --data: leave it out")
    _check_folder(args.output)
    if args.model is not None:
        model, tokenizer = language_model(args.model, args.device)
        found = start_state_of_model(
            model, tokenizer, labeller, config, generation, keep=args.keep_texts, progress=progress
        )
    elif args.shards:
        rows = JoinedDocuments(list(shard_documents(*open_shards(args), args).values()))
        found = compose(START_STATE, rows, labeller, config, progress=progress)
    else:
        found = _start_state_of_files(args, labeller, config)
    print(_composition_line(START_STATE, found))
    _write(args.output, {START_STATE: found})
    print(f"wrote {args.output}")
    return 0


def _start_state_of_files(args: argparse.Namespace, labeller: Labeller, config: SampleConfig) -> Composition:
    documents, bad = FileDocuments(START_STATE, args.data, read_options(args)), list[str]()

    def reject(record: Rejected) -> None:
        bad.append(record.reason)
        check_bad(START_STATE, len(bad), record.reason, args.max_bad)

    progress = not args.no_progress
    with tqdm(total=documents.size, unit="B", unit_scale=True, desc="reading documents", disable=not progress) as bar:
        found = start_state_of_documents(documents.read(bar.update, reject), labeller, config, progress=progress)
    if bad:
        print(f"{len(bad):,} bad records left out, the last: {bad[-1]}")
    return found


def _check_folder(output: str) -> None:
    """Checks before a long measurement that its result has a place."""
    refuse_unwritable(output)
    folder = Path(local_path(output)).parent
    if is_local(output) and not folder.is_dir():
        raise ConfigurationError(f"{output} cannot be written: make the folder {str(folder)!r} first")


def _write(output: str, compositions: dict[str, Composition]) -> None:
    try:
        write_url(output, compositions_text(compositions).encode())
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error}; pass another --output") from error


def _sample_config(args: argparse.Namespace) -> SampleConfig:
    return SampleConfig(max_error=args.max_error, most_documents=args.documents, seed=args.seed)


def labeller_of(args: argparse.Namespace) -> Labeller:
    """The classifier and settings of the arguments."""
    config = LabelConfig(
        min_confidence=args.min_confidence, label_key=args.label_key, use_stated=not args.ignore_labels
    )
    return Labeller(load_classifier(args.classifier, device=args.device, batch_size=args.batch_size), config)


def open_shards(args: argparse.Namespace) -> tuple[ShardCollection, list[Manifest]]:
    """The shards of the arguments, and the manifests among them.

    Raises:
        ShardNotFoundError: An argument is neither a manifest, nor its folder, nor ``NAME=PATTERN``.
        ShardError: The shards cannot be opened, or a file is not one.
    """
    for argument in args.shards:
        _check_is_no_raw_data(argument)
        if not is_local(argument) or any(character in argument for character in "=*?[{"):
            continue
        path = local_path(argument)
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, MANIFEST_NAME)):
            raise ShardNotFoundError(
                f"the folder {argument!r} has no {MANIFEST_NAME}: name its domains, such as source/web='{path}/*.tar'"
            )
        if not os.path.exists(path):
            raise ShardNotFoundError(
                f"there is no {argument!r}, seen from {os.getcwd()!r}: give a {MANIFEST_NAME}, its folder, or "
                "NAME=PATTERN"
            )
    shards, manifests = listed_shards(args.shards)
    collection = ShardCollection.open(
        shards, progress=not args.no_progress, manifests=manifests, key_ends_at=args.key_ends_at
    )
    return collection, manifests


def _check_is_no_raw_data(argument: str) -> None:
    """Refuses files that `dmagent shard` reads, but that are not shards."""
    name, separator, pattern = argument.partition("=")
    path = pattern if separator and "://" not in name else argument
    if os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        return
    kind = kind_of_name(path)
    if kind not in (None, Kind.TAR) and not path.endswith(".json"):  # a manifest may have any name
        raise ShardError(
            f"{path!r} is not a shard: write shards of it first (dmagent shard --domain source/NAME={path} --output "
            "SHARDS), and give their folder"
        )


def shard_documents(
    collection: ShardCollection, manifests: Sequence[Manifest], args: argparse.Namespace
) -> dict[str, ShardDocuments]:
    """Domain -> its rows as documents.

    Raises:
        ConfigurationError: The rows were packed with another tokenizer than that of the arguments.
    """
    tokenizer = None if args.tokenizer is None else TextTokenizer.load(args.tokenizer, args.eos_token)
    if tokenizer is not None:
        for manifest in manifests:
            for domain, settings in manifest.settings.items():
                _check_tokenizer(domain, settings, tokenizer, args.tokenizer)
    return {
        name: ShardDocuments(collection, number, args.text_key, tokenizer)
        for number, name in enumerate(collection.domains)
    }


def _check_tokenizer(domain: str, settings: Mapping[str, Any], tokenizer: TextTokenizer, name: str) -> None:
    """Checks the tokenizer against the settings with which a domain was packed: another one decodes to other text."""
    packed, end = settings.get("tokenizer_sha256"), settings.get("eos_id")
    if packed not in (None, tokenizer.sha256):
        raise ConfigurationError(
            f"the rows of {domain!r} were packed with the tokenizer {settings.get('tokenizer')!r} "
            f"({str(packed)[:12]}), but {name!r} is another one ({tokenizer.sha256[:12]}): "
            "name the one that packed them (--tokenizer)"
        )
    if end not in (None, tokenizer.eos_id):
        raise ConfigurationError(
            f"the documents in the rows of {domain!r} are ended by token {end}, but the end-of-text token is "
            f"{tokenizer.eos_id}: name the one with which they were packed (--eos-token)"
        )


def _labels_line(name: str, found: LabelledDomain) -> str:
    total = max(1.0, float(found.counts.sum()))
    most = [i for i in np.argsort(-found.counts)[:_SHOWN_TOPICS] if found.counts[i] > 0]
    topics = ", ".join(f"{CANONICAL_TOPICS[i]} {found.counts[i] / total:.0%}" for i in most)
    bad = f", {found.bad_records:,} bad records left out" if found.bad_records else ""
    known = _known(found.documents, found.unsure, found.stated)
    return f"{name}: {found.documents:,} documents{bad}, {known}: {topics}"


def _composition_line(name: str, found: Composition) -> str:
    total = sum(found.counts.values())
    most = sorted(found.counts, key=lambda topic: -found.counts[topic])[:_SHOWN_TOPICS]
    ends = {topic: " ({:.0%} to {:.0%})".format(*found.intervals[topic]) if found.error else "" for topic in most}
    topics = ", ".join(f"{topic} {found.counts[topic] / total:.0%}{ends[topic]}" for topic in most)
    line = f"{name}: sample of {found.documents:,}, {_known(found.documents, found.unsure, found.stated)}: {topics}"
    if found.is_thin:
        unused = "" if name == START_STATE else ", and a sampler does not use it by itself"
        return line + (
            f"\n  warning: {found.unsure / found.documents:.0%} of the sample has no topic, so the composition stands "
            f"for the rest only{unused}: use another --classifier"
        )
    if not found.error:
        return f"{line}; {found.error_text}"
    return f"{line}; {found.error_text}, {found.documents_needed:,} documents suffice"


def _known(documents: int, unsure: int, stated: int) -> str:
    text = f"{(documents - unsure) / max(1, documents):.0%} with a topic"
    return text + (f" ({stated:,} stated)" if stated else "")

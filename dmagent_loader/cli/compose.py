"""``dmagent compose`` measures the topics of a sample of each domain, and ``dmagent start-state`` those of the base
model's own training data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

from dmagent_loader.cli.classifying import (
    SHOWN_TOPICS,
    add_classifier_arguments,
    add_shards,
    add_text_key,
    known_share,
    labeller_of,
    open_shards,
    shard_documents,
)
from dmagent_loader.cli.generate import add_sampling_arguments, language_model
from dmagent_loader.cli.shards import add_key_ends_at, add_reading_arguments, read_options
from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.labelling.compose import MAX_ERROR, SampleConfig, compose
from dmagent_loader.labelling.documents import FileDocuments, JoinedDocuments
from dmagent_loader.labelling.generation import GenerationConfig
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.labelling.start_state import (
    MOST_DOCUMENTS,
    MOST_TEXTS,
    start_state_of_documents,
    start_state_of_model,
)
from dmagent_loader.shards.compositions import (
    COMPOSITIONS_NAME,
    START_STATE,
    Composition,
    compositions_text,
    load_compositions,
)
from dmagent_loader.shards.inputs.records import Rejected
from dmagent_loader.shards.manifest import MANIFEST_NAME, beside
from dmagent_loader.shards.sources.urls import is_local, local_path
from dmagent_loader.shards.sources.writing import refuse_unwritable, write_url
from dmagent_loader.shards.writing.collecting import check_bad


def configure_compose(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``compose``."""
    parser.description = (
        f"Writes {COMPOSITIONS_NAME} beside the manifest, from which a sampler takes the compositions by itself. "
        "The sample of each domain is as large as --max-error needs."
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


def configure_start_state(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``start-state``."""
    parser.description = (
        "Writes a file for AgentWeightedSampler(start_state=FILE). With --data or --shards, the base model's "
        "training data are sampled. Where they are not available, --model samples texts that the model writes from "
        "the start token alone (paper, appendix B)."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--data", nargs="+", action="extend", metavar="PATH", help="files, globs or folders of training documents"
    )
    add_shards(where)
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


def _composition_line(name: str, found: Composition) -> str:
    total = sum(found.counts.values())
    most = sorted(found.counts, key=lambda topic: -found.counts[topic])[:SHOWN_TOPICS]
    ends = {topic: " ({:.0%} to {:.0%})".format(*found.intervals[topic]) if found.error else "" for topic in most}
    topics = ", ".join(f"{topic} {found.counts[topic] / total:.0%}{ends[topic]}" for topic in most)
    line = (
        f"{name}: sample of {found.documents:,}, {known_share(found.documents, found.unsure, found.stated)}: {topics}"
    )
    if found.is_thin:
        unused = "" if name == START_STATE else ", and a sampler does not use it by itself"
        return line + (
            f"\n  warning: {found.unsure / found.documents:.0%} of the sample has no topic, so the composition stands "
            f"for the rest only{unused}: use another --classifier"
        )
    if not found.error:
        return f"{line}; {found.error_text}"
    return f"{line}; {found.error_text}, {found.documents_needed:,} documents suffice"

"""``dmagent inspect``: a summary of an agent checkpoint, or a page about data."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.checkpoint import CARD_FILE, CONFIG_FILE, is_plus, list_bundled, read_config, resolve
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.cli.classifying import (
    add_classifier_arguments,
    add_text_key,
    labeller_of,
    open_shards,
    shard_documents,
)
from dmagent_loader.cli.shards import add_key_ends_at
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.labelling.classifier import load_classifier
from dmagent_loader.labelling.filtering import DocumentChecks, FilterConfig
from dmagent_loader.labelling.survey import survey
from dmagent_loader.shards.sources.urls import is_local

CARD_LINES = 12
DEFAULT_OUTPUT = Path("dmagent-data.html")
SAMPLE = 1000


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``inspect``."""
    parser.description = (
        "Prints size, config, statistics, digest and card of an agent. Writes a page about shards: a treemap of "
        "topics, also as a PNG, and a table of the domains: rows, lengths, repeats, topics, and on request "
        "quality and sources."
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="NAME_OR_SHARDS",
        help=f"an agent: bundled ({', '.join(list_bundled()) or 'none'}), a directory or a Hub id; or shards: a "
        "manifest.json or its folder, or NAME=PATTERN",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FILE.html",
        help="the page about shards; the picture goes beside it as FILE.png (default: %(default)s)",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=SAMPLE,
        metavar="N",
        help="rows read of each domain (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument("--quality", metavar="NAME", help="folder or Hub id of NVIDIA's quality classifier")
    parser.add_argument(
        "--quality-key", metavar="COLUMN", help="column with the quality, of rows whose columns are kept in the shards"
    )
    parser.add_argument(
        "--source-key", metavar="COLUMN", help="column that says where a document is from, such as origin or url"
    )
    add_text_key(parser)
    add_key_ends_at(parser)
    add_classifier_arguments(parser)
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Shows a checkpoint or data."""
    if len(args.shards) == 1 and not _is_data(args.shards[0]):
        return _inspect_agent(args.shards[0])
    return _inspect_data(args)


def _is_data(argument: str) -> bool:
    if "=" in argument or not is_local(argument) or argument.endswith(".json") or os.path.isfile(argument):
        return True
    return os.path.isdir(argument) and not os.path.isfile(os.path.join(argument, CONFIG_FILE))


def _inspect_agent(name: str) -> int:
    """Verifies the checkpoint by loading it, and prints it."""
    directory = resolve(name)
    values = read_config(directory)
    if is_plus(name):
        network, label = checkpoint.load(name)
        print(f"{label}: {network.num_parameters():,} parameters, any domains")
    else:
        agent = MixingAgent.from_pretrained(name)
        domains = values.pop("domains")
        extent = f"{len(domains)} domains ({domains[0]} ... {domains[-1]})"
        print(f"{agent.name}: {agent.num_parameters():,} parameters, {extent}")
    for key, value in values.items():
        print(f"  {key}: {json.dumps(value)}")
    card = directory / CARD_FILE
    if card.is_file():
        print(f"--- {CARD_FILE}")
        print("\n".join(card.read_text(encoding="utf-8").splitlines()[:CARD_LINES]))
    return 0


def _inspect_data(args: argparse.Namespace) -> int:
    """Samples the domains, writes the page and prints the table.

    Raises:
        ConfigurationError: The output cannot be written, the sample is empty, or no row has a column that is named.
        MissingExtraError: matplotlib is not installed.
    """
    output: Path = args.output
    if output.suffix != ".html":
        raise ConfigurationError(f"--output is {str(output)!r}; it must be a file that ends in .html")
    if args.sample < 1:
        raise ConfigurationError(f"--sample is {args.sample}; it must be at least 1")
    require_extra("matplotlib.figure", "report")
    from dmagent_loader._report.data_page import DomainFacts, write_data_page

    labeller = labeller_of(args)
    quality = load_classifier(args.quality, device=args.device, batch_size=args.batch_size) if args.quality else None
    checks = None
    if quality is not None or args.quality_key is not None:
        checks = DocumentChecks(FilterConfig(dropped_quality=(), quality_key=args.quality_key), quality=quality)
    collection, manifests = open_shards(args)
    summaries = collection.summaries()
    facts: list[DomainFacts] = []
    for name, documents in shard_documents(collection, manifests, args).items():
        found = survey(
            name,
            documents,
            labeller,
            most_rows=args.sample,
            seed=args.seed,
            checks=checks,
            source_key=args.source_key,
        )
        shortest, median, longest = (int(length) for length in np.percentile(found.lengths, (10, 50, 90)))
        own = [summary for summary in summaries if summary.domain == name]
        facts.append(
            DomainFacts(
                name=name,
                field=name.split("/", 1)[0],
                rows=found.rows,
                shards=len(own),
                bytes=sum(summary.file_bytes for summary in own),
                tokens=None if found.row_tokens is None else found.rows * found.row_tokens,
                sampled=len(found.lengths),
                lengths=(shortest, median, longest),
                topics=found.topics,
                unsure=found.unsure,
                repeated=found.repeated,
                quality=found.quality,
                sources=found.sources,
            )
        )
    for option, column, values in (
        ("--quality-key", args.quality_key, [domain.quality for domain in facts]),
        ("--source-key", args.source_key, [domain.sources for domain in facts]),
    ):
        if column is not None and not any(values):
            raise ConfigurationError(
                f"no row of the samples has the column {column!r} ({option}): correct it, or write the shards with it "
                "(dmagent shard --keep-columns)"
            )
    report = write_data_page(facts, title="What is in the data", classifier=labeller.classifier.name)
    print(replace(report.table, columns=[column.replace("\n", " ") for column in report.table.columns]).to_text())
    for path, data in ((output, report.page.encode()), (output.with_suffix(".png"), report.picture)):
        try:
            write_atomically(path, data)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error}; pass another --output") from error
        print(f"wrote {path}")
    return 0

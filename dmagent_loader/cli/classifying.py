"""What the commands that classify documents have in common: arguments, the classifier, and shards as documents."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dmagent_loader.cli.shards import listed_shards
from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.labelling.classifier import BUNDLED, load_classifier
from dmagent_loader.labelling.documents import ShardDocuments
from dmagent_loader.labelling.labels import MIN_CONFIDENCE, LabelConfig, Labeller
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.inputs.kinds import Kind, kind_of_name
from dmagent_loader.shards.manifest import MANIFEST_NAME, Manifest
from dmagent_loader.shards.sources.urls import is_local, local_path
from dmagent_loader.shards.writing.packing import TextTokenizer

SHOWN_TOPICS = 5
"""Topics that a summary names."""


def add_shards(where: argparse._ActionsContainer) -> None:
    """Adds the shards that `open_shards` opens."""
    where.add_argument(
        "--shards",
        nargs="+",
        action="extend",
        metavar="SHARDS",
        help="a manifest.json or its folder, or NAME=PATTERN",
    )


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


def known_share(documents: int, unsure: int, stated: int) -> str:
    """The share of documents with a topic, in words."""
    text = f"{(documents - unsure) / max(1, documents):.0%} with a topic"
    return text + (f" ({stated:,} stated)" if stated else "")

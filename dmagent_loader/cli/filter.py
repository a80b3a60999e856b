"""``dmagent filter``: drops documents that should not be trained on, and counts them by reason."""

from __future__ import annotations

import argparse

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
from dmagent_loader.environment.questions import read_questions
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.classifier import load_classifier
from dmagent_loader.labelling.documents import FileDocuments
from dmagent_loader.labelling.filter_files import filter_domains
from dmagent_loader.labelling.filtering import NGRAM, SHORTEST_QUESTION, DocumentFilter, FilterConfig, counts_text
from dmagent_loader.shards.writing.place import place_of


def configure_filter(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``filter``."""
    defaults = FilterConfig()
    parser.description = (
        "Writes the documents that are kept to OUTPUT/<field>/<domain>.jsonl.gz, for `dmagent shard --input "
        "OUTPUT/<field> --field <field>`, and the reason for each of the others to OUTPUT/dropped. Of repeated "
        "documents, the first is kept, over all domains in the order given. A job that was killed goes on where it "
        "stood when it is run again."
    )
    add_input_arguments(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--field", choices=["source", "target"], help="field of domains whose name has none")
    add_output_arguments(parser, "the kept documents")
    add_reading_arguments(parser)
    add_max_bad(parser, "OUTPUT/dropped")
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
        action="extend",
        default=[],
        metavar="FILE",
        help=f"question files (columns question, answer): drop documents with {NGRAM} consecutive words of a question",
    )
    parser.add_argument("--quality", metavar="NAME", help="folder or Hub id of NVIDIA's quality classifier")
    parser.add_argument(
        "--quality-key",
        metavar="COLUMN",
        help="column with the quality of a document, such as NeMo Curator's quality_pred; only documents without one "
        "are classified",
    )
    parser.add_argument(
        "--drop-quality",
        nargs="+",
        action="extend",
        metavar="LABEL",
        help=f"labels of quality that are dropped (default: {' '.join(defaults.dropped_quality)})",
    )
    parser.add_argument("--device", help="torch device of the classifier (default: the GPU if there is one)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts in a batch (default: 64)")
    add_worker_arguments(parser, "processes (default: one)")
    add_gpus_per_worker(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=filter_documents)


def filter_documents(args: argparse.Namespace) -> int:
    """Filters the documents and prints the counts.

    Raises:
        ConfigurationError: A setting cannot work or has no effect, or the output cannot be written to or holds inputs.
    """
    if args.drop_quality and not (args.quality or args.quality_key):
        raise ConfigurationError(
            "--drop-quality has no effect without --quality or --quality-key: name the classifier of quality, or the "
            "column with the labels"
        )
    config = FilterConfig(
        min_characters=args.min_characters,
        max_characters=args.max_characters,
        exact_duplicates=not args.keep_duplicates,
        near_duplicates=args.near_duplicates,
        dropped_quality=tuple(args.drop_quality or FilterConfig.dropped_quality),
        quality_key=args.quality_key,
    )
    domains = {name: FileDocuments(name, paths, read_options(args)) for name, paths in input_domains(args).items()}
    questions = read_questions(args.decontaminate) if args.decontaminate else []
    quality = load_classifier(args.quality, device=args.device, batch_size=args.batch_size) if args.quality else None
    checked = DocumentFilter(config, (f"{q.question} {q.answer}" for q in questions), quality)
    if questions:
        print(
            f"{checked.num_questions_checked:,} of {len(questions):,} questions are looked for; the others have "
            f"fewer than {SHORTEST_QUESTION} words"
        )
    counts = filter_domains(
        domains,
        args.output,
        checked,
        max_bad=args.max_bad,
        work_dir=args.work_dir,
        workers=workers_of(args),
        progress=not args.no_progress,
    )
    for name, found in counts.items():
        print(f"{name}: {counts_text(found)}")
    place = place_of(args.output, args.work_dir)
    for field in dict.fromkeys(name.split("/", 1)[0] for name in domains):
        folder = place.url(field)
        print(f"wrote {folder}; next: dmagent label or shard --input {folder} --field {field}")
    return 0

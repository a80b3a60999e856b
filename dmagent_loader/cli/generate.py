"""``dmagent generate`` lets a base model write the documents of a source field."""

from __future__ import annotations

import argparse
from typing import Any

from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.labelling.generated_files import generate_documents
from dmagent_loader.labelling.generation import GenerationConfig
from dmagent_loader.labelling.transformer import chosen_device


def configure_generate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``generate``."""
    defaults = GenerationConfig()
    parser.description = (
        "Writes texts of a base model to OUTPUT/part-*.jsonl.gz, as a source field where the data that it was "
        "trained on are not available. `dmagent filter`, `label` and `shard` read the folder. A text begins with "
        "the start token alone, and ends with the end-of-text token, after --max-tokens, or where the model's "
        "positions end. A job that was killed continues where it stood when it is run again, also for more texts."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a causal language model")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the texts")
    parser.add_argument("--documents", type=int, required=True, metavar="N", help="number of texts in the folder")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        metavar="N",
        help="texts written together (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--device", help="torch device of the model (default: the GPU if there is one)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=generate)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a model's texts are sampled."""
    defaults = GenerationConfig()
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="sampling temperature (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        metavar="N",
        help="largest number of tokens of a text (default: %(default)s)",
    )


def generate(args: argparse.Namespace) -> int:
    """Writes the texts and prints a summary."""
    config = GenerationConfig(
        temperature=args.temperature, max_tokens=args.max_tokens, batch_size=args.batch_size, seed=args.seed
    )
    model, tokenizer = language_model(args.model, args.device)
    filled = generate_documents(model, tokenizer, args.output, args.documents, config, progress=not args.no_progress)
    empty = args.documents - filled
    print(
        f"{args.output}: {args.documents:,} texts"
        + (f", of which {empty:,} are empty and are not read" if empty else "")
    )
    print(
        f"next: dmagent filter --domain source/all={args.output} --output FILTERED --min-characters 200 "
        "--near-duplicates 0.8"
    )
    return 0


def language_model(name: str, device: str | None) -> tuple[Any, Any]:
    """A causal language model on its device, and its tokenizer.

    Raises:
        ConfigurationError: It cannot be loaded.
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "label")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype="auto")
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigurationError(
            f"no language model could be loaded from {name!r} ({error}): give a folder that save_pretrained wrote, "
            "with its tokenizer, or a Hub id"
        ) from error
    return model.to(chosen_device(device)), tokenizer

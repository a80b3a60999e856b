"""Texts of a model in files, as a source field where the base model's own data are not available.

``OUTPUT/part-000000.jsonl.gz`` and so on hold `PART_BATCHES` batches of texts each. A part is written whole, and its
texts depend only on the model, the settings and its number, so a killed job writes the missing parts only.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dmagent_loader._files import only_writer, write_atomically
from dmagent_loader._validation import read_regular
from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling.generation import GenerationConfig, generate_texts
from dmagent_loader.labelling.settings_file import differing_settings
from dmagent_loader.shards.sources.urls import display_url, is_local

PART_BATCHES = 16
"""Batches of a part: what a killed job may lose."""
SETTINGS_FILE = ".settings.json"
"""Hidden, because commands read every other ``.json`` in a folder as data."""

_SAMPLED_VALUES = 256
_MAX_PART_BYTES = 1 << 30


def generate_documents(
    model: Any,
    tokenizer: Any,
    output: str | os.PathLike[str],
    documents: int,
    config: GenerationConfig | None = None,
    *,
    progress: bool = True,
) -> int:
    """Writes texts of a model. Run again after a kill, or for more documents, it writes the missing ones.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        output: Folder of the texts; created if missing. All commands that read documents read it.
        documents: Number of texts in the folder afterwards.
        config: Settings of the sampling; None: the defaults.
        progress: Show a progress bar.

    Returns:
        Number of texts that are not empty.

    Raises:
        ConfigurationError: `documents` is less than 1; the output is a URL; the folder holds more texts than that,
            texts of another model or with other settings, or other files; another process writes to it; or the
            tokenizer has no start or end-of-text token.
        ShardError: A part is damaged.
    """
    if documents < 1:
        raise ConfigurationError(f"documents is {documents}; it must be at least 1")
    if not is_local(os.fspath(output)):
        raise ConfigurationError(
            f"{display_url(os.fspath(output))} is a URL, but the texts of a model are written to local folders only: "
            "pass a local --output, and `dmagent filter --output URL` writes them to the store"
        )
    config = config or GenerationConfig()
    root, size = Path(output), PART_BATCHES * config.batch_size
    with only_writer(root, "texts"):
        paths = [root / f"part-{number:06d}.jsonl.gz" for number in range(-(-documents // size))]
        _check_others(root, paths, documents)
        _continue_in(root, model, tokenizer, config)
        filled = 0
        with tqdm(total=documents, unit="text", desc="generating", disable=not progress) as bar:
            for number, path in enumerate(paths):
                wanted = min(size, documents - number * size)
                texts = _read(path) if path.exists() else []
                if len(texts) < wanted:
                    written = generate_texts(model, tokenizer, config, first_batch=number * PART_BATCHES)
                    texts = []
                    for text in itertools.islice(written, wanted):
                        texts.append(text.replace("\0", ""))  # a token of many vocabularies, but no text to a reader
                        bar.update()
                    lines = (json.dumps({"id": number * size + n, "text": text}) for n, text in enumerate(texts))
                    content = "".join(f"{line}\n" for line in lines)
                    write_atomically(path, gzip.compress(content.encode(), 6, mtime=0))
                elif len(texts) > wanted:
                    raise ConfigurationError(_too_many(root, documents))
                else:
                    bar.update(wanted)
                filled += sum(bool(text.strip()) for text in texts)
    return filled


def _read(path: Path) -> list[str]:
    try:
        lines = gzip.decompress(read_regular(path, _MAX_PART_BYTES)).splitlines()
        return [json.loads(line)["text"] for line in lines]
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ShardError(
            f"the texts {path} cannot be read ({error}): remove the file, and run the command again"
        ) from error


def _too_many(root: Path, documents: int) -> str:
    return f"{str(root)!r} holds more than {documents} texts: ask for at least as many, or choose another --output"


def _check_others(root: Path, paths: list[Path], documents: int) -> None:
    """Checks that the folder holds nothing that would be read beside the texts."""
    others = sorted(path.name for path in root.iterdir() if not path.name.startswith(".") and path not in paths)
    if others and all(name.startswith("part-") for name in others):
        raise ConfigurationError(_too_many(root, documents))
    if others:
        raise ConfigurationError(
            f"{str(root)!r} holds other files, {others[:3]}, which would be read with the texts: choose another "
            "--output"
        )


def _continue_in(root: Path, model: Any, tokenizer: Any, config: GenerationConfig) -> None:
    """Notes the model and the settings, or checks that they are those of the texts in the folder.

    Raises:
        ConfigurationError: They are not.
    """
    differing = differing_settings(
        root / SETTINGS_FILE,
        {
            "model": _digest(model),
            "tokenizer": [tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)],
            "part_batches": PART_BATCHES,
            **asdict(config),
        },
    )
    if differing:
        raise ConfigurationError(
            f"{str(root)!r} holds texts with another {', '.join(differing)}: choose another --output, or remove the "
            "folder to write them again"
        )


@torch.no_grad()
def _digest(model: Any) -> str:
    """Digest of the name, the shape and the first values of each weight."""
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        first = weights.flatten()[:_SAMPLED_VALUES].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weights.shape)} ".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]

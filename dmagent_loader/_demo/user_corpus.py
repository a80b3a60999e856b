"""The demo on a user's text: ``DIR/source/``, ``DIR/target.../`` and ``DIR/env/`` with JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.corpus import GENERAL, Corpus, affordable
from dmagent_loader.environment import Question
from dmagent_loader.environment.questions import read_questions
from dmagent_loader.errors import ConfigurationError, EmptyShardError, EnvironmentDataError
from dmagent_loader.mixture.domains import SOURCE, TARGET
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import domain_name, find_inputs
from dmagent_loader.shards.inputs.kinds import Kind, kind_of_name

HELD_OUT_ONE_IN = 20
_FIRST_HELD_OUT = 4
"""First held-out document, counted from 0 over the documents of a field: early, so even a few documents include one."""

_LAYOUT = (
    "expected source/*.jsonl(.gz) and target*/*.jsonl(.gz) with a column 'text', and env/general.jsonl(.gz) and "
    "env/<target>.jsonl(.gz) with the columns 'question' and 'answer'"
)
_SPLIT_PREFERENCE = ("val", "dev", "train", "test")
"""Order of preference among several question files: the test set comes last."""


def read_user_corpus(
    folder: Path, config: DemoConfig, target: str | None = None, progress: Callable[[int], None] = lambda files: None
) -> Corpus:
    """Reads the text of a user, up to the limits of the demo.

    Every file is a domain, named after the file. One document in twenty is held out.

    Args:
        folder: Folder with ``source``, one or more folders whose names begin with ``target``, and ``env``.
        config: Limits; the limit of a field is divided equally among its files.
        target: Name of the target folder; None: the first in alphabetical order.
        progress: Function called with the number of files read since the last call.

    Raises:
        ConfigurationError: A folder is missing or holds no JSON lines.
        ShardError: A document file cannot be read; `EmptyShardError`: it has no documents.
        EnvironmentDataError: Question files are missing or cannot be read.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {str(folder)!r}, so there is no text to train on: {_LAYOUT}")
    targets = sorted(path.name for path in folder.glob(f"{TARGET}*") if path.is_dir())
    if target is not None and target not in targets:
        raise ConfigurationError(
            f"{str(folder)!r} has no target folder {target!r}; its target folders are {targets}: pass one of them"
        )
    if not targets:
        raise ConfigurationError(f"{str(folder)!r} has no folder whose name begins with 'target': {_LAYOUT}")
    notes = []
    chosen = target or targets[0]
    if target is None and len(targets) > 1:
        notes.append(f"of the target folders {', '.join(targets)}, {chosen} is used; --target selects another")

    documents: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for field, name, limit in ((SOURCE, SOURCE, config.source_chars), (TARGET, chosen, config.target_chars)):
        held_out[field], counter = [], count()
        files = _json_lines_in(folder / name)
        for path in files:
            documents[f"{field}/{domain_name(path)}"] = _read_documents(
                path, limit // len(files), counter, held_out[field]
            )
            progress(1)
    questions: dict[str, list[Question]] = {}
    for field, path in _question_files(folder / "env", chosen.removeprefix(TARGET).strip("_-")).items():
        available = read_questions(path)
        questions[field] = affordable(available, config)
        notes.append(f"environment {field}: {len(questions[field])} of the {len(available)} questions in {path.name}")
    return Corpus(
        title=f"the text in {folder.name}",
        documents=documents,
        held_out=held_out,
        questions=questions,
        notes=tuple(notes),
    )


def _json_lines_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if kind_of_name(path.name) is Kind.JSON) if folder.is_dir() else []
    if not files:
        raise ConfigurationError(f"{str(folder)!r} is missing or holds no .jsonl or .jsonl.gz file: {_LAYOUT}")
    names = [domain_name(path) for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"{str(folder)!r} has several files for the domain(s) {twice}, such as name.jsonl and name.jsonl.gz, but "
            "each file must be a separate domain: rename or remove one"
        )
    return files


def _read_documents(path: Path, limit: int, counter: Iterator[int], held_out: list[str]) -> list[str]:
    """The first documents of a file, up to `limit` characters; adds those that are not trained on to `held_out`."""
    train: list[str] = []
    chars = 0
    for document in DocumentReader(find_inputs(str(path), [path])):
        if next(counter) % HELD_OUT_ONE_IN == _FIRST_HELD_OUT:
            held_out.append(document.text)
            continue
        # Cut to the limit: a file that is one long document must not crowd out the other files.
        train.append(document.text[: limit - chars])
        chars += len(train[-1])
        if chars >= limit:
            break
    if not train:
        raise EmptyShardError(f"{path} holds no documents, so its domain would be empty: add text or remove the file")
    return train


def _question_files(folder: Path, target: str) -> dict[str, Path]:
    """The environment: ``general``, and the questions of the target field."""
    files = sorted(path for path in folder.iterdir() if kind_of_name(path.name) is Kind.JSON) if folder.is_dir() else []
    general = _best(files, (GENERAL, "mmlu"))
    others = [path for path in files if path != general]
    acquired = _best(others, (target,)) if target else others[0] if len(others) == 1 else None
    if general is None or acquired is None:
        wanted = f"general.jsonl and {target or '<target>'}.jsonl"
        raise EnvironmentDataError(
            f"{str(folder)!r} needs {wanted} (or .jsonl.gz), the questions that measure the field to keep and the "
            f"field to learn; it holds {[path.name for path in files] or 'no question file'}: add or rename files"
        )
    return {GENERAL: general, target or domain_name(acquired): acquired}


def _best(files: list[Path], names: tuple[str, ...]) -> Path | None:
    """The file with exactly one of the names, or with a name that begins with one."""
    for name in names:
        exact = [path for path in files if domain_name(path) == name]
        if exact:
            return exact[0]
        related = [path for path in files if domain_name(path).startswith(f"{name}_")]
        if related:
            return min(related, key=_split_rank)
    return None


def _split_rank(path: Path) -> tuple[int, str]:
    parts = domain_name(path).split("_")
    ranks = [_SPLIT_PREFERENCE.index(part) for part in parts if part in _SPLIT_PREFERENCE]
    return min(ranks, default=len(_SPLIT_PREFERENCE)), path.name

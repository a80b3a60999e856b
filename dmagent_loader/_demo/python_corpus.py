"""The demo's own corpus: the documentation and the code of the Python installation that runs it.

Source field: English documentation (the help topics, and docstrings of the standard library and of installed packages).
Target field: source code of the standard library. One module in eight is held out: neither its documentation nor its
code is used for training. Questions and held-out documents come from these modules.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.corpus import GENERAL, Corpus, affordable, normalized, unseen
from dmagent_loader._demo.python_groups import CODE_DOMAINS, DOCUMENTATION_DOMAINS, PACKAGE_GROUPS, STDLIB_GROUPS
from dmagent_loader._demo.python_source import DocumentedObject, PythonFile, dotted_name, files_under, string_table
from dmagent_loader.environment import Question
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import SOURCE, TARGET

CODE = "code"
HELD_OUT_ONE_IN = 8
MIN_DOMAIN_CHARS = 20_000
"""Smallest training text of a domain; a smaller domain is left out, with a note in the report."""


@dataclass
class _Collector:
    """Collects the text of one domain up to a limit, without duplicates."""

    limit: int
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    chars: int = 0
    seen: set[str] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.chars >= self.limit

    def add(self, read: Callable[[], str], *, held_out: bool) -> None:
        if self.full:
            return
        text = read()
        key = normalized(text)
        if len(key) < 200 or key in self.seen:
            return
        self.seen.add(key)
        if held_out:
            self.held_out.append(text)
        else:
            self.train.append(text)
            self.chars += len(text)


def is_held_out(module: str) -> bool:
    """Whether a module (or a help topic) is kept out of training; this depends on its name only."""
    return _number(module) % HELD_OUT_ONE_IN == 0


def build_python_corpus(config: DemoConfig, progress: Callable[[int], None] = lambda files: None) -> Corpus:
    """Collects the corpus from the running Python installation; reads files, imports nothing.

    Args:
        config: Sizes.
        progress: Function called with the number of files read since the last call.

    Raises:
        ConfigurationError: The installation holds too little text, for example because its sources were removed.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    pages = _collectors(DOCUMENTATION_DOMAINS.values(), config.source_chars)
    codes = _collectors(CODE_DOMAINS.values(), config.target_chars)
    general: list[Question] = []
    functions: list[Question] = []

    for topic, text in sorted(_help_topics(stdlib).items()):
        pages[DOCUMENTATION_DOMAINS["language"]].add(partial(str, text), held_out=is_held_out(f"topic {topic}"))
    for group, path, module in _stdlib_files(stdlib):
        page, code = pages[DOCUMENTATION_DOMAINS[group]], codes[CODE_DOMAINS[group]]
        progress(1)
        if page.full and code.full:
            continue
        file = PythonFile.read(path, module)
        if file is None:
            continue
        held_out = is_held_out(module)
        page.add(file.page, held_out=held_out)
        code.add(file.code, held_out=held_out)
        if held_out:
            general += filter(None, map(_what_does, file.documented_objects()))
            functions += file.function_questions()
    for group, path, module in _package_files():
        page = pages[DOCUMENTATION_DOMAINS[group]]
        progress(1)
        if page.full:
            continue
        file = PythonFile.read(path, module)
        if file is None:
            continue
        page.add(file.page, held_out=is_held_out(module))
        if is_held_out(module):
            general += filter(None, map(_what_does, file.documented_objects()))

    collected = {
        name: collector for name, collector in {**pages, **codes}.items() if collector.chars >= MIN_DOMAIN_CHARS
    }
    left_out = [name for name in {**pages, **codes} if name not in collected]
    corpus = Corpus(
        title="documentation and source code of this Python installation",
        documents={name: collector.train for name, collector in collected.items()},
        held_out={
            SOURCE: [text for name in collected if name in pages for text in pages[name].held_out],
            TARGET: [text for name in collected if name in codes for text in codes[name].held_out],
        },
        questions={},
        notes=tuple(f"domain {name} is left out: this installation has too little text for it" for name in left_out),
    )
    training = [text for texts in corpus.documents.values() for text in texts]
    fresh = set(unseen([*general, *functions], training))
    for name, candidates in ((GENERAL, general), (CODE, functions)):
        corpus.questions[name] = affordable([q for q in candidates if q in fresh], config)
    _require_enough(corpus, stdlib)
    return corpus


def _collectors(domains: Iterable[str], chars: int) -> dict[str, _Collector]:
    names = list(dict.fromkeys(domains))
    return {name: _Collector(chars // len(names)) for name in names}


def _what_does(item: DocumentedObject) -> Question | None:
    line = item.first_line
    if not 25 <= len(line) <= 160 or not line[0].isalpha() or " " not in line or not line.endswith("."):
        return None
    return Question(question=f"What does {item.heading} do?\n", answer=line, origin=item.name)


def _help_topics(stdlib: Path) -> dict[str, str]:
    path = stdlib / "pydoc_data" / "topics.py"
    return string_table(path) if path.is_file() else {}


def _stdlib_files(stdlib: Path) -> Iterator[tuple[str, Path, str]]:
    """(group, path, module) of the listed modules, in a fixed order that is unrelated to their names."""
    entries = []
    for group, names in STDLIB_GROUPS.items():
        for name in names.split():
            root = stdlib / name if (stdlib / name).is_dir() else stdlib / f"{name}.py"
            if root.exists():
                entries += [(group, path, dotted_name(path, stdlib)) for path in files_under(root)]
    return iter(sorted(entries, key=lambda entry: _number(entry[2])))


def _package_files() -> Iterator[tuple[str, Path, str]]:
    """(group, path, module) of the listed packages, one file of each package in turn: every package gets room."""
    queues: list[list[tuple[str, Path, str]]] = []
    for group, names in PACKAGE_GROUPS.items():
        for name in names.split():
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
                continue
            origin = Path(spec.origin)
            root = origin.parent if origin.name == "__init__.py" else origin
            entries = [(group, path, dotted_name(path, root.parent)) for path in files_under(root)]
            queues.append(sorted(entries, key=lambda entry: _number(entry[2])))
    for position in range(max(map(len, queues), default=0)):
        yield from (queue[position] for queue in queues if position < len(queue))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _require_enough(corpus: Corpus, stdlib: Path) -> None:
    missing = [f for f in (SOURCE, TARGET) if not any(name.startswith(f"{f}/") for name in corpus.documents)]
    few = [name for name, questions in corpus.questions.items() if len(questions) < 10]
    if missing or few:
        raise ConfigurationError(
            f"the Python installation at {stdlib} has too little text (fields without a domain: {missing or 'none'}; "
            f"question sets with fewer than 10 questions: {few or 'none'}), probably because its .py files were "
            "removed: install Python with the sources of its standard library, or pass text of your own with --data DIR"
        )

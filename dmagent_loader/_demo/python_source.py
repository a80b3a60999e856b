"""Reads Python files without importing them: documentation, code without documentation, and small functions."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dmagent_loader._demo.corpus import normalized
from dmagent_loader.environment import Question

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "testing", "__pycache__", "_vendor", "_vendored", "vendored", "externals"}
    | {"site-packages", "dist-packages", "_generated"}
)
"""Folders with tests, copies of other projects and generated code, which do not belong in the corpus."""

MAX_FILE_BYTES = 400_000
MAX_TABLE_SHARE = 0.12
"""Largest share of digits and backslashes in a text file; a file with more is a table of numbers."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, kw_only=True)
class DocumentedObject:
    """A module, class or function and its docstring."""

    name: str
    signature: str
    doc: str

    @property
    def heading(self) -> str:
        """The name with its signature: ``json.dumps(obj, *, indent=None)``."""
        return f"{self.name}{self.signature}"

    @property
    def first_line(self) -> str:
        """The first non-blank line of the docstring, with runs of white space replaced by single blanks."""
        return normalized(next((line for line in self.doc.splitlines() if line.strip()), ""))


@dataclass(frozen=True)
class PythonFile:
    """A parsed Python file."""

    module: str
    source: str
    tree: ast.Module

    @classmethod
    def read(cls, path: Path, module: str) -> PythonFile | None:
        """Parses a file; None if it is not worth training on, or written for another Python version."""
        try:
            raw = path.read_bytes()
            if not 200 <= len(raw) <= MAX_FILE_BYTES:
                return None
            source = raw.decode("utf-8")
            if _is_table(source):
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return cls(module, source, ast.parse(source))
        except (OSError, SyntaxError, ValueError, RecursionError):
            return None

    def documented_objects(self) -> Iterator[DocumentedObject]:
        """The module and its public classes, functions and methods with a docstring, in the order of the file."""
        doc = ast.get_docstring(self.tree)
        if doc:
            yield DocumentedObject(name=self.module, signature="", doc=doc)
        yield from _documented(self.tree.body, self.module)

    def page(self) -> str:
        """All documentation of the file as one text, each object under a heading with its signature."""
        return "\n\n".join(f"{item.heading}\n\n{item.doc}" for item in self.documented_objects())

    def code(self) -> str:
        """The code of the file, with every docstring cut to its first line.

        Full docstrings are documentation and belong to the source field. With them, a third of the target field would
        be text of the source field.
        """
        lines = self.source.splitlines()
        for node in (self.tree, *_definitions(self.tree.body)):
            doc = ast.get_docstring(node)
            if not doc:
                continue
            statement = node.body[0]
            first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
            indent = lines[first][: statement.col_offset]
            summary = _summary(doc)
            if first == last or indent.strip() or summary is None:
                continue
            lines[first] = f'{indent}"""{summary}"""'
            lines[first + 1 : last + 1] = [_REMOVED] * (last - first)
        return "\n".join(line for line in lines if line is not _REMOVED).strip() + "\n"

    def function_questions(self) -> Iterator[Question]:
        """Short functions as questions: signature and first line of the docstring; the answer is the body."""
        lines = self.source.splitlines()
        for node in _definitions(self.tree.body):
            if isinstance(node, ast.ClassDef) or len(node.body) < 2:
                continue
            doc = ast.get_docstring(node)
            summary = _summary(doc) if doc else None
            statement = node.body[0]
            if summary is None or lines[statement.lineno - 1][: statement.col_offset].strip():
                continue
            header = lines[node.lineno - 1 : statement.lineno - 1]
            body = lines[(statement.end_lineno or statement.lineno) : node.end_lineno]
            indent = " " * (node.col_offset + 4)
            answer = _dedented(body, node.col_offset).rstrip().lstrip("\n")
            if 40 <= len(answer) <= 320 and all(not line or line.startswith(indent) for line in map(str.rstrip, body)):
                question = f'{_dedented(header, node.col_offset)}\n    """{summary}"""\n'
                if len(question) <= 280:
                    yield Question(question=question, answer=answer, origin=f"{self.module}:{node.name}")


_REMOVED = "\0"


def files_under(root: Path) -> list[Path]:
    """The Python files of a package folder, sorted, without tests and copies of other projects; or the single file."""
    if root.is_file():
        return [root]
    files = root.rglob("*.py")
    return sorted(f for f in files if not SKIPPED_FOLDERS.intersection(f.relative_to(root.parent).parts[:-1]))


def dotted_name(path: Path, root: Path) -> str:
    """Module name of a file below the folder `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def string_table(path: Path) -> dict[str, str]:
    """The first dictionary of literal strings in a file; empty if there is none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            try:
                table = ast.literal_eval(node)
            except ValueError:
                continue
            return {key: text for key, text in table.items() if isinstance(key, str) and isinstance(text, str)}
    return {}


def _definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Classes and functions at any depth, also below ``if`` and ``try``, but not inside expressions."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        for part in ("body", "orelse", "finalbody"):
            yield from _definitions(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _definitions(handler.body)


def _documented(body: list[ast.stmt], prefix: str) -> Iterator[DocumentedObject]:
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        doc = ast.get_docstring(node)
        if doc:
            signature = "" if isinstance(node, ast.ClassDef) else f"({_short(ast.unparse(node.args))})"
            yield DocumentedObject(name=name, signature=signature, doc=doc)
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, name)


def _short(arguments: str, limit: int = 100) -> str:
    return arguments if len(arguments) <= limit else "..."


def _summary(doc: str) -> str | None:
    """The first line of a docstring, if it can stand between triple quotes unchanged."""
    line = doc.strip().splitlines()[0].strip() if doc.strip() else ""
    return None if not line or '"""' in line or "\\" in line or line.endswith('"') else line


def _dedented(lines: list[str], columns: int) -> str:
    return "\n".join(line[columns:] if not line[:columns].strip() else line for line in lines)


def _is_table(source: str) -> bool:
    dense = re.sub(r"\s", "", source)
    return len(re.findall(r"[\d\\]", dense)) > MAX_TABLE_SHARE * len(dense)

"""Code blocks of a Markdown page, and a way to run them as a reader would: in order, in one folder, in one namespace.

A comment on the line before a block says what is special about it:

- ``<!-- snippet: not run, because ... -->``: Python is compiled, shell is left alone;
- ``<!-- snippet: in tests with STEPS = 20, ROWS = 8 -->``: these assignments replace those of the block, to save time;
- ``<!-- snippet: output -->``: the block is what the one before it prints.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import REPOSITORY, environment

_BLOCK = re.compile(
    r"^(?:[ ]*<!-- snippet: (?P<note>[^\n]*?) -->\n)?"
    r"(?P<indent>[ ]*)```(?P<language>[a-z]+)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"not run, because \S.*")
_REPLACED = re.compile(r"in tests with (?P<assignments>\S.*)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path below the repository.
        line: Line of its first code line.
        language: As the fence says.
        code: Without indentation, with replaced assignments.
        is_run: Whether the page says nothing against it.
        output: What it prints, if the page says so.
    """

    page: str
    line: int
    language: str
    code: str
    is_run: bool = True
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Session:
    """Runs the blocks of a page.

    Attributes:
        folder: Working folder.
        names: Namespace of the Python blocks.
    """

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def run(self, block: Block) -> str:
        """Runs a block and returns what it prints; raises whatever it raises."""
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
                exec(compiled(block), self.names)
            return printed.getvalue()
        scripts = sysconfig.get_path("scripts")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            cwd=self.folder,
            env=environment(PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}"),
            capture_output=True,
            text=True,
            timeout=250,
        )
        if done.returncode:
            raise AssertionError(f"{block} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout


def compiled(block: Block) -> Any:
    """The code of a Python block, with line numbers of the page in tracebacks."""
    tree = ast.parse(block.code, str(REPOSITORY / block.page))
    return compile(ast.increment_lineno(tree, block.line - 1), str(REPOSITORY / block.page), "exec", dont_inherit=True)


def blocks_of(page: str, *, shortened: bool = True) -> list[Block]:
    """The Python, shell and diff blocks of a page, in order.

    Args:
        page: Path below the repository.
        shortened: Replace assignments as the page says, to save time.

    Raises:
        ValueError: A comment that means nothing, or an output without a block before it.
    """
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks: list[Block] = []
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        code, note = textwrap.dedent(found["code"]), found["note"]
        if note == "output":
            if not blocks:
                raise ValueError(f"{page}:{line} is the output of no block")
            last = blocks.pop()
            blocks.append(Block(last.page, last.line, last.language, last.code, last.is_run, code))
            continue
        replaced = _REPLACED.fullmatch(note) if note else None
        if replaced and shortened:
            for assignment in replaced["assignments"].split(", "):
                name = assignment.partition(" = ")[0]
                code, count = re.subn(rf"^{re.escape(name)} = .*$", assignment, code, flags=re.MULTILINE)
                if count != 1:
                    raise ValueError(f"{page}:{line} assigns {name} {count} times: it cannot be replaced")
        is_run = note is None or replaced is not None
        if not is_run and not _NOT_RUN.fullmatch(note):
            raise ValueError(f"{page}:{line}: unknown comment {note!r}")
        if found["language"] in ("python", "sh", "diff"):
            blocks.append(Block(page, line, found["language"], code, is_run))
    return blocks


def after_the_change(block: Block) -> str:
    """A diff block as the script is after the change."""
    kept = [line for line in block.code.splitlines() if not line.startswith("-")]
    return textwrap.dedent("\n".join(line[1:] for line in kept))


def main() -> None:
    """``python tests/docs/snippets.py PAGE FOLDER``: runs a page in full and shows what its blocks print."""
    page, folder = sys.argv[1:]
    session = Session(Path(folder).resolve())
    for block in blocks_of(page, shortened=False):
        if not block.is_run or block.language == "diff":
            print(f"--- {block}: not run")
            continue
        print(f"--- {block}")
        print(session.run(block), end="", flush=True)


if __name__ == "__main__":
    main()

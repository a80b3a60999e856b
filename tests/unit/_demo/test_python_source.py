"""Reading Python files without importing them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dmagent_loader._demo.python_source import PythonFile, dotted_name, files_under, string_table

SOURCE = '''#!/usr/bin/env python
"""Tools for sums.

A longer text about them.
"""
raise SystemExit("imported!")


class Adder:
    """Adds numbers.

    It keeps a total.
    """

    total = 0

    def add(self, number, *, twice=False):
        """Add a number to the total.

        Twice, if asked.
        """
        # Booleans are numbers, too.
        self.total += number * (2 if twice else 1)
        return self.total

    def _hidden(self):
        """Not for users."""
        return None


try:
    from fast import total
except ImportError:
    def total(numbers):
        """Return the sum of
        all numbers."""
        result = 0
        for number in numbers:
            result += number
        return result


def raw():
    r"""A backslash \\d must stay as it is.

    Second line.
    """
    return "'"
'''


@pytest.fixture
def file(tmp_path: Path) -> PythonFile:
    path = tmp_path / "sums.py"
    path.write_text(SOURCE, encoding="utf-8")
    parsed = PythonFile.read(path, "sums")
    assert parsed is not None, "a file that raises when it is imported can be read"
    return parsed


def test_pages_hold_public_objects_under_their_signatures(file: PythonFile) -> None:
    assert [item.heading for item in file.documented_objects()] == [
        "sums",
        "sums.Adder",
        "sums.Adder.add(self, number, *, twice=False)",
        "sums.raw()",
    ]
    assert "A longer text about them." in file.page()
    assert "Not for users." not in file.page()


def test_first_lines_are_without_surplus_white_space(file: PythonFile) -> None:
    assert [item.first_line for item in file.documented_objects()][:2] == ["Tools for sums.", "Adds numbers."]


def test_code_keeps_the_first_line_of_a_docstring_and_every_statement(file: PythonFile) -> None:
    """Catches a cut that takes a statement or a comment with it, or misses a function below ``try``."""
    code = file.code()
    assert '"""Add a number to the total."""' in code
    assert "Twice, if asked" not in code
    assert "A longer text" not in code
    assert '        """Return the sum of"""\n        result = 0' in code
    assert "# Booleans are numbers, too." in code
    assert _without_docstrings(code) == _without_docstrings(SOURCE)


def test_a_docstring_that_cannot_be_shortened_safely_stays(file: PythonFile) -> None:
    assert 'r"""A backslash \\d must stay as it is.\n\n    Second line.' in file.code()


def test_function_questions_are_signature_and_first_line_then_body(file: PythonFile) -> None:
    asked = {q.origin: q for q in file.function_questions()}
    assert set(asked) == {"sums:add", "sums:total"}, "too short a body, and no usable first line, are not asked"
    add = asked["sums:add"]
    assert add.question == 'def add(self, number, *, twice=False):\n    """Add a number to the total."""\n'
    assert add.answer.startswith("    # Booleans are numbers, too.\n    self.total +=")
    assert ast.parse(add.question + add.answer)


@pytest.mark.parametrize(
    "content",
    [b"def broken(:\n" * 40, b"\xff\xfe" * 200, b"x = 1\n", ("table = [" + "1, 2, 3, " * 200 + "]").encode()],
    ids=["syntax", "not UTF-8", "nearly empty", "table of numbers"],
)
def test_files_that_are_no_text_to_train_on_are_left_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.py"
    path.write_bytes(content)
    assert PythonFile.read(path, "bad") is None


def test_a_missing_file_is_left_out(tmp_path: Path) -> None:
    assert PythonFile.read(tmp_path / "gone.py", "gone") is None


def test_tests_and_copies_of_other_projects_are_skipped(tmp_path: Path) -> None:
    for name in ("pkg/__init__.py", "pkg/b.py", "pkg/a/c.py", "pkg/tests/d.py", "pkg/_vendor/six.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = files_under(tmp_path / "pkg")
    assert [dotted_name(path, tmp_path) for path in found] == ["pkg", "pkg.a.c", "pkg.b"]


def test_a_table_of_texts_is_read_without_running_the_file(tmp_path: Path) -> None:
    path = tmp_path / "topics.py"
    path.write_text("raise SystemExit\ntopics = {'if': 'The if statement', 'n': 3}\n", encoding="utf-8")
    assert string_table(path) == {"if": "The if statement"}


def _without_docstrings(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)

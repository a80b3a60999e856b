"""The tree of errors is the one that is written down, and a missing extra is named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dmagent_loader import errors
from dmagent_loader.errors import DMAgentError, MissingExtraError, require_extra

CLASSES = {name: its for name, its in vars(errors).items() if isinstance(its, type) and issubclass(its, Exception)}
LINE = re.compile(r"^(?P<branch>[ │├└─]*)(?P<name>\w+Error)(?: \((?P<builtin>\w+)\))?", re.MULTILINE)


def test_the_tree_in_the_docstring_is_that_of_the_classes():
    written = LINE.findall(errors.__doc__)
    assert [name for _, name, _ in written] == list(CLASSES)
    above: dict[int, str] = {}
    for branch, name, builtin in written:
        depth = len(branch)
        above[depth] = name
        parent = max((at for at in above if at < depth), default=None)
        expected = "Exception" if parent is None else above[parent]
        assert CLASSES[name].__bases__[0].__name__ == expected, name
        if builtin:
            assert builtin in {base.__name__ for base in CLASSES[name].__mro__}, name


def test_one_except_clause_catches_every_error():
    assert all(issubclass(its, DMAgentError) for its in CLASSES.values())


def test_an_extra_that_is_installed_is_imported():
    assert require_extra("json", "hf") is sys.modules["json"]


def test_a_missing_extra_is_named_with_the_command_that_installs_it():
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'dmagent-loader[hf]'")) as error:
        require_extra("no_such_package.part", "hf")
    assert isinstance(error.value, ImportError)


def test_a_package_that_is_there_but_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches advice to install what is installed, where one of its own requirements is missing."""
    (tmp_path / "installed_package.py").write_text("import no_such_requirement")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_requirement") as error:
        require_extra("installed_package", "hf")
    assert not isinstance(error.value, MissingExtraError)

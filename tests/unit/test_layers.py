"""Imports follow the rooms of the package, and there are no circles."""

from __future__ import annotations

import ast
import configparser
import graphlib
from pathlib import Path

import pytest

import dmagent_loader

PACKAGE = Path(dmagent_loader.__file__).parent
ROOT = PACKAGE.parent

GROUND = {"errors", "_compiled", "_files", "_tasks", "_validation", "_version"}
CORE = GROUND | {"mixture"}
READING = CORE | {"_distributed", "shards", "_loading"}
DECIDING = CORE | {"_distributed", "agent", "labelling", "policies"}
PUBLIC = GROUND | {"_distributed", "sampler", "data_loader", "environment", "policies", "transforms"}
ALL = READING | DECIDING | PUBLIC | {"_run", "integrations", "training", "_report", "_demo", "__init__"}
ROOMS = {
    **dict.fromkeys(GROUND, GROUND),
    "mixture": GROUND,
    "shards": GROUND,
    "_distributed": GROUND,
    "_loading": READING,
    "agent": CORE,
    "labelling": CORE | {"shards"},
    "policies": CORE | {"agent", "labelling"},
    "_run": READING | DECIDING,
    "sampler": READING | DECIDING | {"_run"},
    "data_loader": GROUND | {"_loading", "sampler", "transforms"},
    "environment": CORE | {"_distributed"},
    "transforms": GROUND | {"_loading", "shards"},
    "testing": GROUND | {"sampler", "shards"},
    "integrations": PUBLIC,
    "training": DECIDING | {"environment"},
    "_report": CORE | {"policies", "_run"},
    "_demo": ALL - {"training"},
    "cli": ALL,
    "__main__": {"cli"},
    "__init__": {
        "_version",
        "_run",
        "sampler",
        "data_loader",
        "agent",
        "environment",
        "integrations",
        "mixture",
        "policies",
    },
}
"""What each room may import besides itself. Imports for type checkers and inside functions count."""
NO_TORCH = {"errors", "_compiled", "_files", "_tasks", "_validation", "_version", "mixture", "shards"}


def imported(file: Path) -> set[str]:
    """Absolute names of all that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} uses a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(file): file for file in sorted(PACKAGE.rglob("*.py"))}
GRAPH = {
    name: {
        max((m for m in FILES if f"{used}.".startswith(f"{m}.")), key=len)
        for used in imported(file)
        if used.startswith("dmagent_loader.")
    }
    for name, file in FILES.items()
}


def room(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def test_imports_follow_the_rooms():
    wrong = {
        f"{name} imports {used}"
        for name, uses in GRAPH.items()
        for used in uses
        if room(used) not in ROOMS[room(name)] | {room(name)}
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_there_are_no_circles():
    graphlib.TopologicalSorter({name: uses - {name} for name, uses in GRAPH.items()}).prepare()


def test_core_and_shards_do_without_torch():
    for name, file in FILES.items():
        if room(name) in NO_TORCH:
            assert "torch" not in {used.split(".")[0] for used in imported(file)}, name


def test_the_public_names_are_those_that_are_promised():
    assert sorted(dmagent_loader.__all__) == dir(dmagent_loader)
    for name in dmagent_loader.__all__:
        assert getattr(dmagent_loader, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = dmagent_loader.Nonsense


def test_setup_names_every_package():
    """With a list that is kept by hand, a forgotten package is missing from the wheel only."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    folders = {file.parent for file in PACKAGE.rglob("__init__.py")}
    # To setuptools, a folder of data that could be imported is a package: it warns of one that is not listed.
    checkpoints = ROOT / "agent_checkpoints"
    of_data = {checkpoints, *(path for path in checkpoints.iterdir() if path.is_dir() and path.name.isidentifier())}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == packages | {".".join(("dmagent_loader", *path.relative_to(ROOT).parts)) for path in of_data}

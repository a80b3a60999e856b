"""Public names, the reference, and each public module's ``__all__`` agree."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs.snippets import after_the_change, blocks_of
from launching import REPOSITORY

import dmagent_loader
from dmagent_loader import integrations, testing

PACKAGE = Path(dmagent_loader.__file__).parent
REFERENCE = REPOSITORY / "docs" / "reference"
TOP_LEVEL = {
    "AgentWeightedSampler",
    "DecisionConfig",
    "DomainSpace",
    "Environment",
    "GuardConfig",
    "Mixing",
    "MixingAgent",
    "MixingDataLoader",
    "PackText",
    "ReadingConfig",
    "load_state",
    "save_state",
    "__version__",
}
NEEDS_OTHER_ENVIRONMENT = {"dmagent_loader.integrations.nemo", "dmagent_loader.integrations.megatron_lm"}


def public_modules() -> list[str]:
    """The package, its modules without underscore, those of the integrations and of testing, and tasks."""
    found = ["dmagent_loader", "dmagent_loader.training.tasks", "dmagent_loader.training.tasks.environment"]
    for package in (dmagent_loader, integrations, testing):
        names = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
        found += [f"{package.__name__}.{name}" for name in names]
    return [name for name in found if name not in ("dmagent_loader.agent_checkpoints", "dmagent_loader.integrations")]


def exported(module: str) -> list[str]:
    """``__all__`` as it stands in the file, so that no trainer has to be installed."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} is public and has no __all__")


def entries() -> Iterator[str]:
    for page in sorted(REFERENCE.glob("*.md")):
        yield from re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def identity(name: str) -> object:
    """The object that a dotted name stands for, or the name itself where its module cannot be imported here."""
    module, _, attribute = name.rpartition(".")
    if module in NEEDS_OTHER_ENVIRONMENT or not importlib.util.find_spec(module):
        return name
    value = getattr(importlib.import_module(module), attribute)
    return id(value) if not isinstance(value, (str, int)) else name


def test_top_level_names() -> None:
    assert set(dmagent_loader.__all__) == TOP_LEVEL
    assert set(dir(dmagent_loader)) == TOP_LEVEL
    assert all(getattr(dmagent_loader, name) is not None for name in TOP_LEVEL)


def test_the_reference_lists_the_top_level_names() -> None:
    text = (REFERENCE / "index.md").read_text(encoding="utf-8")
    table = text[text.index("## Top-level names") : text.index("## Modules")]
    assert set(re.findall(r"`(\w+)`", table)) >= TOP_LEVEL


@pytest.mark.parametrize("module", public_modules())
def test_every_name_of_a_module_exists_and_has_an_entry(module: str) -> None:
    documented = {identity(entry) for entry in entries()}
    for name in exported(module):
        if module not in NEEDS_OTHER_ENVIRONMENT:
            assert hasattr(importlib.import_module(module), name)
        if name != "__version__":
            assert identity(f"{module}.{name}") in documented, f"{module}.{name} has no entry in docs/reference"


def test_every_entry_is_public() -> None:
    public = {identity(f"{module}.{name}") for module in public_modules() for name in exported(module)}
    listed = list(entries())
    assert len(set(listed)) == len(listed)
    assert [entry for entry in listed if identity(entry) not in public] == []


def code_for_users() -> Iterator[tuple[str, str]]:
    for script in sorted((REPOSITORY / "examples").glob("*.py")):
        yield script.name, script.read_text(encoding="utf-8")
    for page in ["README.md", *(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))]:
        for block in blocks_of(page):
            if block.language == "python":
                yield str(block), block.code
            elif block.language == "diff":
                yield str(block), after_the_change(block)


@pytest.mark.parametrize(("place", "code"), [pytest.param(*found, id=found[0]) for found in code_for_users()])
def test_code_for_users_imports_public_names_only(place: str, code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmagent_loader":
            assert {alias.name for alias in node.names} <= set(exported(node.module)), f"{place}: {node.module}"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dmagent_loader.") for alias in node.names), place


def test_modules_of_the_reference_exist() -> None:
    text = (REFERENCE / "index.md").read_text(encoding="utf-8")
    for module in re.findall(r"`(dmagent_loader\.\w+)`", text):
        assert importlib.util.find_spec(module), module

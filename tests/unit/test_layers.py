"""Imports follow the layers, and the package stays light to import."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import dmagent_loader

PACKAGE = Path(dmagent_loader.__file__).parent
ROOT = PACKAGE.parent

# Each part may import from the parts named beside it, and from itself.
BASE = {"errors", "files", "untrusted", "_version"}
CORE = BASE | {"simplex", "domains", "history", "hashing", "order", "shuffle", "ledger", "plan", "layout"}
DATA = CORE | {"distributed", "shards", "agent", "policies"}
SAMPLER = {"agreement", "progress", "stream", "state", "decisions", "opening", "sampler"}
RUN = DATA | SAMPLER | {"lazy", "mailbox", "environment", "transforms"}
ALLOWED = {
    **dict.fromkeys(CORE, CORE),
    "distributed": CORE,
    "shards": CORE,
    "agent": CORE | {"agent"},
    "policies": CORE | {"agent"},
    "mailbox": CORE,
    **dict.fromkeys(SAMPLER, RUN - {"environment", "transforms"}),
    "environment": CORE | {"distributed"},
    "lazy": CORE | {"shards"},
    "transforms": CORE | {"lazy"},
    "testing": RUN,
    "integrations": RUN,
    "pipeline": RUN,
    "report": CORE,
    "demo": RUN | {"integrations", "report"},
    "cli": RUN | {"integrations", "pipeline", "report", "demo"},
    "__init__": RUN,
}
NUMPY_ONLY = CORE
HEAVY = ["transformers", "accelerate", "nemo", "megatron", "lightning", "d3rlpy", "gymnasium", "datasets", "matplotlib"]


def parts() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in files]


def imported(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, those under TYPE_CHECKING left out."""
    names: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} uses a relative import"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(("part", "file"), parts(), ids=lambda value: str(value)[-40:])
def test_imports_follow_the_layers(part, file):
    own = {name.split(".")[1] for name in imported(file) if name.startswith("dmagent_loader.")}
    own = {name for name in own if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}
    assert own <= ALLOWED[part] | {part}, f"{part} must not import {sorted(own - ALLOWED[part])}"
    if part in NUMPY_ONLY:
        assert not {"torch", "fsspec", "webdataset"} & {name.split(".")[0] for name in imported(file)}


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, dmagent_loader;"
        "dmagent_loader.AgentWeightedSampler, dmagent_loader.MixingAgent, dmagent_loader.Environment;"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    listed = set(setup["options"]["packages"].split()) - {"dmagent_loader.agent_checkpoints"}
    folders = {file.parent for file in PACKAGE.rglob("__init__.py")}
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


@pytest.mark.parametrize(
    ("package", "integration", "extra"),
    [("transformers", "huggingface", "hf"), ("lightning", "lightning", "lightning")],
)
def test_a_missing_extra_is_named(package, integration, extra):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        f"try:\n    import dmagent_loader.integrations.{integration}\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MissingExtraError" in done.stdout
    assert f"dmagent-loader[{extra}]" in done.stdout

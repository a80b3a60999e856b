"""The programs start, and the pages name no other ones."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from launching import REPOSITORY

import benchmarks.agent

PROGRAMS = sorted(
    path.stem for path in (REPOSITORY / "benchmarks" / "agent").glob("*.py") if "def main()" in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prints_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches imports of names that have moved, which nothing else runs."""
    monkeypatch.delitem(sys.modules, f"benchmarks.agent.{name}", raising=False)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.agent.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert f"python -m benchmarks.agent.{name}" in capsys.readouterr().out


def test_every_program_that_is_named_exists() -> None:
    """In the package of the programs, the documentation and the cards."""
    files = [
        path
        for pattern in ("docs/**/*.md", "*.md", "agent_checkpoints/**/*.md", "training_record/**/*.md")
        for path in REPOSITORY.glob(pattern)
    ]
    named = {name for path in files for name in re.findall(r"benchmarks\.agent\.(\w+)", path.read_text("utf-8"))}
    assert named
    assert named <= set(PROGRAMS)
    assert re.findall(r"\w+", str(benchmarks.agent.__doc__).split("``:")[1]) == PROGRAMS

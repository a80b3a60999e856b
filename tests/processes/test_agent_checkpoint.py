"""Agents load in a fresh process: bundled ones from a wheel or a checkout, and without the optional packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dmagent_loader.agent
from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.mixture.history import FeedbackStatistics


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=1000)
    MixingAgent(AgentConfig(d_model=16, num_heads=2, d_ff=32, statistics=statistics)).save_pretrained(
        tmp_path / "seven"
    )
    return tmp_path / "seven"


def _not_python(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir()}


def run_python(code: str, *args: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("layout", ["installed", "checkout"])
def test_bundled_names_load_and_win_over_folders_of_that_name(saved: Path, tmp_path: Path, layout: str) -> None:
    """On a copy of the package: checkpoints inside it, as in a wheel, or beside it, as in the repository."""
    root = tmp_path / "root"
    shutil.copytree(Path(dmagent_loader.agent.__file__).parents[1], root / "dmagent_loader", ignore=_not_python)
    inside = root / "dmagent_loader" if layout == "installed" else root
    shutil.copytree(saved, inside / "agent_checkpoints" / "dmagent-eight")
    shutil.copytree(saved, root / "agent_checkpoints" / "beside")
    if layout == "checkout":
        (root / "setup.cfg").write_text("")
    (tmp_path / "dmagent-eight").mkdir()
    code = (
        "from dmagent_loader.agent import MixingAgent, list_bundled\n"
        "print(sorted(list_bundled()), MixingAgent.from_pretrained('dmagent-eight').name)\n"
        "MixingAgent.from_pretrained('./dmagent-eight')"
    )
    result = run_python(code, cwd=tmp_path, PYTHONPATH=str(root))
    names = ["dmagent-eight"] if layout == "installed" else ["beside", "dmagent-eight"]
    assert result.stdout == f"{names} dmagent-eight\n", result.stderr
    assert "dmagent-eight is not an agent checkpoint: it has no config.json" in result.stderr


def test_the_hub_without_a_network_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = "import sys; from dmagent_loader.agent import MixingAgent; MixingAgent.from_pretrained('nobody/nothing')"
    result = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "CheckpointError: agent 'nobody/nothing' is not a local directory and cannot be fetched" in result.stderr


def test_the_hub_without_its_client_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from dmagent_loader.agent import MixingAgent; MixingAgent.from_pretrained('nobody/nothing')"
    )
    result = run_python(code)
    assert "MissingExtraError" in result.stderr
    assert "dmagent-loader[hf]" in result.stderr


def test_the_agent_loads_without_transformers_or_the_hub_client(saved: Path) -> None:
    code = (
        "import sys; from dmagent_loader.agent import MixingAgent; MixingAgent.from_pretrained(sys.argv[1])\n"
        "sys.exit(bool({'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = run_python(code, str(saved))
    assert result.returncode == 0, result.stderr

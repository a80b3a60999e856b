"""What is held out of the corpus of a Python installation, and an installation that has no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmagent_loader._demo import python_corpus
from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.python_corpus import build_python_corpus, is_held_out
from dmagent_loader.errors import ConfigurationError

SMALL = DemoConfig(source_chars=600_000, target_chars=300_000, questions=60)


def test_about_one_module_in_eight_is_held_out() -> None:
    held_out = sum(is_held_out(f"package.module_{i}") for i in range(4000))
    assert held_out == pytest.approx(500, rel=0.15)


def test_an_installation_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(python_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(python_corpus, "PACKAGE_GROUPS", {})
    with pytest.raises(ConfigurationError, match=r"too little text .* pass text of your own with --data"):
        build_python_corpus(SMALL)

"""The site is built without a warning, and its pages need nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, environment

LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?([^\"' >]+)")

pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env=environment(NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Fonts, scripts, styles and pictures; links that a reader clicks may lead away."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?([^\"' >]+)", page.read_text()
        )
        assert [link for link in loaded if re.match(r"(?:https?:)?//", link)] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text()), style.name


def test_the_reference_has_the_docstrings(site: Path) -> None:
    page = (site / "reference" / "sampler.html").read_text()
    assert 'id="dmagent_loader.AgentWeightedSampler.set_mix"' in page
    assert "Seed of the sample order" in page
    assert "&gt;&gt;&gt;" in page


def test_pages_from_outside_docs_are_there(site: Path) -> None:
    assert "dmagent-loader" in (site / "index.html").read_text()
    assert "Changelog" in (site / "changelog.html").read_text()
    assert "argparse" in (site / "examples" / "plain_loop.html").read_text()
    assert "--sequence-length" in (site / "reference" / "cli.html").read_text()

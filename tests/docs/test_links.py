"""Links of the documentation lead somewhere, and files, tests and programs that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import REPOSITORY
from markdown.extensions.toc import slugify

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/fuzz/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "agent_checkpoints").rglob("README.md")),
    *sorted((REPOSITORY / "training_record").rglob("README.md")),
]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
_FENCE = re.compile(r"^[ ]*```.*?^[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')
_PATH = re.compile(
    r"(?<![\w./-])(?:tests|benchmarks|examples|dmagent_loader|docs|agent_checkpoints|training_record)/[\w./-]*[\w/]"
)
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
_MODULE = re.compile(r"python -m (benchmarks(?:\.\w+)+)")
_DOTTED = re.compile(r"`(dmagent_loader(?:\.\w+)+)`")


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site both give the headings of a page."""
    titles = re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE)
    return {slugify(re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title), "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for found in _LINK.finditer(prose(page)):
        link = found[1] or found[2]
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(REPOSITORY), link
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_exist(page: Path) -> None:
    """Catches a page that stays behind when a file moves."""
    text = page.read_text(encoding="utf-8")
    if page.name == "benchmarks.md":
        text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)  # profiles name files as they were
    for path in _PATH.findall(text):
        if "NAME" not in path and path != "docs/" and not path.startswith("docs/build"):
            assert (REPOSITORY / path).exists(), f"{page.name} names {path}"
    for module in _MODULE.findall(text):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name} names {module}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_modules_named_in_prose_are_public(page: Path) -> None:
    for name in _DOTTED.findall(prose(page)):
        assert not re.search(r"\._", name), f"{page.name} names {name}, which is private"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_tests_that_are_named_exist(page: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in _TEST.findall(prose(page))
        if not re.search(rf"^def {name}\(", (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not missing

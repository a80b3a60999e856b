"""The code on the pages runs as it stands there, in the order of the page, and prints what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from docs.snippets import Block, Session, after_the_change, blocks_of, compiled
from launching import REPOSITORY

PAGES = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES = ["README.md", *PAGES]
BLOCKS = {page: blocks_of(page) for page in PAGES}
ALL_BLOCKS = [block for blocks in BLOCKS.values() for block in blocks]
RUN = [page for page, blocks in BLOCKS.items() if any(block.is_run and block.language != "diff" for block in blocks)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a reader's process has: no accelerator of another page, and here an index cache of its own."""
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    session = Session(tmp_path)
    for block in BLOCKS[page]:
        if block.is_run and block.language != "diff":
            printed = session.run(block)
            assert block.output is None or printed == block.output, f"{block} prints something else"


@pytest.mark.parametrize(
    "block", [block for block in ALL_BLOCKS if not block.is_run or block.language == "diff"], ids=str
)
def test_code_that_is_not_run_is_valid(block: Block) -> None:
    if block.language == "python":
        compiled(block)
    elif block.language == "diff":
        compile(after_the_change(block), str(block), "exec")


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/tutorial.md", "docs/trainers/plain-loop.md"])
def test_main_pages_have_code_that_runs(page: str) -> None:
    """Catches a change of the fences after which nothing is found."""
    assert page in RUN


def test_the_example_of_the_readme_is_short() -> None:
    """Twenty lines, and nothing undefined: it is the only Python of the page."""
    blocks = [block for block in BLOCKS["README.md"] if block.language == "python"]
    assert len(blocks) == 1
    assert len(blocks[0].code.splitlines()) <= 20

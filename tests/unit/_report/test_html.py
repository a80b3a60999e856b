"""Pages that stand alone."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

from dmagent_loader._report import html
from dmagent_loader._report.tables import Table

PNG = b"\x89PNG\r\n\x1a\n and some bytes \x00\xff"


class _Balance(HTMLParser):
    """Collects tags that are opened and not closed."""

    void = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page() -> str:
    return html.page(
        "A <title>",
        [
            html.table_section("Table", Table(columns=("a", "b"), rows=[("x", "1")]), notes=["a < b"]),
            html.picture_section("Chart", PNG, description='with "quotes"'),
            html.notes_section("Notes", ["one", "two"]),
        ],
        summary="5 > 4",
    )


def test_every_tag_is_closed() -> None:
    parser = _Balance()
    parser.feed(_page())
    assert parser.open == []


def test_nothing_is_loaded_from_outside() -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', _page())
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in _page()


def test_the_picture_is_inside_byte_for_byte() -> None:
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', _page())
    assert [base64.b64decode(text) for text in data] == [PNG]


def test_texts_are_escaped() -> None:
    page = _page()
    assert "A &lt;title&gt;" in page
    assert "5 &gt; 4" in page
    assert "a &lt; b" in page
    assert "with &quot;quotes&quot;" in page

"""Self-contained HTML pages: one file, without scripts or external resources."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from dmagent_loader._demo.tables import Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 50rem; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; font-weight: normal; }
thead th { color: #555; border-bottom: 1px solid #888; vertical-align: bottom; }
thead .group { border-bottom: none; text-align: center; }
tbody th, thead th:first-child { text-align: left; } tbody tr:hover { background: #f4f4f4; }
.text th, .text td { text-align: left; }
"""


def page(title: str, sections: Iterable[str], *, summary: str = "") -> str:
    """A whole page.

    Args:
        title: Heading, plain text.
        sections: HTML of each section, made by the functions below.
        summary: One plain sentence below the heading.
    """
    head = f"<h1>{html.escape(title)}</h1>\n" + (f"<p>{html.escape(summary)}</p>\n" if summary else "")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{head}{''.join(sections)}</body>\n</html>\n"
    )


def table_section(heading: str, table: Table, *, notes: Sequence[str] = ()) -> str:
    """A table under a heading, with plain-text notes below."""
    return f'<h2>{html.escape(heading)}</h2>\n<div class="wide">{table.to_html()}</div>\n{_list(notes)}'


def picture_section(heading: str, png: bytes, *, description: str) -> str:
    """A PNG embedded in the page; screen readers read `description`."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<h2>{html.escape(heading)}</h2>\n"
        f'<img alt="{html.escape(description, quote=True)}" src="data:image/png;base64,{data}">\n'
    )


def notes_section(heading: str, notes: Sequence[str]) -> str:
    """Plain-text notes under a heading."""
    return f"<h2>{html.escape(heading)}</h2>\n{_list(notes)}"


def _list(notes: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{html.escape(note)}</li>\n" for note in notes) + "</ul>\n" if notes else ""

"""Self-contained HTML pages: one file, without scripts or external resources."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from dmagent_loader._report.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 50rem; overflow-wrap: anywhere; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } .pictures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); align-items: start; }
summary { cursor: pointer; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid #ddd; font-weight: normal; }
thead th { color: #555; border-bottom: 1px solid #888; vertical-align: bottom; }
thead .group { border-bottom: none; text-align: center; }
tbody th, thead th:first-child { text-align: left; } tbody tr:hover { background: #f4f4f4; }
.text th, .text td { text-align: left; } .text td, .long { overflow-wrap: anywhere; }
tbody th { white-space: nowrap; } thead th { white-space: pre; } .text td { white-space: normal; }
td { white-space: pre; } td.long, th.long { text-align: left; white-space: normal; min-width: 13rem; }
@media (max-width: 40rem) { body { margin: 1rem auto; } table { font-size: .9rem; }
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 10rem; }
  th, td { padding: .3rem .5rem; } ul { padding-left: 1.2rem; } }
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


def table_section(
    heading: str, table: Table, *, notes: Sequence[str] = (), folded: Table | None = None, folded_heading: str = ""
) -> str:
    """A table under a heading, with plain-text notes below.

    Args:
        heading: Heading of the section.
        table: The table.
        notes: Plain text below the table.
        folded: Longer table that readers open by a click on `folded_heading`.
        folded_heading: Line shown in its place.
    """
    more = (
        f'<details>\n<summary>{html.escape(folded_heading)}</summary>\n<div class="wide">{folded.to_html()}</div>\n'
        "</details>\n"
        if folded is not None
        else ""
    )
    return f'<h2>{html.escape(heading)}</h2>\n<div class="wide">{table.to_html()}</div>\n{_list(notes)}{more}'


def picture_section(heading: str, png: bytes, *, description: str) -> str:
    """A PNG embedded in the page; screen readers read `description`."""
    return f"<h2>{html.escape(heading)}</h2>\n{_image(png, description)}"


def pictures_section(heading: str, pictures: Sequence[tuple[bytes, str]]) -> str:
    """Small pictures, each with its description: side by side on a wide screen, below each other on a narrow one."""
    images = "".join(_image(png, description) for png, description in pictures)
    return f'<h2>{html.escape(heading)}</h2>\n<div class="pictures">\n{images}</div>\n'


def notes_section(heading: str, notes: Sequence[str]) -> str:
    """Plain-text notes under a heading."""
    return f"<h2>{html.escape(heading)}</h2>\n{_list(notes)}"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(description, quote=True)}" src="data:image/png;base64,{data}">\n'


def _list(notes: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{html.escape(note)}</li>\n" for note in notes) + "</ul>\n" if notes else ""

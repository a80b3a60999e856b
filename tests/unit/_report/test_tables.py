"""Tables as text and as HTML."""

from __future__ import annotations

import pytest

from dmagent_loader._report.tables import Table
from dmagent_loader.errors import ConfigurationError

SCORES = Table(
    columns=("model", "general", "code", "source", "target"),
    rows=[("base model", "-5.034", "-5.296", "819,200", "0"), ("agent", "-4.9", "-4.25", "1", "143,360")],
    groups=(("", 1), ("feedback", 2), ("tokens used", 2)),
)


def test_numbers_end_in_one_column_and_names_begin_in_one() -> None:
    lines = SCORES.to_text().splitlines()
    assert {len(line) for line in lines[1:]} == {len(lines[1])}
    assert lines[3].startswith("base model  ")
    assert lines[4].startswith("agent       ")


def test_group_headings_end_where_their_columns_end() -> None:
    above, heads = SCORES.to_text().splitlines()[:2]
    assert above.index("feedback") + len("feedback") == heads.index("code") + len("code")
    assert len(above) == len(heads)


def test_a_group_heading_wider_than_its_columns_widens_them() -> None:
    """Catches a heading that runs into the next group's."""
    table = Table(columns=("m", "a", "b"), rows=[("x", "1", "2")], groups=(("", 1), ("very long heading", 1), ("b", 1)))
    above, heads = table.to_text().splitlines()[:2]
    assert above.index("very long heading") + len("very long heading") == heads.index("a") + 1


def test_cells_are_escaped_in_html() -> None:
    page = Table(columns=("<a>", "b"), rows=[("x & y", "<script>")]).to_html()
    assert "&lt;script&gt;" in page
    assert "x &amp; y" in page
    assert "<script>" not in page


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has 1 cells, but there are 2 columns"):
        Table(columns=("a", "b"), rows=[("only",)])


def test_groups_that_do_not_cover_the_columns_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="do not cover the 2 columns"):
        Table(columns=("a", "b"), rows=[], groups=(("x", 1),))

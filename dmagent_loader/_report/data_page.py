"""The page about data: a treemap of topics, and a table of domains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmagent_loader._report import html
from dmagent_loader._report.charts import TEXT, new_figure, png_bytes
from dmagent_loader._report.tables import Table
from dmagent_loader._report.treemap import Box, squarified
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, FIELDS
from dmagent_loader.mixture.simplex import FloatArray

Color = tuple[float, float, float]

_COLORS = {"source": ("#0b3c6f", "#c3dcf2"), "target": ("#7a2e00", "#fdd3a6")}
_OTHER_COLORS = ("#00513d", "#b5e3d3")
_NAMED_TOPICS, _LEAST_SHARE, _NAMED_VALUES = 3, 0.01, 3
_UNKNOWN = (0.9, 0.9, 0.9)
_LUMINANCE, _DARK = (0.299, 0.587, 0.114), 0.55
_LARGEST_POINTS, _SMALLEST_POINTS = 11.0, 5.0
_POINTS, _FILLED = 72, 0.9
"""Points per inch; part of a tile that text may fill."""
_LETTER_WIDTH, _LINE_HEIGHT = 0.6, 1.3
"""Of a letter and of a line, in font sizes."""
_WIDTH, _HEIGHT, _DOTS_PER_INCH = 10.0, 5.2, 150


@dataclass(frozen=True, kw_only=True)
class DomainFacts:
    """What the page says about one domain.

    Attributes:
        name: Name of the domain.
        field: Its field.
        rows, shards, bytes: Numbers of rows, of files and of their bytes.
        tokens: Number of tokens, of packed rows; None: rows of text.
        sampled: Number of rows in the sample.
        lengths: 10th, 50th and 90th percentile of the characters of a row.
        topics: (26,) documents of each topic in the sample.
        unsure: Documents of the sample without a topic.
        repeated: Documents of the sample with the text of an earlier one.
        quality: Label of quality -> documents of the sample; empty: it is not known.
        sources: Source -> documents of the sample; empty: it is not known.
    """

    name: str
    field: str
    rows: int
    shards: int
    bytes: int
    tokens: int | None
    sampled: int
    lengths: tuple[int, int, int]
    topics: FloatArray
    unsure: int
    repeated: int
    quality: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def shares(self) -> FloatArray:
        """(26,) shares of the documents with a topic; zeros if there are none."""
        total = self.topics.sum()
        return self.topics / total if total else self.topics

    @property
    def known(self) -> float:
        """Part of the sample with a topic."""
        return 1 - self.unsure / max(1, self.sampled)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The page, and its treemap as a PNG."""

    page: str
    picture: bytes
    table: Table


def write_data_page(facts: Sequence[DomainFacts], *, title: str, classifier: str) -> DataReport:
    """The page about some domains.

    Args:
        facts: The domains, in order.
        title: Heading.
        classifier: Name of the classifier of the topics.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = png_bytes(_treemap(facts), dots_per_inch=_DOTS_PER_INCH)
    table = domain_table(facts)
    rows = sum(domain.rows for domain in facts)
    least, most = min(d.sampled for d in facts), max(d.sampled for d in facts)
    notes = [
        f"All from the lengths on is that of random samples of {f'{least:,} to ' * (least < most)}{most:,} rows; "
        f"topics by {classifier}.",
        "Repeats are rows with the words of an earlier row of the sample. The domain has more: a sample holds both "
        "copies only by chance (dmagent filter finds all).",
    ]
    sections = [
        html.picture_section("Topics", picture, description="Treemap of the topics of each field, by number of rows."),
        html.table_section("Domains", table, notes=notes),
        *(html.table_section(f"Topics of the {field} field", _topic_table(facts, field)) for field in _fields(facts)),
    ]
    plural = "s" * (len(facts) != 1)
    return DataReport(
        page=html.page(title, sections, summary=f"{rows:,} rows in {len(facts):,} domain{plural}."),
        picture=picture,
        table=table,
    )


def domain_table(facts: Sequence[DomainFacts]) -> Table:
    """One line for each domain."""
    packed = any(domain.tokens is not None for domain in facts)
    known: dict[str, Callable[[DomainFacts], Mapping[str, int]]] = {
        "quality": lambda domain: domain.quality,
        "main sources": lambda domain: domain.sources,
    }
    texts = {name: values for name, values in known.items() if any(map(values, facts))}
    rows = []
    for domain in facts:
        most = [i for i in np.argsort(-domain.shares)[:_NAMED_TOPICS] if domain.shares[i] >= _LEAST_SHARE]
        tokens = ("" if domain.tokens is None else f"{domain.tokens / 1e6:,.3f}",) if packed else ()
        rows.append(
            (
                domain.name,
                f"{domain.rows:,}",
                f"{domain.shards:,}",
                f"{domain.bytes / 1e6:,.2f}",
                *tokens,
                " / ".join(f"{length:,}" for length in domain.lengths),
                f"{domain.repeated / max(1, domain.sampled):.1%}",
                f"{domain.known:.0%}",
                ", ".join(f"{_pretty(CANONICAL_TOPICS[i])} {domain.shares[i]:.0%}" for i in most),
                *(_largest(values(domain)) for values in texts.values()),
            )
        )
    columns = ["domain", "rows", "shards", "MB", *(["M tokens"] if packed else [])]
    columns += ["characters\n10 / 50 / 90%", "repeated", "with a\ntopic", "main topics", *texts]
    return Table(columns=columns, rows=rows, num_texts=1 + len(texts))


def _largest(counts: Mapping[str, int]) -> str:
    """The most frequent values with their shares."""
    total = max(1, sum(counts.values()))
    most = sorted(counts, key=lambda value: (-counts[value], value))[:_NAMED_VALUES]
    others = len(counts) - len(most)
    shares = [f"{value} {counts[value] / total:.0%}" for value in most]
    return ", ".join([*shares, f"{others:,} more"] if others else shares)


def _fields(facts: Sequence[DomainFacts]) -> list[str]:
    present = dict.fromkeys(domain.field for domain in facts)
    return [*(field for field in FIELDS if field in present), *(field for field in present if field not in FIELDS)]


def _field_topics(facts: Sequence[DomainFacts], field: str) -> tuple[FloatArray, float]:
    """Rows of each topic of a field, (26,), and its rows without a topic; domains count by their rows."""
    members = [domain for domain in facts if domain.field == field]
    known = sum((domain.rows * domain.known * domain.shares for domain in members), np.zeros(len(CANONICAL_TOPICS)))
    return known, max(0.0, _rows(facts, field) - known.sum())  # rounding can make it negative


def _topic_table(facts: Sequence[DomainFacts], field: str) -> Table:
    known, unsure = _field_topics(facts, field)
    total = max(1.0, known.sum() + unsure)
    rows = [(_pretty(CANONICAL_TOPICS[i]), f"{known[i] / total:.1%}") for i in np.argsort(-known) if known[i] > 0]
    return Table(columns=("topic", "share of rows"), rows=[*rows, ("(no topic)", f"{unsure / total:.1%}")])


def _treemap(facts: Sequence[DomainFacts]) -> Any:
    """One rectangle for each topic, in a block for each field; areas are numbers of rows."""
    fields = _fields(facts)
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.subplots()
    axes.set(xlim=(0, _WIDTH), ylim=(_HEIGHT, 0), aspect="equal")
    axes.axis("off")
    total = sum(domain.rows for domain in facts)
    blocks = squarified([_rows(facts, field) for field in fields], (0.0, 0.0, _WIDTH, _HEIGHT))
    for field, (x, y, width, height) in zip(fields, blocks, strict=True):
        dark, light = _COLORS.get(field, _OTHER_COLORS)
        known, unsure = _field_topics(facts, field)
        order = [int(i) for i in np.argsort(-known) if known[i] > 0]
        sizes = [float(known[i]) for i in order] + ([unsure] if unsure > 0 else [])
        names = [*(_pretty(CANONICAL_TOPICS[i]) for i in order), "no topic"]
        header = min(0.28, height / 4)
        axes.text(x + 0.05, y + header / 2, field, va="center", fontsize=11, fontweight="bold", color=TEXT)
        tiles = squarified(sizes, (x, y + header, width, height - header))
        for rank, (name, size, tile) in enumerate(zip(names, sizes, tiles, strict=False)):
            color = _UNKNOWN if rank == len(order) else _between(dark, light, rank / max(1, len(order)))
            axes.add_patch(_rectangle(tile, color))
            text, points = _fitted(name, f"{size / max(1, total):.1%}", tile)
            ink = "white" if np.dot(color, _LUMINANCE) < _DARK else TEXT
            if points >= _SMALLEST_POINTS:
                centre = (tile[0] + tile[2] / 2, tile[1] + tile[3] / 2)
                axes.text(*centre, text, ha="center", va="center", fontsize=points, color=ink)
    return figure


def _rows(facts: Sequence[DomainFacts], field: str) -> float:
    return float(sum(domain.rows for domain in facts if domain.field == field))


def _fitted(name: str, share: str, tile: Box) -> tuple[str, float]:
    """The text of a tile, in one of several line breaks, and the size in points at which it fits."""
    fitting = []
    for text in (f"{name}\n{share}", f"{_broken(name)}\n{share}"):
        lines = text.split("\n")
        wide = tile[2] * _POINTS * _FILLED / (_LETTER_WIDTH * max(map(len, lines)))
        high = tile[3] * _POINTS * _FILLED / (_LINE_HEIGHT * len(lines))
        fitting.append((text, min(wide, high, _LARGEST_POINTS)))
    return max(fitting, key=lambda found: found[1])


def _broken(name: str) -> str:
    """A name in two lines of similar length."""
    words = name.split(" ")
    breaks = [("\n".join((" ".join(words[:i]), " ".join(words[i:])))) for i in range(1, len(words))]
    return min(breaks, key=lambda lines: max(map(len, lines.split("\n"))), default=name)


def _pretty(topic: str) -> str:
    return topic.replace("_and_", " & ").replace("_", " ")


def _rectangle(tile: Box, color: Color) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(tile[:2], tile[2], tile[3], facecolor=color, edgecolor="white", linewidth=1.2)


def _between(dark: str, light: str, part: float) -> Color:
    first, last = (np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for color in (dark, light))
    red, green, blue = (first + part * (last - first)).tolist()
    return red, green, blue

"""Files of compositions: what is written is what is read, and anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.compositions import Composition, compositions_of, compositions_text, load_compositions

SCIENCE = Composition(
    counts={"Science": 30.0, "News": 10.0},
    intervals={"Science": (0.6, 0.86), "News": (0.14, 0.4)},
    documents=50,
    unsure=10,
    stated=3,
    error=0.04,
    documents_needed=45,
    classifier="linear (abc)",
    shards="d",
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(compositions_text({"source/web": SCIENCE}))
    assert load_compositions(tmp_path / "c.json") == {"source/web": SCIENCE}
    assert SCIENCE.shares == {"Science": 0.75, "News": 0.25}
    assert SCIENCE.source == (
        "measured on 40 documents by linear (abc), expected error 0.040, 20% of the sample left out as unsure"
    )
    assert replace(SCIENCE, unsure=0).source.endswith("0.040")
    assert "no sampling error" in replace(SCIENCE, error=0.0).source


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": {"Science": -1}},
        {"counts": {"Science": 0}},
        {"counts": {"Science": "many"}},
        {"counts": None},
        {"intervals": {"Science": [0.1]}},
        {"documents": 1.5},
        {"error": "small"},
        {"classifier": None},
        {"unsure": 60},
        {"stated": 41},
        {"counts": {"Science": 4000}},
        {"error": 3.0},
        {"intervals": {"Science": [0.9, 0.1]}},
        {"shards": 7},
    ],
    ids=str,
)
def test_damaged_files_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    content = json.loads(compositions_text({"source/web": SCIENCE}))
    content["domains"]["source/web"] |= changed
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match="cannot be read as compositions"):
        load_compositions(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 1, "schema": 1, "domains": {}}', "\xff"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match="cannot be read as compositions"):
        load_compositions(tmp_path / "c.json")
    with pytest.raises(ShardNotFoundError, match="`dmagent compose` writes it"):
        load_compositions(tmp_path / "none.json")


def test_a_file_may_hold_more_domains_than_the_run_but_not_only_others(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(compositions_text({"source/web": SCIENCE, "source/other": SCIENCE}))
    assert compositions_of({"source/web": "a.tar"}, tmp_path / "c.json") == {"source/web": SCIENCE}
    with pytest.raises(ShardError, match="none of which is a domain of this run"):
        compositions_of({"target/math": "a.tar"}, tmp_path / "c.json")


def test_a_composition_of_few_documents_with_a_topic_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thin = replace(SCIENCE, documents=81)
    (tmp_path / "c.json").write_text(
        compositions_text(
            {"source/web": replace(thin, unsure=41), "source/blog": replace(SCIENCE, documents=80, unsure=40)}
        )
    )
    shards = {"source/web": "a.tar", "source/blog": "b.tar"}
    assert list(compositions_of(shards, tmp_path / "c.json")) == ["source/blog"]
    assert "most of the documents sampled of ['source/web'] had no topic" in caplog.text
    assert "compositions={name: load_compositions(FILE)[name].shares}" in caplog.text

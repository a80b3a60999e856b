"""Outputs of NeMo Curator, datatrove and Dolma, in the layouts of their writers: labels and quality are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader.cli import main

TEXTS = {
    "Sports": "The goalkeeper saved a penalty in the last minute and the team won the league match",
    "Food_and_Drink": "Simmer the onions in butter, add garlic and stock, and season the soup with salt",
    "Health": "The nurse measured the blood pressure of the patient and gave a vaccine against flu",
}
STATED = {"Sports": "Travel_and_Transportation", "Food_and_Drink": "News", "Health": "News"}
"""Other topics than a classifier would find: whoever ignores the stated ones is found out."""
QUALITY = {"Sports": "High", "Food_and_Drink": "Medium", "Health": "Low"}


def curator_rows() -> list[dict[str, Any]]:
    """The columns that its DomainClassifier and QualityClassifier add, with score_field="probs" of the first."""
    return [
        {"id": name, "text": text, "domain_pred": STATED[name], "probs": [0.1, 0.9], "quality_pred": QUALITY[name]}
        for name, text in TEXTS.items()
    ]


def curator_jsonl(folder: Path) -> None:
    """pandas' to_json, in a file named by a hash, as `nemo_curator.stages.text.io.writer.JsonlWriter`."""
    frame = pytest.importorskip("pandas").DataFrame(curator_rows())
    frame.to_json(folder / "d41d8cd98f00.jsonl", lines=True, orient="records", force_ascii=False)


def curator_parquet(folder: Path) -> None:
    """pandas' to_parquet of a frame without some of its rows, as its ParquetWriter after a filter: with an index."""
    pytest.importorskip("pyarrow")
    frame = pytest.importorskip("pandas").DataFrame([{"text": "dropped"}, *curator_rows()])
    frame[frame["text"] != "dropped"].to_parquet(folder / "d41d8cd98f00.parquet", index=None)


def datatrove_rows() -> list[dict[str, Any]]:
    """`datatrove.data.Document` without empty fields; filters and readers put what they know into the metadata."""
    return [
        {
            "text": text,
            "id": f"<urn:uuid:{name}>",
            "metadata": {"file_path": "a.warc.gz", "token_count": 15, "topic": STATED[name], "quality": QUALITY[name]},
        }
        for name, text in TEXTS.items()
    ]


def datatrove_jsonl(folder: Path) -> None:
    """One file for each rank, as its JsonlWriter."""
    for rank, row in enumerate(datatrove_rows()):
        (folder / f"{rank:05d}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))


def datatrove_parquet(folder: Path) -> None:
    """Batches with a struct of the metadata, as its ParquetWriter."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    batch = pa.RecordBatch.from_pylist(datatrove_rows())
    with parquet.ParquetWriter(folder / "00000.parquet", batch.schema, compression="snappy") as writer:
        writer.write_batch(batch)


def dolma(folder: Path) -> None:
    """The output of `dolma mix`, which merges the attributes of taggers into the documents."""
    rows = [
        {
            "id": name,
            "text": text,
            "source": "common-crawl",
            "added": "2026-01-01T00:00:00Z",
            "created": "2025-01-01T00:00:00Z",
            "metadata": {"url": "https://example.org"},
            "attributes": {
                f"mine__topic_classifier__{STATED[name]}": [[0, len(text), 0.8]],
                "mine__topic_classifier__Games": [[0, len(text), 0.2]],
                "mine__ft_lang_id_en_doc_v2__en": [[0, len(text), 0.99]],
            },
        }
        for name, text in TEXTS.items()
    ]
    (folder / "mix-0000.json.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


LAYOUTS = (curator_jsonl, curator_parquet, datatrove_jsonl, datatrove_parquet, dolma)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_labels_of_other_pipelines_win_over_guesses(
    layout: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    layout(tmp_path / "data")
    command = ["label", "--domain", f"source/web={tmp_path / 'data'}", "--output", str(tmp_path / "out"), "--split"]
    assert main([*command, "--no-progress"]) == 0
    assert (
        "3 documents, 100% with a topic (3 stated): News 67%, Travel_and_Transportation 33%" in capsys.readouterr().out
    )
    news = gzip.decompress((tmp_path / "out/source/News.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["text"] for line in news] == [TEXTS["Food_and_Drink"], TEXTS["Health"]]
    command = ["shard", "--input", str(tmp_path / "out/source"), "--field", "source", "--output", str(tmp_path / "s")]
    assert main([*command, "--no-progress"]) == 0


@pytest.mark.parametrize(
    ("layout", "key"),
    [(curator_jsonl, "quality_pred"), (curator_parquet, "quality_pred"), (datatrove_parquet, "metadata.quality")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_quality_of_other_pipelines_needs_no_classifier(
    layout: Any, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    layout(tmp_path / "data")
    command = ["filter", "--domain", f"source/web={tmp_path / 'data'}", "--no-progress", "--output"]
    assert main([*command, str(tmp_path / "out"), "--quality-key", key]) == 0
    assert "source/web: 2 of 3 kept; dropped: 1 quality" in capsys.readouterr().out
    kept = gzip.decompress((tmp_path / "out/source/web.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["text"] for line in kept] == [TEXTS["Sports"], TEXTS["Food_and_Drink"]]
    assert main([*command, str(tmp_path / "other"), "--quality-key", "quality"]) == 2
    assert "has a quality in the column 'quality' (--quality-key)" in capsys.readouterr().err


def test_dolma_attributes_beside_the_documents_are_not_taken_for_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before `dolma mix`, attributes lie in files of their own, which have no text."""
    for name, row in {"documents": {"id": "1", "text": "a"}, "attributes": {"id": "1", "attributes": {}}}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    command = [
        "label",
        "--domain",
        f"source/web={tmp_path / 'data'}",
        "--output",
        str(tmp_path / "out"),
        "--no-progress",
    ]
    assert main(command) == 2
    assert "has no text in column 'text'" in capsys.readouterr().err

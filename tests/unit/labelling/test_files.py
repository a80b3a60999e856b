"""Labelling of files: every document once and in order, continued after a kill, and sorted by topic."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_fixtures import write_jsonl

from dmagent_loader.errors import ConfigurationError, DomainError, ShardError
from dmagent_loader.labelling import files, sorting
from dmagent_loader.labelling.documents import DomainDocuments, FileDocuments, ShardDocuments
from dmagent_loader.labelling.files import label_domains
from dmagent_loader.labelling.filter_files import filter_domains
from dmagent_loader.labelling.filtering import DocumentFilter, FilterConfig
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.labelling.parts import read_labels
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.manifest import load_manifest
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.writer import shard_files


class ByWord:
    """Labels a text by its first word; it is unsure of texts with a question mark."""

    name = "by word"
    labels = CANONICAL_TOPICS

    def __init__(self) -> None:
        self.seen: list[str] = []

    def probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        self.seen += texts
        result = np.full((len(texts), 26), 1 / 26)
        for row, text in zip(result, texts, strict=True):
            if "?" not in text:
                row[:] = np.eye(26)[self.labels.index(text.split()[0])]
        return result


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "PART_DOCUMENTS", 4)
    rows: list[dict[str, Any]] = [{"text": f"{'Science' if n % 2 else 'Games'} {n}", "url": f"u{n}"} for n in range(8)]
    rows += [{"text": "Games ? 8"}, {"text": "Games 9", "topic": "News"}]
    return write_jsonl(tmp_path / "web.jsonl.gz", rows)


def run(web: Path, output: Path, classifier: ByWord, **settings: Any) -> Any:
    documents = {"source/web": FileDocuments("source/web", [web])}
    return label_domains(documents, output, Labeller(classifier), progress=False, **settings)["source/web"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_labels_are_in_the_order_of_the_documents_and_counted(web: Path, tmp_path: Path) -> None:
    found = run(web, tmp_path / "out", ByWord())
    labels = list(read_labels(tmp_path / "out" / "labels" / "source/web"))
    assert [label["topic"] for label in labels] == [*["Games", "Science"] * 4, None, "News"]
    assert [label["by"] for label in labels] == [*["by word"] * 9, "stated"]
    assert labels[3]["origin"].endswith("web.jsonl.gz, line 4")
    counts = dict(zip(CANONICAL_TOPICS, found.counts, strict=True))
    assert (counts["Games"], counts["Science"], counts["News"]) == (4, 4, 1)
    assert (found.documents, found.unsure, found.stated) == (10, 1, 1)


def with_bad_lines(web: Path) -> Path:
    """The documents, with two lines that are none, of which the first is in the middle of a part."""
    lines = gzip.decompress(web.read_bytes()).splitlines(keepends=True)
    path = web.with_name("bad.jsonl.gz")
    path.write_bytes(gzip.compress(b"".join([*lines[:6], b"{\n", *lines[6:], b'{"text": 3}\n'])))
    return path


def test_bad_records_are_left_out_up_to_the_bound_and_listed(web: Path, tmp_path: Path) -> None:
    bad, output = with_bad_lines(web), tmp_path / "bad"
    with pytest.raises(ShardError, match=r"line 7 is not JSON .*; to leave out up to N such records, pass --max-bad N"):
        run(bad, output, ByWord())
    with pytest.raises(ShardError, match=r"more than 1 records that are no documents, the last: .*line 12 has no text"):
        run(bad, output, ByWord(), max_bad=1)
    found = run(bad, output, ByWord(), split=True, max_bad=2)
    assert (found.documents, found.bad_records) == (10, 2)
    run(web, tmp_path / "good", ByWord(), split=True)
    for name in ("source/Science.jsonl.gz", "source/Games.jsonl.gz", "unsure/source.jsonl.gz"):
        assert read_rows(output / name) == read_rows(tmp_path / "good" / name)
    rejects = (output / "labels" / "source/web" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"].rpartition(", ")[2] for line in rejects] == ["line 7", "line 12"]
    assert len(list(read_labels(output / "labels" / "source/web"))) == 10


def test_the_bound_of_bad_records_is_that_of_a_domain_and_not_of_a_piece(web: Path, tmp_path: Path) -> None:
    bad = with_bad_lines(web)
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": 4}\n')
    documents = {"source/web": FileDocuments("source/web", [bad, more])}
    documents["source/web"].pieces = lambda: [  # type: ignore[method-assign]
        piece for path in (bad, more) for piece in FileDocuments("source/web", [path]).pieces()
    ]
    with pytest.raises(ShardError, match="more than 2 records that are no documents"):
        label_domains(documents, tmp_path / "out", Labeller(ByWord()), max_bad=2, progress=False)


def test_a_killed_job_continues_after_its_last_part(web: Path, tmp_path: Path) -> None:
    """The first classifier dies in the third part; the second one sees that part only, and nothing differs."""

    class Dies(ByWord):
        def probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
            if any("?" in text for text in texts):
                raise KeyboardInterrupt
            return super().probabilities(texts)

    with pytest.raises(KeyboardInterrupt):
        run(web, tmp_path / "killed", Dies())
    second = ByWord()
    assert (
        run(web, tmp_path / "killed", second).counts.tolist() == run(web, tmp_path / "whole", ByWord()).counts.tolist()
    )
    assert second.seen == ["Games ? 8"]
    for whole in (tmp_path / "whole").rglob("part-*"):
        assert (tmp_path / "killed" / whole.relative_to(tmp_path / "whole")).read_bytes() == whole.read_bytes()


def test_documents_are_sorted_by_topic_with_their_columns(web: Path, tmp_path: Path) -> None:
    run(web, tmp_path / "out", ByWord(), split=True)
    folder = tmp_path / "out" / "source"
    assert sorted(path.name for path in folder.iterdir()) == [
        sorting.SPLIT_FILE,
        "Games.jsonl.gz",
        "News.jsonl.gz",
        "Science.jsonl.gz",
    ]
    rows = read_rows(folder / "Science.jsonl.gz")
    assert [row["text"] for row in rows] == ["Science 1", "Science 3", "Science 5", "Science 7"]
    assert rows[0]["url"] == "u1"
    assert rows[0]["topic_by"] == "by word"
    (unsure,) = read_rows(tmp_path / "out" / "unsure" / "source.jsonl.gz")
    assert unsure["text"] == "Games ? 8"


def test_documents_of_files_whose_names_are_not_utf8_are_sorted(tmp_path: Path) -> None:
    """Their origins were compared with those of the labels, which have question marks, and called others."""
    path = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_text("".join(json.dumps({"text": f"Science {number}"}) + "\n" for number in range(3)))
    domains = {"source/a": FileDocuments("source/a", [path])}
    for _ in range(2):
        found = label_domains(domains, tmp_path / "out", Labeller(ByWord()), split=True, progress=False)
    assert found["source/a"].documents == 3
    assert len(list((tmp_path / "out/source").glob("*.jsonl.gz"))) == 1


def test_sorting_leaves_the_labels_and_the_unfinished_work_of_shard(web: Path, tmp_path: Path) -> None:
    """Sorting removed `.partial`, and a field called "labels" was sorted into the folder of the labels."""
    unfinished = tmp_path / "out" / ".partial" / "job" / "chunk.safetensors"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"hours of work")
    run(web, tmp_path / "out", ByWord(), split=True)
    assert unfinished.read_bytes() == b"hours of work"
    for field in ("labels", "unsure"):
        documents = {f"{field}/web": FileDocuments(f"{field}/web", [web])}
        with pytest.raises(DomainError, match=f"sorted into the folder '{field}', which is for other files"):
            label_domains(documents, tmp_path / field, Labeller(ByWord()), split=True, progress=False)


def test_settings_that_cannot_be_read_are_an_error_with_a_remedy(web: Path, tmp_path: Path) -> None:
    run(web, tmp_path / "out", ByWord())
    (tmp_path / "out" / "labels" / "source" / "web" / files.SETTINGS_FILE).write_text("[")
    with pytest.raises(ConfigurationError, match=r"settings\.json of the job cannot be written or read .* or remove"):
        run(web, tmp_path / "out", ByWord())


def test_labels_of_other_documents_or_settings_are_not_continued(web: Path, tmp_path: Path) -> None:
    run(web, tmp_path / "out", ByWord())
    other = ByWord()
    other.name = "another"
    with pytest.raises(ConfigurationError, match="holds labels with other classifier"):
        run(web, tmp_path / "out", other)
    write_jsonl(web, [{"text": "Science 1"}])
    with pytest.raises(ConfigurationError, match="holds labels with other documents"):
        run(web, tmp_path / "out", ByWord())


def test_a_job_that_ended_at_a_bad_record_runs_once_it_is_repaired(web: Path, tmp_path: Path) -> None:
    """It was refused, because of labels that there were none of."""
    write_jsonl(web, [{"text": "Science 1"}, {"text": None}])
    with pytest.raises(ShardError, match="repair or remove the record"):
        run(web, tmp_path / "out", ByWord())
    write_jsonl(web, [{"text": "Science 1"}])
    run(web, tmp_path / "out", ByWord())
    with pytest.raises(ConfigurationError, match="holds labels with other documents"):
        run(write_jsonl(web, [{"text": "Games 12"}]), tmp_path / "out", ByWord())


def test_labels_of_another_data_set_or_column_are_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets of two owners may have one name, and two columns of a row one place."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "Games 1", "body": "Science 1"}]
    for owner in ("a", "b"):
        (tmp_path / owner / "corpus").mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / owner / "corpus" / "train-0.parquet")

    def label(documents: DomainDocuments, output: Path) -> None:
        label_domains({"source/web": documents}, output, Labeller(ByWord()), progress=False)

    label(FileDocuments("source/web", [f"hf:{tmp_path}/a/corpus"]), Path())  # lies in no folder
    label(FileDocuments("source/web", [f"hf:{tmp_path}/a/corpus"]), Path())
    with pytest.raises(ConfigurationError, match="holds labels with other documents"):
        label(FileDocuments("source/web", [f"hf:{tmp_path}/b/corpus"]), Path())
    shard_files(
        {"source/web": [write_jsonl(tmp_path / "web.jsonl", rows)]},
        tmp_path / "shards",
        ShardingConfig(text_key="text", keep_columns=("body",)),
        progress=False,
    )
    shards = ShardCollection.open(load_manifest(tmp_path / "shards"), progress=False)
    label(ShardDocuments(shards, 0), tmp_path / "labels")
    with pytest.raises(ConfigurationError, match="holds labels with other documents"):
        label(ShardDocuments(shards, 0, text_key="body"), tmp_path / "labels")


def test_a_damaged_part_is_named(web: Path, tmp_path: Path) -> None:
    run(web, tmp_path / "out", ByWord())
    part = tmp_path / "out" / "labels" / "source/web" / "part-000000-000001.jsonl.gz"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ShardError, match="part-000000-000001"):
        run(web, tmp_path / "out", ByWord())


def test_inputs_in_the_output_folder_are_refused_and_stay(web: Path, tmp_path: Path) -> None:
    for name in ("source", "unsure"):
        copy = tmp_path / "loss" / name / "web.jsonl.gz"
        copy.parent.mkdir(parents=True)
        copy.write_bytes(web.read_bytes())
        with pytest.raises(ConfigurationError, match="lies in the output folder"):
            run(copy, tmp_path / "loss", ByWord(), split=True)
        assert copy.read_bytes() == web.read_bytes()


def test_sorting_that_is_killed_while_it_replaces_goes_on(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two renames, the folder must not look like one that sorting did not write."""
    run(web, tmp_path / "out", ByWord(), split=True)

    def contents() -> dict[str, bytes]:
        files = [path for path in (tmp_path / "out").rglob("*.jsonl.gz") if path.parent.name != "web"]
        return {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in files}

    expected, kills = contents(), 0
    assert "unsure/source.jsonl.gz" in expected
    replace, exceeded = os.replace, False
    while not exceeded:
        left = kills

        def killed(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            try:
                run(web, tmp_path / "out", ByWord(), split=True)
                exceeded = True
            except KeyboardInterrupt:
                kills += 1
        run(web, tmp_path / "out", ByWord(), split=True)
        assert contents() == expected
    assert kills == 4 + 3, "four new files, and three renames of the replacement"


def test_folders_that_sorting_did_not_write_are_not_replaced(web: Path, tmp_path: Path) -> None:
    for kept in (tmp_path / "a" / "source" / "notes.txt", tmp_path / "b" / "unsure" / "source.jsonl.gz"):
        kept.parent.mkdir(parents=True)
        kept.write_text("mine")
        with pytest.raises(ConfigurationError, match="was not written by `dmagent label --split`"):
            run(web, kept.parent.parent, ByWord(), split=True)
        assert kept.read_text() == "mine"


def test_sorting_another_field_keeps_the_first_and_its_unsure_documents(web: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(web, out, ByWord(), split=True)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "News ?"}, {"text": "News 1"}])
    documents = {"target/news": FileDocuments("target/news", [other])}
    label_domains(documents, out, Labeller(ByWord()), split=True, progress=False)
    assert [row["text"] for row in read_rows(out / "unsure" / "source.jsonl.gz")] == ["Games ? 8"]
    assert [row["text"] for row in read_rows(out / "unsure" / "target.jsonl.gz")] == ["News ?"]
    assert len(read_rows(out / "source" / "Science.jsonl.gz")) == 4
    assert not (out / ".partial").exists()


def test_sorting_does_not_drop_another_domain_of_the_field(web: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(web, out, ByWord(), split=True)
    other = {"source/new": FileDocuments("source/new", [write_jsonl(tmp_path / "new.jsonl", [{"text": "News 1"}])])}
    with pytest.raises(ConfigurationError, match=r"holds the documents of \['source/web'\], too"):
        label_domains(other, out, Labeller(ByWord()), split=True, progress=False)
    assert len(read_rows(out / "source" / "Science.jsonl.gz")) == 4
    both = {"source/web": FileDocuments("source/web", [web]), **other}
    label_domains(both, out, Labeller(ByWord()), split=True, progress=False)
    assert len(read_rows(out / "source" / "Science.jsonl.gz")) == 4
    assert len(read_rows(out / "source" / "News.jsonl.gz")) == 2


def test_a_missing_part_is_labelled_again_and_the_others_stay(web: Path, tmp_path: Path) -> None:
    run(web, tmp_path / "out", ByWord())
    folder = tmp_path / "out" / "labels" / "source/web"
    whole = list(read_labels(folder))
    (folder / "part-000000-000001.jsonl.gz").unlink()
    with pytest.raises(ShardError, match=r"before part-000000-000002 in .* are missing"):
        list(read_labels(folder))
    again = ByWord()
    run(web, tmp_path / "out", again, split=True)
    assert again.seen == ["Games 4", "Science 5", "Games 6", "Science 7"]
    assert list(read_labels(folder)) == whole


def test_labels_of_other_rows_are_refused(web: Path, tmp_path: Path) -> None:
    run(web, tmp_path / "out", ByWord())
    folder = tmp_path / "out" / "labels" / "source/web"
    (folder / "part-000000-000000.jsonl.gz").write_bytes((folder / "part-000000-000001.jsonl.gz").read_bytes())
    with pytest.raises(ShardError, match="are not those of the 4 documents"):
        run(web, tmp_path / "out", ByWord())


def test_columns_that_json_cannot_hold_are_refused_before_the_job(tmp_path: Path) -> None:
    """Bytes were written as the text that Python shows for them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "Games 1", "day": date(2026, 1, 2), "price": Decimal("1.50")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "good.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row | {"raw": b"\xff"} for row in rows]), tmp_path / "bad.parquet")
    good = {"source/a": FileDocuments("source/a", [str(tmp_path / "good.parquet")])}
    bad = {"source/a": FileDocuments("source/a", [str(tmp_path / "bad.parquet")])}
    checked = DocumentFilter(FilterConfig())
    fault = r"a column of .*bad\.parquet.* cannot be written as JSON \(a bytes\): write the data without this column"
    with pytest.raises(ShardError, match=fault):
        filter_domains(bad, tmp_path / "filtered", checked, progress=False)
    with pytest.raises(ShardError, match=fault):
        label_domains(bad, tmp_path / "labelled", Labeller(ByWord()), split=True, progress=False)
    label_domains(bad, tmp_path / "labels", Labeller(ByWord()), progress=False)
    filter_domains(good, tmp_path / "filtered", checked, progress=False)
    label_domains(good, tmp_path / "labelled", Labeller(ByWord()), split=True, progress=False)
    for path in (tmp_path / "filtered/source/a.jsonl.gz", tmp_path / "labelled/source/Games.jsonl.gz"):
        written = json.loads(gzip.decompress(path.read_bytes()))
        assert (written["day"], written["price"]) == ("2026-01-02", "1.50")

"""Every kind of input gives the documents that were put into it, by the library that makes it."""

from __future__ import annotations

import bz2
import csv
import datetime
import errno
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dmagent_loader.errors import MissingExtraError, ShardError
from dmagent_loader.shards.inputs import tables
from dmagent_loader.shards.inputs.documents import Document, DocumentReader, read_documents
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.pieces import divide
from dmagent_loader.shards.inputs.records import Rejected

pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"id": number, "text": text}
    for number, text in enumerate(["plain", 'with "quotes", commas\nand lines', "snow ☃", " ", "last"])
]
TEXTS = [row["text"] for row in ROWS if str(row["text"]).strip()]


def documents(path: Path | str, options: ReadOptions | None = None) -> list[Document]:
    options = options or ReadOptions()
    return list(DocumentReader(find_inputs("source/a", [path], options), options))


def lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table() -> Any:
    return pyarrow.Table.from_pylist(ROWS)


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def separated() -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"])
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def arrow(new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with new(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return sink.getvalue()


def parquet(**settings: Any) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table(), sink, row_group_size=2, **settings)
    return sink.getvalue()


def feather() -> bytes:
    import pyarrow.feather

    sink = io.BytesIO()
    pyarrow.feather.write_feather(table(), sink)
    return sink.getvalue()


def tar(extension: str, content: Callable[[dict[str, Any]], str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for row in ROWS:
            data = content(row).encode()
            info = tarfile.TarInfo(f"{row['id']:04d}.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson.gz": lambda: gzip.compress(lines()),
    "a.jsonl.bz2": lambda: bz2.compress(lines()),
    "a.jsonl.xz": lambda: lzma.compress(lines()),
    "a.jsonl.zst": lambda: zstd(lines()),
    "two_frames.jsonl.zst": lambda: zstd(lines()[:100]) + zstd(lines()[100:]),
    "lines.json": lines,
    "array.json": lambda: json.dumps(ROWS).encode(),
    "array.json.gz": lambda: gzip.compress(json.dumps(ROWS, indent=1).encode()),
    "a.csv": lambda: separated(),
    "bom.csv": lambda: b"\xef\xbb\xbf" + separated(),
    "a.csv.zst": lambda: zstd(separated()),
    "a.parquet": parquet,
    "snappy.parquet": lambda: parquet(compression="snappy", use_dictionary=False),
    "stream.arrow": lambda: arrow(pyarrow.ipc.new_stream),
    "file.arrow": lambda: arrow(pyarrow.ipc.new_file),
    "a.feather": feather,
}
TARS: dict[str, Callable[[], bytes]] = {
    "txt": lambda: tar("txt", lambda row: str(row["text"])),
    "json": lambda: tar("json", json.dumps),
}


@pytest.mark.parametrize("name", FILES)
def test_files_give_their_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    found = documents(tmp_path / name, ReadOptions(keep_columns=("id",)))
    assert [document.text for document in found] == TEXTS
    assert [int(document.columns["id"]) for document in found] == [0, 1, 2, 4]
    assert all(name in document.origin for document in found)
    assert len({document.origin for document in found}) == len(found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "array.json.gz", "a.csv", "a.parquet", "stream.arrow"])
def test_files_behind_urls_give_the_same_documents(name: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/readers/{name}", FILES[name]())
    memory.pipe("/readers/README.md", b"stray")
    for url in (f"memory://readers/{name}", "memory://readers/", f"memory://readers/{name[:3]}*"):
        assert [document.text for document in documents(url)] == TEXTS
    memory.rm("/readers", recursive=True)


@pytest.mark.parametrize("member", TARS)
def test_tar_shards_give_the_member_that_is_named(tmp_path: Path, member: str) -> None:
    (tmp_path / "a.tar").write_bytes(TARS[member]())
    assert [d.text for d in documents(tmp_path / "a.tar", ReadOptions(tar_member=member))] == TEXTS
    (tmp_path / "bad.tar").write_bytes(tar("json", lambda row: "[" if row["id"] else "[]"))
    with pytest.raises(ShardError, match=r"bad\.tar, row '0000' has no text in its member 'json'"):
        documents(tmp_path / "bad.tar", ReadOptions(tar_member="json"))
    other = "json" if member == "txt" else "txt"
    with pytest.raises(ShardError, match=rf"has no member '{other}', only \['{member}'\]"):
        documents(tmp_path / "a.tar", ReadOptions(tar_member=other))


def test_a_tar_shard_that_cannot_be_read_is_named_with_a_remedy_for_its_reader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The messages were for those who train on it, named a domain that nobody has, and one tar of many was the end."""
    options, whole = ReadOptions(tar_member="txt"), TARS["txt"]()
    (tmp_path / "a.tar").write_bytes(whole)
    (tmp_path / "b.tar").write_bytes(bytes(10240))
    assert [document.text for document in documents(tmp_path, options)] == TEXTS
    assert "b.tar holds no sample" in caplog.text
    (tmp_path / "b.tar").write_bytes(whole[:-10240])
    with pytest.raises(
        ShardError, match=r"b\.tar is damaged, .* \(`dmagent index .*b\.tar` lists where\): fetch"
    ) as error:
        documents(tmp_path, options)
    assert "source/shard" not in str(error.value)
    (tmp_path / "b.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(ShardError, match=r"b\.tar is compressed \(gzip\)") as error:
        documents(tmp_path, options)
    assert "load_state_dict" not in str(error.value)
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        file.addfile(tarfile.TarInfo("arxiv.2101.txt"))
    with pytest.raises(ShardError, match=r"row 'arxiv' has no member 'txt', only .*--key-ends-at last-dot"):
        documents(tmp_path, options)


def test_saved_data_sets_give_their_rows(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    assert [document.text for document in documents(tmp_path / "saved")] == TEXTS
    datasets.DatasetDict(train=whole).save_to_disk(tmp_path / "one")
    assert [document.text for document in documents(tmp_path / "one")] == TEXTS
    whole.select([4, 0]).save_to_disk(tmp_path / "chosen")
    assert [document.text for document in documents(tmp_path / "chosen")] == ["last", "plain"]
    whole.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ShardError, match="none cannot be read"):  # an IndexError of the library
        documents(tmp_path / "none")
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "two")
    with pytest.raises(ShardError, match=r"has the splits \['test', 'train'\]: give the folder of one"):
        documents(tmp_path / "two")
    assert [document.text for document in documents(tmp_path / "two" / "train")] == TEXTS


def test_a_saved_data_set_with_a_file_that_was_cut_or_is_missing_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    last = tmp_path / "saved/data-00001-of-00002.arrow"
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(ShardError, match=r"data-00001-of-00002\.arrow is damaged"):
        documents(tmp_path / "saved")
    last.unlink()
    with pytest.raises(ShardError, match="saved cannot be read"):
        documents(tmp_path / "saved")


def test_data_sets_are_read_by_name(tmp_path: Path) -> None:
    """A folder stands for a name of the Hub; both go through the same function of the library."""
    (tmp_path / "corpus").mkdir()
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        (tmp_path / "corpus" / name).write_bytes(parquet())
    assert [document.text for document in documents(f"hf:{tmp_path}/corpus")] == [*TEXTS, *TEXTS]
    assert [document.text for document in documents(f"hf:{tmp_path}/corpus:test")] == TEXTS
    assert len(divide(find_inputs("source/a", [f"hf:{tmp_path}/corpus"]))) == 2
    with pytest.raises(ShardError, match=r"no split 'dev', but \['test', 'train'\]"):
        documents(f"hf:{tmp_path}/corpus:dev")


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("a.jsonl", "lines.json")])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, name: str) -> None:
    """Some libraries take the end of a cut file for the end of its data."""
    data = FILES[name]()
    cuts = {"two_frames.jsonl.zst": [len(data) - 3], "stream.arrow": [len(data) - 8, len(data) // 2]}
    for cut in cuts.get(name, [len(data) * 2 // 3]):
        (tmp_path / name).write_bytes(data[:cut])
        with pytest.raises(ShardError, match=name):
            documents(tmp_path / name)


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x7fELF\x02\x01\x01\x00\xff\xfe" * 50)
    with pytest.raises(ShardError, match=name):
        documents(tmp_path / name)


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_without_the_column_is_refused_with_what_it_has(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    with pytest.raises(ShardError, match=r"no text in column 'body'; it has \['id', 'text'\]: name the text column"):
        documents(tmp_path / name, ReadOptions(text_key="body"))


def test_a_column_inside_of_a_column_is_refused_with_what_to_do(tmp_path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"page": [{"text": "a"}]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"page": {"text": "a"}}\n')
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(ShardError, match=r"it has \['page'\]: columns inside of columns are not read"):
            documents(tmp_path / name, ReadOptions(text_key="page.text"))


def test_values_of_a_table_that_are_no_text_are_refused_by_row(tmp_path: Path) -> None:
    import pyarrow.parquet

    for value, message in ((None, "has no text in column 'text', but None"), (b"\xff\xfe", "'text' is not UTF-8")):
        values = [b"bytes are read as UTF-8", value]
        pyarrow.parquet.write_table(
            pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())}), tmp_path / "a.parquet"
        )
        with pytest.raises(ShardError, match=rf"a\.parquet, row 2.*{message}"):
            documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_a_column_of_text_that_is_not_utf8_is_refused_by_row(tmp_path: Path, name: str) -> None:
    """Spark and others write any bytes. Such a row was the end of the file, whatever may be left out."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    text = pyarrow.array([b"one", b"caf\xe9", b"three", None], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": text if name == "a.parquet" else text.dictionary_encode(), "id": range(4)})
    write = pyarrow.parquet.write_table if name == "a.parquet" else pyarrow.feather.write_feather
    write(table, tmp_path / name)
    options, rejects = ReadOptions(), list[Rejected]()
    (piece,) = divide(find_inputs("source/a", [tmp_path / name]))
    found = [document.text for document in read_documents(piece, options, lambda size: None, rejects.append)]
    assert found == ["one", "three"]
    assert [reject.origin.rpartition(", ")[2] for reject in rejects] == ["row 2", "row 4"]
    assert "row 2 column 'text' is not UTF-8: convert it" in rejects[0].reason


def test_a_value_that_python_cannot_hold_is_refused_with_its_column(tmp_path: Path) -> None:
    """Microseconds in a column of seconds were a traceback of Arrow, or called for another download."""
    import pyarrow
    import pyarrow.feather

    for time in (10**17, 10**12):
        when = pyarrow.array([time], pyarrow.timestamp("s"))
        pyarrow.feather.write_feather(pyarrow.table({"text": ["a"], "when": when}), tmp_path / "a.feather")
        assert [document.text for document in documents(tmp_path / "a.feather")] == ["a"]
        with pytest.raises(
            ShardError, match=r"a\.feather: column 'when' has a value that cannot be read .*repair the col"
        ):
            documents(tmp_path / "a.feather", ReadOptions(keep_columns=("when",)))


def test_rows_of_csv_that_do_not_fit_are_refused_by_line(tmp_path: Path) -> None:
    cases = {
        "text,id\na,1\nb\n": "line 3 has 1 fields, but the header has 2",
        'text,id\na,1\n"b" x,2\n': "line 3 is not CSV",
        'text,id\na,1\n"b,2\nc,3\n': "line 3 opens a quote that is not closed",
        "text,id\na,1\n\udcff,2\n": r"line 3 is not UTF-8: convert it \(iconv does\)",
    }
    for content, message in cases.items():
        (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ShardError, match=message):
            documents(tmp_path / "a.csv")


def test_long_fields_of_csv_are_read(tmp_path: Path) -> None:
    """The library refuses fields of more than 131,072 characters by default."""
    (tmp_path / "a.csv").write_text("text\n" + "long " * 100_000 + "\n")
    assert len(documents(tmp_path / "a.csv")[0].text) == 500_000


def test_binary_content_under_the_name_of_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\0text")
    with pytest.raises(ShardError, match=r"a\.txt contains a zero byte, as binary files do"):
        documents(tmp_path / "a.txt", ReadOptions(text_files=(".txt",)))


def test_dates_and_the_like_are_kept(tmp_path: Path) -> None:
    import pyarrow.parquet

    day = datetime.date(2026, 1, 2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "day": [day]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", ReadOptions(keep_columns=None))[0].columns == {"day": day}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_pieces_of_a_large_file_give_its_documents_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    options = ReadOptions()
    for size in (1, 20, 60, 100, 10**6):
        pieces = divide(find_inputs("source/a", [tmp_path / name]), size)
        records = [record for piece in pieces for record in piece.read(options, lambda done: None)]
        assert [record.value["text"] for record in records] == [row["text"] for row in ROWS]  # type: ignore[union-attr, index, call-overload]
        assert len(pieces) > 1 or size >= 100


def test_an_array_under_the_name_of_lines_is_one_piece(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS, indent=1))
    (piece,) = divide(find_inputs("source/a", [tmp_path / "a.jsonl"]), 20)
    assert len(list(piece.read(ReadOptions(), lambda done: None))) == len(ROWS)


def test_pieces_of_a_saved_data_set_give_its_rows_once(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    pieces = divide(find_inputs("source/a", [tmp_path / "saved"]), 500)
    assert len(pieces) > 1
    reader = [record for piece in pieces for record in piece.read(ReadOptions(), lambda done: None)]
    assert [record.origin.rpartition(" ")[2] for record in reader] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_long_documents_of_tables_are_converted_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """1,024 books of 1 MB took gigabytes in each process."""
    texts = [f"{number} " + "x" * 1000 for number in range(100)]
    whole = datasets.Dataset.from_dict({"text": texts})
    path = tmp_path / kind if kind == "saved" else tmp_path / "a.parquet"
    if kind == "saved":
        whole.save_to_disk(path)
    else:
        whole.to_parquet(path)
    sizes: list[int] = []
    read = tables._values

    def values(name: str, column: str, batch: Any) -> list[Any]:
        sizes.append(batch.num_rows)
        return read(name, column, batch)

    monkeypatch.setattr(tables, "_values", values)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 10_000)
    assert [document.text for document in documents(path)] == texts
    assert max(sizes) <= 10
    monkeypatch.setattr(tables, "_BATCH_BYTES", 10)
    assert [document.text for document in documents(path)] == texts


def test_small_files_share_a_piece(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.jsonl").write_bytes(lines())
    (piece,) = divide(find_inputs("source/a", [tmp_path]))
    assert len(piece.inputs) == 10


def test_progress_counts_all_stored_bytes(tmp_path: Path) -> None:
    for name, make in FILES.items():
        path = tmp_path / name
        path.write_bytes(make())
        done: list[int] = []
        options = ReadOptions()
        list(DocumentReader(find_inputs("source/a", [path]), options, done.append))
        assert 0 < sum(done) <= path.stat().st_size, name


@pytest.mark.parametrize("name", list(FILES))
def test_a_fault_that_is_not_the_input_s_is_not_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    for fault in (BrokenPipeError(), KeyError("a column")):

        def advance(size: int, fault: Exception = fault) -> None:
            raise fault

        options = ReadOptions()
        with pytest.raises(type(fault)):
            list(DocumentReader(find_inputs("source/a", [tmp_path / name]), options, advance))


def test_a_full_disk_is_not_called_damage_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset_builder", full)
    with pytest.raises(OSError, match="No space left"):
        documents("hf:a/corpus")


def test_packages_that_are_missing_are_named_with_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfdcontent")
    with pytest.raises(MissingExtraError, match=r"dmagent-loader\[data\]"):
        documents(tmp_path / "a.jsonl.zst")

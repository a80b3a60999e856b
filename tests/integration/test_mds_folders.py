"""Folders that mosaicml-streaming has written. It needs torchvision, for which benchmarks/stand_ins is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.kinds import Kind
from dmagent_loader.shards.inputs.options import ReadOptions

streaming = pytest.importorskip("streaming")


def write(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]], **settings: Any) -> Path:
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=200, **settings) as writer:
        for row in rows:
            writer.write(row)
    return folder


def test_samples_are_documents(tmp_path: Path) -> None:
    rows = [{"text": f"text {number} ☃", "id": number} for number in range(30)]
    folder = write(tmp_path / "mds", {"text": "str", "id": "int"}, rows)
    assert len(list(folder.glob("*.mds"))) > 1
    (found,) = find_inputs("source/a", [tmp_path])
    assert found.kind is Kind.MDS
    documents = list(DocumentReader([found], ReadOptions(keep_columns=("id",))))
    assert [(document.text, document.columns["id"]) for document in documents] == [(r["text"], r["id"]) for r in rows]
    with pytest.raises(ShardError, match=r"no text in column 'body'; it has \['id', 'text'\]"):
        list(DocumentReader([found], ReadOptions(text_key="body")))
    last = max(folder.glob("*.mds"))
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(ShardError, match=r"does not have the .* bytes that its index says"):
        list(DocumentReader([found]))


def test_columns_that_can_execute_code_and_compressed_folders_are_refused(tmp_path: Path) -> None:
    unsafe = write(tmp_path / "unsafe", {"text": "str", "x": "pkl"}, [{"text": "a", "x": 1}])
    with pytest.raises(ShardError, match=r"encodings \{'x': 'pkl'\}, and reading 'pkl' can execute code"):
        list(DocumentReader(find_inputs("source/a", [unsafe])))
    packed = write(tmp_path / "packed", {"text": "str"}, [{"text": "a"}], compression="zstd")
    with pytest.raises(ShardError, match=r"is compressed \(zstd\): unpack its shards"):
        list(DocumentReader(find_inputs("source/a", [packed])))

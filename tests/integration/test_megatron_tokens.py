"""Tokens that Megatron's own writer has prepared are packed as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.kinds import Kind

indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
torch = pytest.importorskip("torch")


def test_megatron_tokens_are_read_as_documents(tmp_path: Path) -> None:
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for tokens in ([5, 6, 7, 0], [8, 9]):
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1])
    builder.finalize(str(tmp_path / "a.idx"))
    (found,) = find_inputs("source/a", [tmp_path])
    assert found.kind is Kind.MEGATRON
    documents = DocumentReader(find_inputs("source/a", [tmp_path / "a.idx"]))
    tokens = [document.tokens.tolist() for document in documents if document.tokens is not None]
    assert tokens == [[5, 6, 7, 0], [8, 9], [1, 2, 3]]
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    with pytest.raises(ShardError, match=r"a\.bin has 16 bytes, but its \.idx describes 18"):
        list(DocumentReader([found]))

"""Packing on the fly loses nothing but the end of each shard, in whatever order the rows are read."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_shards import byte_tokenizer, joined, tokens_of, write_documents

from dmagent_loader.shards import PackedRows, PackText, ShardCollection

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SHARDS = st.lists(st.lists(TEXT, min_size=1, max_size=8), min_size=1, max_size=3)
TOKENIZER = byte_tokenizer()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shards=SHARDS, length=st.integers(2, 40), seed=st.integers(0, 1000))
def test_tokens_in_are_tokens_out_and_remainders(shards: list[list[str]], length: int, seed: int) -> None:
    whole = [joined(texts, TOKENIZER) for texts in shards]
    if not any(len(tokens) >= length for tokens in whole):
        whole.append(joined(["a" * length], TOKENIZER))  # a domain without a row is refused
        shards = [*shards, ["a" * length]]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_documents(Path(folder), {"source/a": shards})
        collection = ShardCollection.open(paths, cache_dir=folder, progress=False)
        rows = PackedRows.open(collection, PackText(TOKENIZER, length), cache_dir=Path(folder), progress=False)
        addresses = [(shard, row) for shard, count in enumerate(rows.shard_rows(0)) for row in range(count)]
        random.Random(seed).shuffle(addresses)
        read = {address: tokens_of(rows.read(0, *address)) for address in addresses}
    for (shard, row), tokens in read.items():
        assert tokens == whole[shard][row * length : (row + 1) * length]
    assert [int(count) for count in rows.shard_rows(0)] == [len(tokens) // length for tokens in whole]
    account = rows.accounts["source/a"]
    assert account.tokens == sum(map(len, whole)) == sum(map(len, read.values())) + account.remainder
    assert account.remainder == sum(len(tokens) % length for tokens in whole)
    assert account.documents == sum(map(len, shards))

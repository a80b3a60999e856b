"""Whatever the text: the ids with the package tiktoken are those of the tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from byte_level_tokenizers import END, KINDS, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dmagent_loader.shards.writing.encoding import TextEncoder, encode_texts

pytest.importorskip("tiktoken")

pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(categories=["Zs", "Cc", "Cf", "Mn", "Nd", "No", "Lo"])),
    st.text(st.sampled_from("aeos'stREll \n\r\t01é\u0301ſ\u3000٣漢")),
    st.sampled_from([END, "'s", "'LL", "\r\n", "the quick", "👩‍👩‍👧", "\u1112\u1161\u11ab"]),
    st.builds(str.__mul__, st.text(min_size=1, max_size=3), st.integers(0, 200)),
)
texts = st.lists(st.lists(pieces, max_size=6).map("".join), min_size=1, max_size=8)


@cache
def encoders(kind: str, parse_special_tokens: bool) -> tuple[Tokenizer, TextEncoder]:
    tokenizer = tokenizer_of(kind, parse_special_tokens=parse_special_tokens)
    return tokenizer, TextEncoder(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=texts, parse_special_tokens=st.booleans())
@settings(max_examples=300, deadline=None)
def test_ids_of_any_text_are_those_of_the_tokenizer(kind: str, texts: list[str], parse_special_tokens: bool) -> None:
    tokenizer, encoder = encoders(kind, parse_special_tokens)
    assert encoder.slow_reason is None
    assert encoder.encode(texts) == encode_texts(tokenizer, texts)

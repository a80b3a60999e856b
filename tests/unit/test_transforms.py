"""From rows to what a causal language model trains on."""

import numpy as np
import pytest

from dmagent_loader.errors import DecodeError
from dmagent_loader.transforms import ShiftedTokens, TokenizeText, packed_tokens


def test_packed_rows_become_inputs_and_labels():
    sample = packed_tokens({"__key__": "a", "input_ids.npy": np.array([5, 65_535], dtype=np.uint16)})
    assert sample["input_ids"].tolist() == sample["labels"].tolist() == [5, 65_535]


def test_text_is_cut_or_padded_and_padding_is_not_learnt():
    transform = TokenizeText(encode=lambda text: [ord(c) for c in text], length=3, pad_token=0)
    assert transform({"txt": "abcd"})["labels"].tolist() == [97, 98, 99]
    short = transform({"txt": "a"})
    assert short["input_ids"].tolist() == [97, 0, 0]
    assert short["attention_mask"].tolist() == [1, 0, 0]
    assert short["labels"].tolist() == [97, -100, -100]


def test_a_row_without_the_member_is_named():
    with pytest.raises(DecodeError, match=r"'k7' of 'source/a'.*\['txt'\].*--tokenizer"):
        packed_tokens({"__key__": "k7", "__domain__": "source/a", "txt": "x"})
    with pytest.raises(DecodeError, match="pass member="):
        TokenizeText(encode=list, length=1, pad_token=0)({"text": "x"})


@pytest.mark.parametrize(
    ("row", "labels", "mask"), [([1, 2, 3, 4], [2, 3, 4], [1, 1, 1]), ([1, 2, 3], [2, 3, 0], [1, 1, 0])]
)
def test_shifted_tokens_have_the_next_token_as_label_and_no_loss_without_one(row, labels, mask):
    shifted = ShiftedTokens(length=3)({"__key__": "a", "input_ids.npy": np.array(row, dtype=np.uint16)})
    assert shifted["tokens"].tolist() == [1, 2, 3]
    assert shifted["labels"].tolist() == labels
    assert shifted["loss_mask"].tolist() == mask
    assert shifted["position_ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", [2, 5])
def test_rows_of_another_length_are_refused(length):
    row = {"__key__": "k7", "__domain__": "source/a", "input_ids.npy": np.zeros(length, dtype=np.uint16)}
    with pytest.raises(DecodeError, match=rf"'k7' of 'source/a' has {length} tokens.*--sequence-length 4 \(or 3"):
        ShiftedTokens(length=3)(row)

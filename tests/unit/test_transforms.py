"""From rows to what a causal language model trains on."""

import re

import numpy as np
import pytest
import torch
from reading import quiet
from torch.utils.data import DataLoader

from dmagent_loader import AgentWeightedSampler
from dmagent_loader.errors import ConfigurationError, DecodeError
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import PACKED_MEMBER, ShiftedTokens, TokenizeText, collate_packed, packed_tokens


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_packed_rows_become_inputs_and_labels():
    sample = packed_tokens({"__key__": "a", "input_ids.npy": np.array([5, 65_535], dtype=np.uint16)})
    assert sample["input_ids"].tolist() == sample["labels"].tolist() == [5, 65_535]


def test_text_is_cut_or_padded_and_padding_is_not_learnt():
    transform = TokenizeText(encode=characters, length=3, pad_token=0, end_token=None)
    assert transform({"txt": "abcd"})["labels"].tolist() == [97, 98, 99]
    short = transform({"txt": "ab"})
    assert short["input_ids"].tolist() == [97, 98, 0]
    assert short["attention_mask"].tolist() == [1, 1, 0]
    assert short["labels"].tolist() == [97, 98, -100]


def test_documents_get_their_end_token_once(caplog):
    transform = TokenizeText(encode=characters, length=4, pad_token=0, end_token=9)
    assert transform({"txt": "ab"})["labels"].tolist() == [97, 98, 9, -100]
    assert transform({"txt": "ab\t"})["labels"].tolist() == [97, 98, 9, -100], "a tokenizer may append it itself"
    unknown = TokenizeText(encode=characters, length=4, pad_token=0)
    assert "the end-of-text token is unknown, so documents will not end: pass end_token=" in caplog.text
    assert unknown({"txt": "ab"})["labels"].tolist() == [97, 98, -100, -100]


def test_a_row_with_nothing_to_predict_is_named():
    """The loss of a batch of such rows is NaN, and so is the model after the step."""
    transform = TokenizeText(encode=characters, length=4, pad_token=0, end_token=9)
    assert transform({"txt": "a"})["labels"].tolist() == [97, 9, -100, -100]
    with pytest.raises(DecodeError, match=r"row 'k7' of 'source/a' has 1 token\(s\)"):
        transform({"__key__": "k7", "__domain__": "source/a", "txt": ""})
    with pytest.raises(ConfigurationError, match="length"):
        TokenizeText(encode=characters, length=1, pad_token=0, end_token=9)


def test_rows_that_are_cut_are_counted_and_logged(caplog):
    transform = TokenizeText(encode=characters, length=4, pad_token=0, end_token=9)
    for number in range(25):
        transform({"__key__": str(number), "__domain__": "source/a", "txt": "ab"})  # with its end token, it fits
        transform({"__key__": str(number), "__domain__": "source/a", "txt": "abcdefg"})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "row '0' of 'source/a' has 8 tokens and was cut to length=4; so far 1 of 2 rows" in messages[0]
    assert "so far 10 of 20 rows were cut in this process, 36.4% of their tokens lost" in messages[1]


def test_a_function_that_truncates_or_pads_is_refused():
    with pytest.raises(ConfigurationError, match="8 tokens for a text of 20 words, so it truncates below length=10"):
        TokenizeText(encode=lambda text: characters(text)[:8], length=10, pad_token=0, end_token=9)
    with pytest.raises(ConfigurationError, match="64 tokens for 'a', so it pads"):
        TokenizeText(encode=lambda text: (characters(text) + [0] * 64)[:64], length=10, pad_token=0, end_token=9)


def test_text_that_spells_the_end_token_is_refused_where_it_cannot_be_read_as_text():
    row = {"__key__": "k7", "__domain__": "source/a", "txt": "ab\tcd"}
    with pytest.raises(DecodeError, match=r"row 'k7' of 'source/a' spells the end-of-text token \(id 9\)"):
        TokenizeText(encode=characters, length=8, pad_token=0, end_token=9)(row)
    parsed = TokenizeText(encode=characters, length=8, pad_token=0, end_token=9, parse_special_tokens=True)
    assert parsed(row)["labels"].tolist() == [97, 98, 9, 99, 100, 9, -100, -100]


@pytest.mark.parametrize("end_token", [9, "tokenizer"])
@pytest.mark.parametrize("appended", [[7], [9, 7], [7, 9]])
def test_a_function_that_appends_other_tokens_than_the_end_token_is_refused(appended, end_token):
    """A document would end with them and the end token, where packing drops the first and the environment refuses."""

    def encode(text: str) -> list[int]:
        return [2, *characters(text), *appended]

    known = "has id 9" if end_token == 9 else "is unknown"
    with pytest.raises(ConfigurationError, match=rf"appends tokens of its own \({re.escape(str(appended))}\).*{known}"):
        TokenizeText(encode=encode, length=8, pad_token=0, end_token=end_token)
    left = TokenizeText(encode=encode, length=8, pad_token=0, end_token=None)({"txt": "a"})
    assert left["input_ids"].tolist() == ([2, 97, *appended] + [0] * 5)[:8]


def test_an_appended_token_that_ends_documents_can_be_named():
    def encode(text: str) -> list[int]:
        return [2, *characters(text), 7]

    with pytest.raises(ConfigurationError, match="end_token=7 if that token ends documents"):
        TokenizeText(encode=encode, length=8, pad_token=0, end_token=9)
    ended = TokenizeText(encode=encode, length=4, pad_token=0, end_token=7)({"txt": "a"})
    assert ended["labels"].tolist() == [2, 97, 7, -100]


@pytest.mark.parametrize("end", ["[EOS]", None])
def test_a_tokenizer_of_transformers_that_appends_another_token_is_refused(end):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[EOS]": 3, "a": 4}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end)
    with pytest.raises(ConfigurationError, match=r"appends tokens of its own \(\[2\]\)"):
        TokenizeText(encode=tokenizer.encode, length=8, pad_token=0)
    ended = TokenizeText(encode=tokenizer.encode, length=8, pad_token=0, end_token=2)({"txt": "a a"})
    assert ended["labels"].tolist() == [1, 4, 4, 2, *[-100] * 4]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    plain = TokenizeText(encode=encode, length=4, pad_token=0, end_token=3)({"txt": "a"})
    assert plain["labels"].tolist() == [4, 3, -100, -100]


def test_text_that_spells_a_special_token_is_text_for_tokenizers_of_transformers():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "<s>": 2, "a": 3, "<": 4, "/": 5, "s": 6, ">": 7}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    words.enable_truncation(4)
    words.enable_padding(length=4, pad_id=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="<s>")

    text = TokenizeText(encode=tokenizer.encode, length=8, pad_token=1)({"txt": "a</s>"})
    assert text["labels"].tolist() == [2, 3, 4, 5, 6, 7, 1, -100]
    parsed = TokenizeText(encode=tokenizer.encode, length=8, pad_token=1, parse_special_tokens=True)({"txt": "</s>a"})
    assert parsed["labels"].tolist() == [2, 1, 3, 1, -100, -100, -100, -100]


def test_a_row_without_the_member_is_named():
    with pytest.raises(DecodeError, match=r"'k7' of 'source/a'.*\['txt'\].*--tokenizer"):
        packed_tokens({"__key__": "k7", "__domain__": "source/a", "txt": "x"})
    with pytest.raises(DecodeError, match="pass member="):
        TokenizeText(encode=characters, length=2, pad_token=0, end_token=9)({"text": "x"})


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


def test_a_batch_collated_at_once_is_that_of_the_transform(tmp_path):
    shards = write_toy_shards(tmp_path, {"source/a": 12, "target/x": 12}, tokens=16)
    settings = {"samples_per_reweight": 8, "reading": quiet(tmp_path / "cache")}
    slow = DataLoader(AgentWeightedSampler(shards, transform=packed_tokens, **settings), batch_size=6)
    fast = DataLoader(AgentWeightedSampler(shards, **settings), batch_size=6, collate_fn=collate_packed)
    for one, other, _ in zip(slow, fast, range(3), strict=False):
        assert one["__key__"] == other["__key__"]
        assert one["__domain__"] == other["__domain__"]
        for name in ("input_ids", "labels", "__index__"):
            assert torch.equal(one[name], other[name])
    other["labels"][:] = -100
    assert (other["input_ids"] >= 0).all(), "labels that are masked in place must leave the tokens alone"


@pytest.mark.parametrize("narrow", [False, True])
def test_tokens_in_the_byte_order_of_another_machine_are_read(narrow):
    """numpy reads them, and so does a loader that converts row by row; torch has no such tensors."""
    tokens = np.array([7, 65_535], ">u2")
    rows = [{"__key__": "a", "__domain__": "source/a", "__index__": 0, PACKED_MEMBER: tokens}]
    batch = collate_packed(rows, narrow=narrow)
    assert batch["input_ids"].tolist() == [[7, 65_535]]
    assert batch["input_ids"].dtype == (torch.uint16 if narrow else torch.int64)
    assert ShiftedTokens(length=2)(rows[0])["tokens"].tolist() == [7, 65_535]


def test_labels_can_be_left_out():
    rows = [{"__key__": str(n), "__domain__": "source/a", "__index__": n, PACKED_MEMBER: np.arange(3)} for n in (3, 4)]
    whole, tokens = collate_packed(rows), collate_packed(rows, labels=False)
    assert whole.keys() - tokens.keys() == {"labels"}
    assert torch.equal(whole["input_ids"], tokens["input_ids"])


def rows_of_documents() -> list[dict]:
    """Documents that end with 9; in the last row, the first one contains it."""
    tokens = [[1, 2, 9, 3, 4], [9, 5, 9, 9, 6], [1, 9, 2, 9, 3]]
    rows = [{"__key__": str(n), "__domain__": "d", "__index__": n} for n in range(3)]
    rows = [row | {PACKED_MEMBER: np.array(ids, np.uint16)} for row, ids in zip(rows, tokens, strict=True)]
    rows[2][LENGTHS_MEMBER] = np.array([4, 1], np.uint32)
    return rows


def test_documents_of_a_row_can_be_kept_apart():
    batch = collate_packed(rows_of_documents(), end_token=9)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 0, 0], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 9, -100, 4], [-100, -100, 9, -100, -100], [-100, 9, 2, 9, -100]]
    assert batch["input_ids"].tolist() == [row[PACKED_MEMBER].tolist() for row in rows_of_documents()]
    plain = collate_packed(rows_of_documents(), end_token=9, labels=False)
    assert torch.equal(plain["position_ids"], batch["position_ids"])
    assert "labels" not in plain
    assert "position_ids" not in collate_packed(rows_of_documents())


def test_a_model_does_not_see_other_documents_of_the_row():
    """The model of transformers gives each document the logits that it has alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batch = collate_packed(rows_of_documents(), end_token=9)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits
        crossing = model(batch["input_ids"], use_cache=False).logits
        for row, first, last in ((0, 0, 3), (0, 3, 5), (1, 1, 3), (2, 0, 4)):
            alone = model(batch["input_ids"][row : row + 1, first:last], use_cache=False).logits[0]
            assert torch.allclose(packed[row, first:last], alone, atol=1e-5)
        assert not torch.allclose(crossing[0, 3:], packed[0, 3:], atol=1e-5)


def test_rows_of_different_lengths_make_no_batch():
    rows = [{"__key__": str(n), "__domain__": "source/a", "__index__": n, PACKED_MEMBER: np.arange(n)} for n in (3, 4)]
    with pytest.raises(DecodeError, match="different lengths \\('3' of 'source/a': 3"):
        collate_packed(rows)


def test_a_tokenizer_without_padding_is_refused_before_the_first_short_row():
    with pytest.raises(ConfigurationError, match=r"pad_token is None.*eos_token_id"):
        TokenizeText(encode=lambda text: [1], length=4, pad_token=None)
    for encode in (lambda text: {"input_ids": [1]}, lambda text: 7, lambda text: text):
        with pytest.raises(ConfigurationError, match="does not return a list of token ids"):
            TokenizeText(encode=encode, length=4, pad_token=0)


def test_rows_that_were_transformed_before_they_are_collated_are_named():
    row = {"__key__": "k", "__domain__": "source/a", "__index__": 0, "input_ids": [1], "labels": [1]}
    with pytest.raises(DecodeError, match=r"leave out the sampler's transform="):
        collate_packed([row])

"""Tokens of a pair; agreement with the harness itself is tested in tests/integration."""

from __future__ import annotations

import pytest

from dmagent_loader.environment.encoding import PairEncoder, request
from dmagent_loader.environment.questions import Question
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError

BOS, EOS = 1000, 1001


class Special:
    """A tokenizer of bytes that puts BOS in front, and EOS at the end if told to, like Hugging Face's."""

    bos_token_id, eos_token_id = BOS, EOS

    def __init__(self, *, add_eos: bool = False) -> None:
        self.add_eos = add_eos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        body = [BOS, *text[3:].encode()] if text.startswith("<s>") else list(text.encode())
        return [BOS, *body, *([EOS] if self.add_eos else [])] if add_special_tokens else body

    def decode(self, token: int) -> str:
        return {BOS: "<s>", EOS: "</s>"}[token]


class Merging:
    """Pairs of letters become one token, so that tokens can span the seam."""

    def __call__(self, text: str) -> list[int]:
        return [int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]


def split(encoded) -> tuple[list[int], list[int]]:
    tokens = encoded.tokens.tolist()
    return tokens[: -encoded.num_answer_tokens], tokens[-encoded.num_answer_tokens :]


def test_white_space_at_the_end_of_the_context_goes_to_the_answer():
    assert split(PairEncoder(Special()).encode("a \n", "b", "here")) == ([BOS, ord("a")], [*b" \nb"])


def test_context_and_answer_are_encoded_together():
    """Catches: encoding the two apart, which splits tokens that the model would see whole."""
    encoder = PairEncoder(Merging())
    whole = Merging()("abcdefg")

    assert split(encoder.encode("ab", "cdefg", "here")) == (whole[:1], whole[1:])
    assert split(encoder.encode("abc", "defg", "here")) == (Merging()("abc"), whole[2:])


@pytest.mark.parametrize(
    ("context", "answer", "expected"),
    [
        ("", "b", ([BOS], [ord("b")])),
        ("", "<s>b", ([BOS], [ord("b")])),
        ("<s>a", "b", ([BOS, ord("a")], [ord("b")])),
        (" ", "b", ([BOS], [*b" b"])),
    ],
)
def test_bos_stands_before_the_context_exactly_once(context, answer, expected):
    assert split(PairEncoder(Special()).encode(context, answer, "here")) == expected


def test_prefix_token_stands_in_for_an_empty_context():
    assert split(PairEncoder(lambda text: [*text.encode()], 7).encode("", "b", "here")) == ([7], [ord("b")])
    with pytest.raises(EnvironmentDataError, match=r"question in line 3 has no tokens.*pass prefix_token_id"):
        PairEncoder(lambda text: [*text.encode()]).encode("", "b", "line 3")


def test_tokenizer_that_ends_every_text_is_refused():
    """The harness would drop the answer's first token and score it after an EOS, without a word."""
    with pytest.raises(ConfigurationError, match="appends its EOS token"):
        PairEncoder(Special(add_eos=True))


def test_object_that_is_no_tokenizer_is_refused():
    with pytest.raises(ConfigurationError, match="a int cannot be used as a tokenizer"):
        PairEncoder(5)
    with pytest.raises(ConfigurationError, match="returned a list instead of token ids"):
        PairEncoder(lambda text: list(text))


@pytest.mark.parametrize(
    ("question", "answer", "separator", "expected"),
    [
        ("q", "a", " ", ("q", " a")),
        ("q", "a", "", ("q", "a")),
        ("def f():\n", "    pass", " ", ("def f():\n", "    pass")),
        ("q", "\na", " ", ("q", "\na")),
        ("q?\n", "a", "\nAnswer: ", ("q?\n", "\nAnswer: a")),
        ("", "a", " ", ("", "a")),
    ],
)
def test_separator_is_added_where_there_is_no_white_space_yet(question, answer, separator, expected):
    assert request(Question(question=question, answer=answer, origin="here"), separator) == expected

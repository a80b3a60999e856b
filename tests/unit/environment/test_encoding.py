"""Tokens of a pair; agreement with the harness itself is tested in tests/integration."""

from __future__ import annotations

import re

import pytest

from dmagent_loader.environment import Environment
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
    assert encoder.num_spanning == 0


def test_answer_that_shares_a_token_with_the_question_is_encoded_alone_and_counted():
    """The harness would drop "d" and score "efg", and it would score nothing at all of "d"."""
    encoder = PairEncoder(Merging())

    assert split(encoder.encode("abc", "defg", "here")) == (Merging()("abc"), Merging()("defg"))
    assert split(encoder.encode("abc", "d", "here")) == (Merging()("abc"), Merging()("d"))
    assert encoder.num_spanning == 2


def test_answer_encoded_alone_has_no_bos_in_front():
    encoder = PairEncoder(lambda text: [BOS, *Merging()(text)])
    assert split(encoder.encode("abc", "d", "here")) == ([BOS, *Merging()("abc")], Merging()("d"))


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


@pytest.mark.parametrize(
    ("tokenizer", "appended"),
    [
        (Special(add_eos=True), [EOS]),
        (lambda text: [BOS, *text.encode(), EOS], [EOS]),
        (lambda text: [*text.encode(), 7, EOS], [7, EOS]),
    ],
)
def test_tokenizer_that_ends_every_text_is_refused(tokenizer, appended):
    """The harness would drop the answer's first token and score it after an EOS, without a word."""
    with pytest.raises(ConfigurationError, match=re.escape(f"appends tokens of its own ({appended}) to every text")):
        PairEncoder(tokenizer)


def file_tokenizer():
    """A tokenizer of words of the tokenizers package, with the special token ``</s>``."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def truncating(tokenizer):
    tokenizer.enable_truncation(32)


def padding(tokenizer):
    tokenizer.enable_padding(length=64, pad_id=0)


@pytest.mark.parametrize("setting", [truncating, padding])
def test_truncation_and_padding_of_a_tokenizer_file_are_ignored(setting):
    """Only the first tokens of a long answer were scored, or a short one was said to have none."""
    question, answer = "a " * 20, "b " * 40
    tokenizer = file_tokenizer()
    setting(tokenizer)
    before = tokenizer.to_str()

    environment = Environment.from_pairs({"x": [(question, answer)]}, tokenizer, progress=False)

    assert split(environment._encoded[0]) == ([2] * 20, [3] * 40)
    assert tokenizer.to_str() == before, "the tokenizer of the caller keeps its settings"


@pytest.mark.parametrize("setting", [truncating, padding])
def test_function_that_truncates_or_pads_is_refused(setting):
    tokenizer = file_tokenizer()
    setting(tokenizer)
    with pytest.raises(ConfigurationError, match="so it pads" if setting is padding else "so it truncates"):
        Environment.from_pairs({"x": [("a " * 20, "b " * 40)]}, lambda text: tokenizer.encode(text).ids, progress=False)


def test_pairs_shorter_than_any_truncation_are_not_judged():
    """Twice a word may be one token as well."""
    Environment.from_pairs({"x": [("", "b")]}, lambda text: [1] * bool(text), prefix_token_id=0, progress=False)


def test_questions_that_spell_a_special_token_and_spanning_ones_are_counted(caplog):
    pairs = [("a </s>", "b"), ("a", "b"), ("a b", "b </s>")]
    Environment.from_pairs({"x": pairs}, file_tokenizer(), progress=False)
    assert "2 of 3 questions spell a special token" in caplog.text
    assert "spans" not in caplog.text
    Environment.from_pairs({"x": [("abc", "d"), ("ab", "cd")]}, Merging(), separator="", progress=False)
    assert "in 1 of 2 questions, one token spans" in caplog.text


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

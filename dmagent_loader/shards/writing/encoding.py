"""From texts to token ids, by the package tokenizers, or by tiktoken where it is proven to give the same ids."""

from __future__ import annotations

import importlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.writing.byte_level import (
    ByteLevelForm,
    NotProvenError,
    byte_level_form,
    differing_code_points,
    has_any,
)

_LONG_CHARACTERS = 2000
"""Mean length of texts from which the tokenizer is faster without offsets (benchmarks/encoding.py, tokenizers 0.23)."""
_BLANK_CHARACTERS = 1 << 14
"""With runs of more than some 100,000 spaces, the stack of tiktoken's regular expressions overflows."""
_OLDEST = (0, 13)
"""First version of tiktoken whose time does not grow with the square of the length of a word."""
_FIRST_COMPARED, _COMPARED_ONE_IN = 8, 1000
"""Texts that both packages encode: the first ones, and then one in so many."""
_RARE_LETTERS = "\ua66e\u16a0\U00010380"
"""Letters of Old Cyrillic, of runes, and of Ugaritic."""
LOSES_CHARACTERS = (
    "tokenizer %r has no token for characters that it does not know, so these are left out of documents: give it an "
    "unk_token or byte_fallback, or take another one"
)
_PARALLELISM_OFF = {"", "0", "f", "false", "n", "no", "off"}

_HARD_TEXTS = (
    "It's we'RE I'll they'Ve he'd 'S 'ſ 'T' ''s 'x d'm'M",
    "one  two   three \t four\n\n five \r\n\r\n \n six \u00a0\u2003\u3000 seven \u200b\u200d\ufeff eight   ",
    "\x00\x01\x1c\x1f\x7f\x80\x85\u2028\u2029 \x0b\x0c",
    "0 12 345 6789 12345678901234567890 3.14 1,000 ٠١٢٣ ०१२३ ⅷ½²③ 一二三 ๑๒๓",
    "naïve nai\u0308ve Ünïcödé İstanbul ıI ẞß ﬁ ﬆ ΣΑΣ Ǆ",
    "سلام عليكم नमस्ते 안녕하세요 \u1112\u1161\u11ab 日本語テキスト 漢字 ไทย עברית",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 e\u0301\u0302\u0303 \u0301x \U0001d54f \U00020000 \U0002ebf0 \U00031350 \U000e0067 \uf8ff",
    "def f(x):\n\treturn {**x, 'a': [1]}  # <|not|> </s> $$ \\frac{a}{b} --- ===== ...... !?!?",
    "a" * 300 + " " * 300 + "1" * 300 + "-" * 300 + "\n" * 300 + "ab " * 100 + " \n" * 100 + "é" * 300,
)

logger = logging.getLogger(__name__)


class Spelled:
    """Whether texts spell one of some tokens.

    Args:
        tokens: Texts of the tokens.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = sorted(tokens)
        self._pattern = re.compile("|".join(map(re.escape, tokens)))
        self._starts = {token[:2] for token in tokens}  # far faster to find than the pattern

    def in_text(self, text: str) -> bool:
        """Whether a text spells one of the tokens."""
        return any(start in text for start in self._starts) and self._pattern.search(text) is not None


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text by the package tokenizers, whole and without tokens added to it, in parallel.

    ``encode_batch_fast``, which makes no offsets, takes less time than ``encode_batch`` with long texts, but more with
    short ones.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
        texts: The texts.

    Raises:
        ConfigurationError: The tokenizer has no tokens for a text.
    """
    are_long = sum(map(len, texts)) > _LONG_CHARACTERS * len(texts)
    encode = tokenizer.encode_batch_fast if are_long else tokenizer.encode_batch
    try:
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]
    except Exception as error:
        if type(error) is not Exception:  # of the package
            raise
        if len(texts) > 1:
            for text in texts:
                encode_texts(tokenizer, [text])  # names the text
        raise ConfigurationError(
            f"the tokenizer has no tokens for the text that begins with {shown(texts[0][:60])} ({error}): give it a "
            "token for what it does not know (unk_token), or take another one"
        ) from error


def loses_characters(tokenizer: Any) -> bool:
    """Whether characters that a ``tokenizers.Tokenizer`` does not know have no token at all.

    A BPE model without ``unk_token``, whose tokens are not bytes, leaves them out.
    """
    try:  # not as a batch: threads before a fork make the package warn, and do without them afterwards
        return not any(tokenizer.encode(letter, add_special_tokens=False).ids for letter in _RARE_LETTERS)
    except Exception:  # such a text is an error
        return False


class TextEncoder:
    """The token ids of texts, whole and without tokens added to them.

    They are those of the package tokenizers. Where the package tiktoken is installed and proven to give the same ids,
    it makes them (see `byte_level`); where it could differ (texts that spell an added token, have code points of which
    the packages know different versions, or have very long runs of spaces), the package tokenizers does. The ids of the
    first texts, and then of one in 1,000, are compared.

    Args:
        tokenizer: A ``tokenizers.Tokenizer`` without truncation and padding, with its setting
            ``encode_special_tokens``.

    Attributes:
        slow_reason: Why the package tokenizers makes all ids; None: tiktoken makes most of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._seen = 0
        self.slow_reason: str | None = None
        try:
            tiktoken = importlib.import_module("tiktoken")
        except ImportError:
            self.slow_reason = "the package tiktoken, which would be several times faster, is not installed"
            return
        version = getattr(tiktoken, "__version__", "0.0")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
            self.slow_reason = (
                f"tiktoken {version} is not used, because it is slow with long words: install a newer one"
            )
            return
        try:
            self._start(tiktoken, byte_level_form(tokenizer))
        except NotProvenError as error:
            self.slow_reason = f"tiktoken is not used, because {error}"

    def _start(self, tiktoken: Any, form: ByteLevelForm) -> None:
        self._fast: Any = tiktoken.Encoding("", pat_str=form.split, mergeable_ranks=form.ranks, special_tokens={})
        self._ids, self._normalizes = form.ids, form.normalizes
        self._differing = differing_code_points(normalizes=form.normalizes)
        added = self._tokenizer.get_added_tokens_decoder().values()
        parses = not self._tokenizer.encode_special_tokens
        contents = {token.content for token in added if parses or not token.special}
        self._added = Spelled(contents | {unicodedata.normalize("NFC", content) for content in contents})
        own = encode_texts(self._tokenizer, _HARD_TEXTS)
        for text, ids in zip(_HARD_TEXTS, own, strict=True):
            if self._is_alike(text) and self._encode_fast(text) != ids:
                raise NotProvenError(f"its ids of {shown(text)} are others")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text; many are encoded in parallel.

        Raises:
            ConfigurationError: The packages give different ids.
        """
        if self.slow_reason is not None:
            return encode_texts(self._tokenizer, texts)
        alike = [self._is_alike(text) for text in texts]
        fast = iter(self._encode_all_fast([text for text, is_alike in zip(texts, alike, strict=True) if is_alike]))
        slow = iter(
            encode_texts(self._tokenizer, [text for text, is_alike in zip(texts, alike, strict=True) if not is_alike])
        )
        encoded = [next(fast) if is_alike else next(slow) for is_alike in alike]
        first, self._seen = self._seen, self._seen + len(texts)
        self._compare(
            [
                (text, ids)
                for number, text, ids in zip(range(first, self._seen), texts, encoded, strict=True)
                if number < _FIRST_COMPARED or number % _COMPARED_ONE_IN == 0
            ]
        )
        return encoded

    def _is_alike(self, text: str) -> bool:
        """Whether tiktoken is proven to give the ids of a text."""
        if not text.isascii():
            if has_any(text, self._differing):
                return False
            if self._normalizes and not unicodedata.is_normalized("NFC", text):
                return False
        blanks = range(0, len(text) - _BLANK_CHARACTERS, _BLANK_CHARACTERS)
        if any(text[start : start + _BLANK_CHARACTERS].isspace() for start in blanks):
            return False
        return not self._added.in_text(text)

    def _encode_fast(self, text: str) -> list[int]:
        ranks: list[int] = self._fast.encode_ordinary(text)
        ids = self._ids
        return ranks if ids is None else [ids[rank] for rank in ranks]

    def _encode_all_fast(self, texts: Sequence[str]) -> list[list[int]]:
        threads = min(_threads(), len(texts))
        if threads <= 1:
            return [self._encode_fast(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # of each call: a forked process has none of the threads
            return list(pool.map(self._encode_fast, texts))

    def _compare(self, compared: Sequence[tuple[str, list[int]]]) -> None:
        own = encode_texts(self._tokenizer, [text for text, _ in compared])
        for (text, ids), expected in zip(compared, own, strict=True):
            if ids != expected:
                raise ConfigurationError(
                    f"the package tiktoken gives other token ids than the tokenizer for the text that begins with "
                    f"{shown(text[:60])}, so earlier texts may have wrong ids, too: uninstall it (pip uninstall "
                    "tiktoken), and begin the job or run again without what it has written (for `dmagent shard` with "
                    "its .partial folder)"
                )


def _threads() -> int:
    """Threads of an encoder, by the settings of the package tokenizers; the workers of a job have one each."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() in _PARALLELISM_OFF:
        return 1
    chosen = os.environ.get("RAYON_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

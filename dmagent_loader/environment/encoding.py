"""Tokenization of questions, as in lm-evaluation-harness (0.4.13: ``_encode_pair`` and ``loglikelihood``).

Following the harness exactly lets tests compare log-likelihoods with it request by request. There is one exception:
where a token spans question and answer, the harness drops the beginning of the answer, or all of it. Here the answer is
then encoded alone, as the harness does for encoder-decoder models.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dmagent_loader._validation import added_tokens
from dmagent_loader.environment.questions import Question
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError

Tokens: TypeAlias = npt.NDArray[np.int64]
Tokenizer: TypeAlias = Any
"""A Hugging Face tokenizer, a ``tokenizers.Tokenizer``, or any callable from text to token ids."""

logger = logging.getLogger(__name__)

LEAST_LENGTH = 16
"""Tokens. Nobody truncates or pads to fewer, and a text of fewer may have as many tokens as twice the text: one."""

UNSET_LENGTH = 1 << 40
"""A Hugging Face ``model_max_length`` above this value means that no length is set."""


@dataclass(frozen=True, kw_only=True)
class EncodedQuestion:
    """Tokens of one pair.

    Args:
        tokens: (n,), context followed by continuation; the context has at least one token.
        num_answer_tokens: Number of trailing tokens that belong to the answer, at least 1.
    """

    tokens: Tokens
    num_answer_tokens: int


def request(question: Question, separator: str) -> tuple[str, str]:
    """The (context, continuation) of a pair, in the terms of lm-evaluation-harness.

    A white-space separator is dropped if the question is empty or ends with white space, or the answer begins with
    white space. Code that continues a function thus keeps its indentation.
    """
    seam = question.question[-1:] + question.answer[:1]
    if separator.isspace() and (not question.question or any(c.isspace() for c in seam)):
        separator = ""
    return question.question, separator + question.answer


class PairEncoder:
    """Encodes (context, continuation) pairs as tokens.

    Args:
        tokenizer: Hugging Face tokenizer, ``tokenizers.Tokenizer``, or callable from text to token ids.
        prefix_token_id: Token used in place of an empty context. None: the tokenizer's BOS token, else its EOS token.

    Raises:
        ConfigurationError: The tokenizer has an unsupported type, pads, or appends tokens to every text.

    Attributes:
        num_spanning: Requests so far in which a token spans question and answer.
        num_spelling_special_tokens: Requests so far whose text spells a special token, which thus becomes that token,
            as in the harness. A BOS token at the beginning does not count.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_token_id: int | None = None) -> None:
        encode = getattr(tokenizer, "encode", None)
        if not callable(encode) and not callable(tokenizer):
            raise ConfigurationError(
                f"a {type(tokenizer).__name__} cannot be used as a tokenizer: pass a Hugging Face tokenizer, a "
                "tokenizers.Tokenizer, or a callable from text to a list of token ids"
            )
        if getattr(tokenizer, "truncation", None) is not None or getattr(tokenizer, "padding", None) is not None:
            # A tokenizers.Tokenizer with settings in its file, which transformers ignores as well.
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            encode = tokenizer.encode
        self._encode: Callable[..., Any] = encode if callable(encode) else tokenizer
        self._knows_special_tokens = callable(encode) and _takes(encode, "add_special_tokens")
        self._prefix = prefix_token_id
        for name in ("bos_token_id", "eos_token_id"):
            if self._prefix is None:
                self._prefix = getattr(tokenizer, name, None)
        self._prefix_text: str | None = None
        if self._prefix is not None and hasattr(tokenizer, "bos_token_id") and hasattr(tokenizer, "decode"):
            self._prefix_text = str(tokenizer.decode(self._prefix))
        self._special_tokens = _special_tokens(tokenizer)
        self._may_truncate = not hasattr(tokenizer, "model_max_length")  # those of transformers do so on request only
        self._longest = "", 0
        self.num_spanning = 0
        self.num_spelling_special_tokens = 0
        added, probe = self._tokens(""), self._tokens("a")
        if len(probe) >= LEAST_LENGTH:
            raise ConfigurationError(
                f"the tokenizer returns {len(probe)} tokens for 'a', so it pads and padding would be scored: pass a "
                "function from text to its token ids alone"
            )
        self._added_before, appended = added_tokens(added, probe)
        if appended:
            raise ConfigurationError(
                f"the tokenizer appends tokens of its own ({appended}) to every text, so every question would end "
                "before its answer begins: pass a tokenizer with add_eos_token=False, or a function from text to token "
                "ids that adds none (tokenizer.encode with add_special_tokens=False)"
            )

    def encode(self, context: str, continuation: str, origin: str) -> EncodedQuestion:
        """Encodes one request.

        Trailing white space of the context moves to the continuation. Both are encoded together, then split at the
        number of tokens of the context alone. If these are not the first tokens of both, a token spans the boundary,
        and the continuation is encoded alone.

        Args:
            context: Question.
            continuation: Separator and answer.
            origin: Source of the pair, for error messages.

        Raises:
            EnvironmentDataError: The continuation has no tokens, or the context has none and there is no prefix token.
        """
        text = context + continuation
        if self._prefix_text:
            text = text.removeprefix(self._prefix_text)
        self.num_spelling_special_tokens += any(token in text for token in self._special_tokens)
        if context == "":
            before, after = [], self._tokens(continuation, add_special_tokens=False)
            if after and after[0] == self._prefix:
                before, after = after[:1], after[1:]
        else:
            stripped = context.rstrip()
            before, whole = self._tokens(stripped), self._tokens(context + continuation)
            after = whole[len(before) :]
            if not after or whole[: len(before)] != before:
                after = self._alone(context[len(stripped) :] + continuation)
                self.num_spanning += bool(after)
        if not after:
            raise EnvironmentDataError(
                f"the answer in {origin} has no tokens, so there is nothing to score: remove the row or write an answer"
            )
        if not before:
            if self._prefix is None:
                raise EnvironmentDataError(
                    f"the question in {origin} has no tokens, and the tokenizer has no BOS or EOS token to use "
                    "instead: write a question, or pass prefix_token_id"
                )
            before = [self._prefix]
        if len(before) + len(after) > self._longest[1]:
            self._longest = context + continuation, len(before) + len(after)
        return EncodedQuestion(tokens=np.array(before + after, dtype=np.int64), num_answer_tokens=len(after))

    def refuse_truncation(self) -> None:
        """Checks the longest request so far: twice its text has to give more tokens.

        Raises:
            ConfigurationError: It does not.
        """
        text, _ = self._longest
        length = len(self._tokens(text))
        if not self._may_truncate or length < LEAST_LENGTH:
            return
        if len(self._tokens(text + " " * (" " in text) + text)) <= length:
            raise ConfigurationError(
                f"the tokenizer returns {length} tokens for the longest pair of question and answer, and no more for "
                "twice its text, so it truncates and answers would be cut off: pass a function from text to "
                "all of its token ids"
            )

    def warn(self, num_requests: int) -> None:
        """Warns of requests that may not be read as their authors meant them.

        Args:
            num_requests: Number of all requests so far.
        """
        if self.num_spanning:
            logger.warning(
                "in %d of %d questions, one token spans the end of the question and the beginning of the answer, so "
                "the answer was encoded alone: separate them by white space if that matters",
                self.num_spanning,
                num_requests,
            )
        if self.num_spelling_special_tokens:
            logger.warning(
                "%d of %d questions spell a special token of the tokenizer, which reads it as that token and not as "
                "text: remove it if that is not intended",
                self.num_spelling_special_tokens,
                num_requests,
            )

    def _alone(self, text: str) -> list[int]:
        tokens = self._tokens(text, add_special_tokens=False)
        num_before = len(self._added_before)
        if not self._knows_special_tokens and tokens[:num_before] == self._added_before:
            return tokens[num_before:]
        return tokens

    def _tokens(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if not self._knows_special_tokens:
            return _token_ids(self._encode(text))
        if self._prefix_text is not None and text.startswith(self._prefix_text):
            add_special_tokens = False
        return _token_ids(self._encode(text, add_special_tokens=add_special_tokens))


def tokenizer_max_length(tokenizer: Tokenizer) -> int | None:
    """Maximum length of the tokenizer's model, in tokens; None: unknown."""
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and 0 < length < UNSET_LENGTH else None


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of a tokenizer's special tokens; none if it does not tell."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None and hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    return [token.content for token in added.values() if token.special] if isinstance(added, Mapping) else []


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _token_ids(encoded: Any) -> list[int]:
    """Token ids from a tokenizer's result: a list, an ``Encoding``, or a mapping with ``input_ids``."""
    if isinstance(encoded, Mapping):
        encoded = encoded["input_ids"]
    encoded = getattr(encoded, "ids", encoded)
    try:
        return [int(token) for token in encoded]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the tokenizer returned a {type(encoded).__name__} instead of token ids: it must return a list of integers"
        ) from error

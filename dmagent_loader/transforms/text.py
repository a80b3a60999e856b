"""Rows of text, tokenised one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch

from dmagent_loader._validation import added_tokens, shown, whole_number
from dmagent_loader.errors import ConfigurationError, DecodeError
from dmagent_loader.transforms.packed import IGNORED_LABEL

_LEAST_PADDED = 16
"""Tokens of the text "a" that only padding explains."""

logger = logging.getLogger(__name__)


@dataclass
class _Cuts:
    """Rows that were cut, in this process."""

    rows: int = 0
    cut_rows: int = 0
    tokens: int = 0
    cut_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenizeText:
    """Tokenises text rows, ended by the end-of-text token, cut and padded to a fixed length.

    Rows that are cut are counted in each process; the 1st, 10th, 100th, ... is logged with the share of tokens lost. To
    lose none, pack the documents (`PackText`, or ``dmagent shard --tokenizer``).

    Args:
        encode: Function from text to all of its token ids, for example ``tokenizer.encode`` of transformers.
        length: T, tokens of a row, at least 2.
        pad_token: Token id that fills short rows; for a tokenizer without one, that of the end-of-text token.
        member: Name of the text member.
        end_token: Token id that ends every document, unless `encode` has put it there. ``"tokenizer"``: the
            ``eos_token_id`` of the tokenizer whose method `encode` is; with another function, none, with a warning.
            None: no such token.
        parse_special_tokens: Whether text that spells a special token, such as ``<|endoftext|>``, becomes that token,
            as documents in a chat format need. False: it is text like any other if `encode` is a method of a tokenizer
            of transformers; with another function, a row with the end token in its middle is an error.

    Raises:
        ConfigurationError: `pad_token` is None, or `encode` does not return token ids, truncates, pads, or appends
            another token than `end_token` to every text.
    """

    encode: Callable[..., Sequence[int]]
    length: int
    pad_token: int
    member: str = "txt"
    end_token: int | Literal["tokenizer"] | None = "tokenizer"
    parse_special_tokens: bool = False
    _cuts: _Cuts = field(default_factory=_Cuts, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("length", self.length, least=2)
        if self.pad_token is None:
            raise ConfigurationError(
                "pad_token is None: the tokenizer has no padding token; pass the id of its end-of-text token "
                "(tokenizer.eos_token_id), the loss ignores padding"
            )
        whole_number("pad_token", self.pad_token, least=0)
        try:
            probe = self._encoded("a")
            valid = all(isinstance(token, Integral) for token in probe)
        except TypeError:
            valid = False
        if not valid:
            raise ConfigurationError(
                "encode does not return a list of token ids: pass tokenizer.encode of transformers, or a function from "
                "text to ids"
            )
        if len(probe) >= _LEAST_PADDED:
            raise ConfigurationError(
                f"encode returns {len(probe)} tokens for 'a', so it pads and padding would be trained on: pass a "
                "function without padding, TokenizeText pads"
            )
        if self.end_token is not None:
            self._find_end_token(added_tokens(self._encoded(""), probe)[1])
        if not self._is_method_of_transformers():  # whose encode truncates on request only, and warns of long texts
            found = len(self._encoded("a " * 2 * self.length))
            if found < self.length:
                raise ConfigurationError(
                    f"encode returns {found} tokens for a text of {2 * self.length} words, so it truncates below "
                    f"length={self.length} and most of a long document would be lost: pass a function without "
                    "truncation, TokenizeText cuts and counts"
                )

    def _find_end_token(self, appended: list[int]) -> None:
        """Sets the id of the end-of-text token.

        Args:
            appended: Tokens that `encode` appends to every text.
        """
        end_token = self.end_token
        if end_token == "tokenizer":
            end_token = getattr(getattr(self.encode, "__self__", None), "eos_token_id", None)
        if appended and appended != [end_token]:
            known = "is unknown" if end_token is None else f"has id {end_token}"
            meant = f"end_token={appended[0]} if that token ends documents; or " * (len(appended) == 1)
            raise ConfigurationError(
                f"encode appends tokens of its own ({appended}) to every text, but the end-of-text token {known}, so "
                f"documents would not end as packed ones do: pass {meant}a function that appends none, such as "
                "tokenizer.encode with add_special_tokens=False, and end_token= (its id); or end_token=None to leave "
                "the texts as encode ends them"
            )
        if end_token is None:
            logger.warning(
                "the end-of-text token is unknown, so documents will not end: pass end_token= (its id), or "
                "end_token=None if the function encode puts it there or it is not wanted"
            )
        else:
            whole_number("end_token", end_token, least=0)
        object.__setattr__(self, "end_token", end_token)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, all (T,) int64; labels of padding are -100.

        Raises:
            DecodeError: The row does not have the text member, has no next token to predict, or contains the end token.
        """
        row = f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r}"
        if self.member not in sample:
            raise DecodeError(
                f"{row} has no member {self.member!r}, only "
                f"{shown([name for name in sample if not name.startswith('__')])}: pass member="
            )
        ids = self._encoded(sample[self.member])
        if self.end_token is not None:
            assert self.end_token != "tokenizer"  # replaced at the start
            if not self.parse_special_tokens and self.end_token in ids[1:-1]:
                raise DecodeError(
                    f"{row} spells the end-of-text token (id {self.end_token}), so the document would end there: pass "
                    "tokenizer.encode of transformers itself, which can read it as text, or parse_special_tokens=True"
                )
            if ids[-1:] != [self.end_token]:
                ids.append(self.end_token)
        if len(ids) < 2:
            raise DecodeError(
                f"{row} has {len(ids)} token(s), so there is no next token to predict, and the loss of a batch of such "
                "rows is NaN: remove empty rows when the shards are written"
            )
        self._count(row, len(ids))
        ids = ids[: self.length]
        missing = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [self.pad_token] * missing),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
            "labels": torch.tensor(ids + [IGNORED_LABEL] * missing),
        }

    def _encoded(self, text: str) -> list[int]:
        if self._is_method_of_transformers():
            return list(self.encode(text, split_special_tokens=not self.parse_special_tokens))
        return list(self.encode(text))

    def _is_method_of_transformers(self) -> bool:
        return hasattr(getattr(self.encode, "__self__", None), "split_special_tokens")

    def _count(self, row: str, num_tokens: int) -> None:
        cuts = self._cuts
        cuts.rows += 1
        cuts.tokens += num_tokens
        if num_tokens <= self.length:
            return
        cuts.cut_rows += 1
        cuts.cut_tokens += num_tokens - self.length
        if cuts.cut_rows == 10 ** (len(str(cuts.cut_rows)) - 1):
            logger.warning(
                "%s has %d tokens and was cut to length=%d; so far %d of %d rows were cut in this process, %.1f%% of "
                "their tokens lost: pack the documents (pack=PackText(...), or dmagent shard --tokenizer) to lose none",
                row,
                num_tokens,
                self.length,
                cuts.cut_rows,
                cuts.rows,
                100 * cuts.cut_tokens / cuts.tokens,
            )

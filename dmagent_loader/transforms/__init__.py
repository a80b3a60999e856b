"""Conversions of decoded rows to the inputs of a causal language model.

Pass one as ``transform=`` of the sampler. For packed rows, `collate_packed` as ``collate_fn=`` of the loader is faster:
it converts a whole batch at once, and with ``decode="lazy"`` also reads it at once.
"""

from dmagent_loader.shards.writing.packing import PACKED_MEMBER
from dmagent_loader.transforms.packed import IGNORED_LABEL, ShiftedTokens, collate_packed, packed_tokens, widened
from dmagent_loader.transforms.text import TokenizeText

__all__ = [
    "IGNORED_LABEL",
    "PACKED_MEMBER",
    "ShiftedTokens",
    "TokenizeText",
    "collate_packed",
    "packed_tokens",
    "widened",
]

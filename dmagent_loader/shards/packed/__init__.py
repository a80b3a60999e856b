"""Packed rows of text shards, tokenised when they are read."""

from dmagent_loader.shards.packed.config import PackText
from dmagent_loader.shards.packed.rows import PackedRows, PackingAccount

__all__ = ["PackText", "PackedRows", "PackingAccount"]

"""Shards of text documents, and a tokenizer whose tokens are easy to predict."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dmagent_loader.shards import RawSample, decode_npy
from dmagent_loader.transforms import PACKED_MEMBER

END = "<|endoftext|>"
END_ID = 256


def byte_tokenizer(end: str = END) -> Tokenizer:
    """One token for each byte of the text, numbered by its place in the alphabet; `END_ID` ends documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    assert tokenizer.token_to_id(end) == END_ID
    return tokenizer


def write_documents(
    folder: Path, shards: Mapping[str, Sequence[Sequence[str | bytes]]], member: str = "txt"
) -> dict[str, list[str]]:
    """Writes shards of documents: domain -> for each shard, its texts."""
    paths: dict[str, list[str]] = {}
    for domain, of_domain in shards.items():
        home = Path(folder, *domain.split("/"))
        home.mkdir(parents=True, exist_ok=True)
        paths[domain] = [str(home / f"text-{number}.tar") for number in range(len(of_domain))]
        for path, texts in zip(paths[domain], of_domain, strict=True):
            with tarfile.open(path, "w") as tar:
                for number, text in enumerate(texts):
                    data = text if isinstance(text, bytes) else text.encode()
                    info = tarfile.TarInfo(f"{Path(path).stem}d{number}.{member}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


def random_documents(seed: int, count: int, longest: int) -> list[str]:
    """Texts of 0 to `longest` characters, some of several bytes."""
    rng = np.random.default_rng(seed)
    characters = np.array(list("abcdefgh \n☃é"))
    return ["".join(rng.choice(characters, rng.integers(0, longest + 1))) for _ in range(count)]


def joined(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens of documents, each with the end-of-text token behind it."""
    return [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False).ids, END_ID]]


def tokens_of(row: RawSample) -> list[int]:
    """The tokens of a packed row."""
    tokens: list[int] = decode_npy(row.members[PACKED_MEMBER]).tolist()
    return tokens

"""The kinds of input. The ending of a name decides; a name with any other ending is refused, with a remedy."""

from __future__ import annotations

import enum
import os
from collections.abc import Collection
from dataclasses import dataclass, field

from dmagent_loader.shards.sources.urls import base_name, is_local, local_path

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class Kind(enum.Enum):
    """How an input is read."""

    JSON = "JSON"
    CSV = "CSV"
    TEXT = "text"
    PARQUET = "parquet"
    ARROW = "arrow"
    TAR = "tar shard"
    MEGATRON = "Megatron tokens"
    MDS = "MDS folder"
    SAVED_DATASET = "saved data set"
    DATASET = "data set"


ENDINGS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), Kind.JSON),
    **dict.fromkeys((".csv", ".tsv"), Kind.CSV),
    ".parquet": Kind.PARQUET,
    **dict.fromkeys((".arrow", ".feather"), Kind.ARROW),
    ".tar": Kind.TAR,
    **dict.fromkeys((".bin", ".idx"), Kind.MEGATRON),
}
COMPRESSIBLE = (Kind.JSON, Kind.CSV, Kind.TEXT)

DATASET_PREFIX = "hf:"
READ = (
    "JSON lines, JSON arrays and CSV/TSV (.jsonl .ndjson .json .csv .tsv, also .gz .bz2 .xz .zst), .parquet, .arrow, "
    ".tar shards, Megatron's .bin/.idx, MDS folders, and data sets (hf:NAME, or a folder of save_to_disk)"
)

_NOT_DATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
"""Descriptions that the library datasets writes beside the data."""
_REMEDIES = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".tgz", ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2"), "unpack it"),
    **dict.fromkeys((".lz4", ".br", ".z", ".lzma", ".sz"), "compress it as .gz or .zst, or unpack it"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "export it as .csv"),
    **dict.fromkeys((".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite", ".duckdb"), "convert it to .parquet"),
    **dict.fromkeys(
        (".pdf", ".doc", ".docx", ".epub", ".html", ".htm", ".xml", ".warc", ".warc.gz"),
        "extract its text to JSON lines or parquet first",
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth", ".joblib"),
        "reading it can execute code; convert it to .parquet where you trust its author",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file, or a folder or data set that is read as one.

    Attributes:
        url: Path, fsspec URL, or ``hf:`` and a name.
        kind: How it is read.
        size: Stored bytes; 0 if unknown.
        version: Changes with the content: modification time, etag or the like.
    """

    url: str
    kind: Kind
    size: int = 0
    version: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """File name in lower case, without folders and the query of a URL."""
        return base_name(self.url).lower()

    @property
    def location(self) -> str:
        """The URL, or the real path of a local file, which may have several names."""
        if self.kind is Kind.DATASET or not is_local(self.url):
            return self.url
        return os.path.realpath(local_path(self.url))

    @property
    def compression(self) -> str:
        """``""``, or one of `COMPRESSIONS`."""
        return _compression(self.name) if self.kind in COMPRESSIBLE else ""


def kind_of_name(name: str, text_files: Collection[str] = ()) -> Kind | None:
    """The kind of a file by its name; None: it is not read.

    Args:
        name: File name, with or without folders.
        text_files: Endings, such as ``".txt"``, of files that are one text each.

    Example:
        >>> kind_of_name("c4-train.00000.json.gz"), kind_of_name("README.md")
        (<Kind.JSON: 'JSON'>, None)
    """
    lower = name.lower()
    if lower.rsplit("/", 1)[-1] in _NOT_DATA:
        return None
    compression = _compression(lower)
    stem = lower.removesuffix(compression)
    kind = next((kind for ending, kind in ENDINGS.items() if stem.endswith(ending)), None)
    if kind is None and stem.endswith(tuple(ending.lower() for ending in text_files)):
        kind = Kind.TEXT
    return kind if not compression or kind in COMPRESSIBLE else None


def remedy_for(name: str) -> str:
    """What to do about a file that is not read."""
    lower = name.lower()
    stem = lower.removesuffix(_compression(lower))
    for ending, remedy in _REMEDIES.items():
        if lower.endswith(ending) or stem.endswith(ending):
            return remedy
    if stem != lower and stem.endswith(tuple(ENDINGS)):
        return "unpack it: only JSON, CSV and text are read compressed"
    lower = stem
    ending = lower[lower.rfind(".") :] if "." in lower.rsplit("/", 1)[-1] else ""
    if ending:
        return f"convert it, or, for plain text, pass --text-files {ending} (text_files=): each file is one document"
    return "convert it, or give a plain text file an ending, such as .txt, and pass --text-files .txt (text_files=)"


def _compression(name: str) -> str:
    return next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")

"""``compositions.json``: the topics of each domain, as `dmagent compose` measured them, beside the manifest.

``{"schema": 1, "domains": {"source/web": {"counts": {"News": 120.0, ...}, "documents": 400, ...}}}``. A sampler that is
given the manifest takes the compositions by itself.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dmagent_loader._validation import is_count, is_finite_number, shown, without_repeats
from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.manifest import Manifest, beside, read_stored
from dmagent_loader.shards.sources.urls import display_url

COMPOSITIONS_NAME = "compositions.json"
START_STATE = "start state"
"""Name of the only entry in a file of `dmagent start-state`."""
SCHEMA = 1
LOW_COVERAGE = 0.5
"""Part of the documents with a topic, below which a composition says little about its domain."""

_COUNTS_TOLERANCE = 1e-3
"""Largest relative error of the sum of counts, which are rounded."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The topics of a sample of one domain.

    Attributes:
        counts: Topic -> number of documents; fractions where a label stands for several topics.
        intervals: Topic -> lowest and highest share, at 95% confidence.
        documents: Number of documents in the sample.
        unsure: Number of these whose topic is unknown; they are in no count.
        stated: Number of these whose label came with the data.
        error: Expected total variation between the shares of the sample and those of the domain.
        documents_needed: Number of documents with which `error` is expected to be as low as was asked for.
        classifier: Name and version of the classifier.
        shards: Digest of the domain's shards (`Manifest.digest`); "" if there is no manifest.
    """

    counts: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    documents: int
    unsure: int
    stated: int
    error: float
    documents_needed: int
    classifier: str
    shards: str

    @property
    def shares(self) -> dict[str, float]:
        """Topic -> share of the documents of known topic; they sum to 1."""
        total = sum(self.counts.values())
        return {topic: count / total for topic, count in self.counts.items()}

    @property
    def is_thin(self) -> bool:
        """Whether so few documents have a topic that the composition says little about its domain."""
        return self.documents - self.unsure < LOW_COVERAGE * self.documents

    @property
    def error_text(self) -> str:
        """The expected error, for messages."""
        return f"expected error {self.error:.3f}" if self.error else "no sampling error, since all documents were read"

    @property
    def source(self) -> str:
        """The origin of the composition, for messages."""
        known = self.documents - self.unsure
        text = f"measured on {known:,} documents by {self.classifier}, {self.error_text}"
        return text + (f", {self.unsure / self.documents:.0%} of the sample left out as unsure" if self.unsure else "")


def compositions_text(domains: Mapping[str, Composition]) -> str:
    """The text of the file."""
    entries = {name: asdict(composition) for name, composition in domains.items()}
    return json.dumps({"schema": SCHEMA, "domains": entries}, indent=1, ensure_ascii=False) + "\n"


def load_compositions(path: str | os.PathLike[str]) -> dict[str, Composition]:
    """Loads a file of compositions.

    Args:
        path: Path or fsspec URL of the file.

    Returns:
        Domain -> composition.

    Raises:
        ShardNotFoundError: There is no such file.
        ShardError: The file is not one of compositions, or has another schema.
    """
    url = os.fspath(path)
    try:
        return _parse(url, read_stored(url))
    except FileNotFoundError as error:
        raise ShardNotFoundError(f"there is no {display_url(url)}: `dmagent compose` writes it") from error
    except OSError as error:
        raise ShardError(f"{display_url(url)} cannot be read: {error}") from error


def load_start_state(path: str | os.PathLike[str]) -> Composition:
    """Loads the file of `dmagent start-state`.

    Raises:
        ShardNotFoundError: There is no such file.
        ShardError: It is another file.
    """
    found = load_compositions(path)
    if START_STATE not in found:
        raise ShardError(
            f"{display_url(os.fspath(path))} holds the compositions of {shown(list(found))}, not a start state: give "
            "the file that `dmagent start-state` wrote"
        )
    return found[START_STATE]


def compositions_of(
    shards: Mapping[str, Any], path: str | os.PathLike[str] | None = None, *, stated: Collection[str] = ()
) -> dict[str, Composition]:
    """The measured compositions of a run: of a file, and for the other domains of the file beside the manifest.

    Compositions of which it is known that they say little are left out, with a warning. Domains whose shards have
    changed since are warned of.

    Args:
        shards: Domains of the run; a manifest may have a file beside it.
        path: Path or URL of a file of compositions; None: only that beside the manifest.
        stated: Domains whose compositions come from the user; those in files do not matter.

    Raises:
        ShardNotFoundError: There is no file at `path`.
        ShardError: A file cannot be read, or that at `path` names no domain of the run.
    """
    found = _beside(shards) if isinstance(shards, Manifest) else {}
    if path is not None:
        given = load_compositions(path)
        if not given.keys() & shards.keys():
            raise ShardError(
                f"{display_url(os.fspath(path))} holds the compositions of {shown(list(given))}, none of which is a "
                f"domain of this run, {shown(list(shards))}: run `dmagent compose` on these shards"
            )
        found |= {name: (os.fspath(path), composition) for name, composition in given.items()}
    used: dict[str, Composition] = {}
    changed: dict[str, list[str]] = {}
    thin: dict[str, list[str]] = {}
    for name, (url, composition) in found.items():
        if name not in shards or name in stated:
            continue
        if composition.is_thin:
            thin.setdefault(url, []).append(name)
            continue
        if isinstance(shards, Manifest) and composition.shards not in ("", shards.digest(name)):
            changed.setdefault(url, []).append(name)
        used[name] = composition
    for url, names in changed.items():
        logger.warning(
            "the shards of %s have changed since %s was written, so its compositions may be wrong: run `dmagent "
            "compose` again",
            shown(names),
            display_url(url),
        )
    for url, names in thin.items():
        logger.warning(
            "most of the documents sampled of %s had no topic, so their compositions in %s are not used: measure them "
            "with another classifier (`dmagent compose --classifier`), or use them all the same by "
            "compositions={name: load_compositions(FILE)[name].shares} (dmagent_loader.shards)",
            shown(names),
            display_url(url),
        )
    return used


def _beside(manifest: Manifest) -> dict[str, tuple[str, Composition]]:
    """Domain -> file and composition, from beside a manifest; empty if there is no such file."""
    url = beside(manifest.url, COMPOSITIONS_NAME)
    try:
        data = read_stored(url)
    except FileNotFoundError:
        return {}
    except (OSError, ShardError) as error:  # object stores may refuse access to a file that does not exist
        logger.warning("%s is not used: it cannot be read (%s)", display_url(url), error)
        return {}
    return {name: (url, composition) for name, composition in _parse(url, data).items()}


def _parse(url: str, data: bytes) -> dict[str, Composition]:
    try:
        content = json.loads(data, object_pairs_hook=without_repeats)
        if content["schema"] != SCHEMA:
            raise ShardError(
                f"{display_url(url)} has schema {shown(content['schema'])}, but this version reads schema {SCHEMA}: "
                "run `dmagent compose` again"
            )
        return {str(domain): _composition(entry) for domain, entry in content["domains"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{display_url(url)} cannot be read as compositions ({type(error).__name__}: {error}): run `dmagent "
            "compose` again, or remove it"
        ) from error


def _composition(entry: Any) -> Composition:
    values = {field.name: entry[field.name] for field in fields(Composition)}
    counts, intervals = values["counts"], values["intervals"]
    if not all(is_finite_number(count) and count >= 0 for count in counts.values()) or not sum(counts.values()):
        raise ValueError(f"its counts are {shown(counts)}")
    if not all(is_count(values[name]) for name in ("documents", "unsure", "stated", "documents_needed")):
        raise ValueError("a number of documents is not a count")
    known = values["documents"] - values["unsure"]
    if values["stated"] > known or abs(sum(counts.values()) - known) > _COUNTS_TOLERANCE * known:
        raise ValueError(
            f"its counts of {sum(counts.values())} documents, {values['stated']} of them stated, are not those of "
            f"{known} documents of known topic"
        )
    if not is_finite_number(values["error"]) or not 0 <= values["error"] <= 1:
        raise ValueError(f"its error is {shown(values['error'])}")
    if not isinstance(values["classifier"], str) or not isinstance(values["shards"], str):
        raise ValueError("its classifier or the digest of its shards is not a text")
    values["intervals"] = {topic: (float(low), float(high)) for topic, (low, high) in intervals.items()}
    if not all(0 <= low <= high <= 1 for low, high in values["intervals"].values()):
        raise ValueError(f"its intervals are {shown(intervals)}")
    return Composition(**values)

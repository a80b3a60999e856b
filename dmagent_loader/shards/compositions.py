"""``compositions.json``: the topics of each domain, as `dmagent compose` measured them, beside the manifest.

``{"schema": 1, "domains": {"source/web": {"counts": {"News": 120.0, ...}, "documents": 400, ...}}}``. A sampler that is
given the manifest takes the compositions by itself.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
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
    def source(self) -> str:
        """The origin of the composition, for messages."""
        known = self.documents - self.unsure
        text = f"measured on {known:,} documents by {self.classifier}, expected error {self.error:.2f}"
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


def compositions_of(manifest: Manifest) -> dict[str, Composition]:
    """The compositions beside a manifest, of the domains that it lists; empty if there is no such file.

    Warns of domains whose shards have changed since their composition was measured, and of those of which it says
    little.

    Raises:
        ShardError: The file cannot be read.
    """
    url = beside(manifest.url, COMPOSITIONS_NAME)
    try:
        data = read_stored(url)
    except FileNotFoundError:
        return {}
    except (OSError, ShardError) as error:  # object stores may refuse access to a file that does not exist
        logger.warning("%s is not used: it cannot be read (%s)", display_url(url), error)
        return {}
    found = _parse(url, data)
    listed = {domain: composition for domain, composition in found.items() if domain in manifest}
    changed = [name for name, composition in listed.items() if composition.shards != manifest.digest(name)]
    if changed:
        logger.warning(
            "the shards of %s have changed since %s was written, so its compositions may be wrong: run `dmagent "
            "compose` again",
            shown(changed),
            display_url(url),
        )
    thin = [name for name, composition in listed.items() if composition.unsure > LOW_COVERAGE * composition.documents]
    if thin:
        logger.warning(
            "most of the documents sampled of %s had no topic, so their compositions stand for the rest only: measure "
            "them with another classifier (`dmagent compose --classifier`), or pass compositions=",
            shown(thin),
        )
    return listed


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
    if not is_finite_number(values["error"]) or not isinstance(values["classifier"], str):
        raise ValueError("its error is not a number, or its classifier not a name")
    values["intervals"] = {topic: (float(low), float(high)) for topic, (low, high) in intervals.items()}
    return Composition(**values)

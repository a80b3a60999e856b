"""The unfinished work of a job, in a hidden folder of its output, from which the same job goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmagent_loader._files import write_atomically
from dmagent_loader.shards.inputs.kinds import Input
from dmagent_loader.shards.inputs.tables import version_of
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.place import Place

_FOLDER = ".partial"
_PUBLISHED = "published.json"
_NOT_IDENTITY = ("max_bad", "skip_small", "tokenizer", "chat_template")
"""Settings that may differ when a job goes on: they change none of its rows, or `settings` has what they name."""

logger = logging.getLogger(__name__)


class Job:
    """Chunks and shards that are written, but not yet part of the output.

    Args:
        place: Where the shards are written.
        inputs: Domain -> its inputs.
        config: Settings.
        settings: What else decides the rows, such as the content of the tokenizer.

    Attributes:
        place: Where the shards are written.
        digests: Domain -> digest of the place of each of its inputs -> digest of all that decides its documents.
        folder: Folder of the work.
    """

    def __init__(
        self,
        place: Place,
        inputs: Mapping[str, Sequence[Input]],
        config: ShardingConfig,
        settings: Mapping[str, Any],
    ) -> None:
        chosen = {name: value for name, value in asdict(config).items() if name not in _NOT_IDENTITY}
        self.place = place
        self.digests = {
            domain: {
                _digest(item.location): _digest(
                    [item.location, item.kind.value, item.size, version_of(item), chosen, dict(settings)]
                )
                for item in items
            }
            for domain, items in inputs.items()
        }
        self.folder = (
            place.work / _FOLDER / _digest({domain: list(found.values()) for domain, found in self.digests.items()})
        )

    def announce(self) -> None:
        """Warns of unfinished work."""
        others = [path for path in self.folder.parent.glob("*") if path != self.folder]
        if others:
            logger.warning(
                "%s holds unfinished work of %d other job(s), with other inputs or settings, which goes on when they "
                "are run again: remove %s if they will not be",
                self.folder.parent.parent,
                len(others),
                ", ".join(map(str, others)),
            )
        if self.folder.exists():
            logger.warning("%s: an earlier call did not finish this job, which goes on where it stood", self.place)

    def new_inputs(self, domain: str, items: Sequence[Input], earlier: Mapping[str, str]) -> list[Input]:
        """The inputs of a domain that earlier jobs have not added.

        Args:
            domain: Name of the domain.
            items: Its inputs.
            earlier: Digests of those that were added, as in `digests`.
        """
        places = {_digest(item.location): item for item in items}
        new = {place: item for place, item in places.items() if earlier.get(place) != self.digests[domain][place]}
        if len(new) < len(places):
            logger.warning(
                "%s holds %d of %d input(s) of %s already, with these settings: they are not added again",
                self.place,
                len(places) - len(new),
                len(places),
                domain,
            )
        again = [item.url for place, item in new.items() if place in earlier]
        if again:
            logger.warning(
                "%s holds an earlier version of %d input(s) of %s, or rows of other settings, and all documents are "
                "added again, such as those of %s: give new documents in files of their own",
                self.place,
                len(again),
                domain,
                display_url(again[0]),
            )
        return list(new.values())

    def chunks(self, domain: str, items: Sequence[Input]) -> Path:
        """The folder of the chunks of these inputs of a domain, which is made.

        They are fewer if another job has added some since this one was killed.
        """
        return _made(self.folder / "chunks" / domain / _digest([item.location for item in items]))

    def shards(self, domain: str, first_shard: int, first_row: int) -> Path:
        """The folder of the shards of a domain with these first numbers, which is made.

        The numbers differ if another job has added shards since this one was killed.
        """
        return _made(self.folder / "shards" / domain / f"{first_shard}-{first_row}")

    def published(self) -> set[str]:
        """Files that this job has moved, or was about to move, to the output, relative to it."""
        path = self.folder / _PUBLISHED
        return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()

    def publish(self, names: Iterable[str]) -> None:
        """Notes files that are about to be moved to the output."""
        write_atomically(self.folder / _PUBLISHED, json.dumps(sorted(names)).encode())

    @property
    def has_work(self) -> bool:
        """Whether there is anything to go on with."""
        return any(path.suffix in (".safetensors", ".tar") for path in self.folder.rglob("*"))

    def remove(self) -> None:
        """Removes the work, and the folder of all jobs if it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        parent = self.folder.parent
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

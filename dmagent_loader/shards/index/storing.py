"""Writes the indexes of shards to their store: first those of all shards of a folder, then its table."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Mapping

from dmagent_loader.shards.index.catalogue import Catalogue
from dmagent_loader.shards.index.overview import KnownShard
from dmagent_loader.shards.index.stored import StoredIndexes, can_be_stored
from dmagent_loader.shards.index.threads import in_threads
from dmagent_loader.shards.sources.listing import REQUESTS_IN_FLIGHT
from dmagent_loader.shards.sources.urls import base_name, display_url

_ATTEMPTS = 4
"""To change a table that other processes change, too."""

logger = logging.getLogger(__name__)


def write_indexes(catalogue: Catalogue, stored: StoredIndexes) -> int:
    """Writes the index of every intact shard that has a name, and the tables of their folders.

    Entries of other shards stay in the tables.

    Args:
        catalogue: The shards.
        stored: Where to.

    Returns:
        Number of shards whose index was written.

    Raises:
        ConfigurationError: They cannot be written.
    """
    folders: dict[str, list[int]] = defaultdict(list)
    nameless = 0
    for number in range(len(catalogue)):
        url = catalogue.url(number)
        if not can_be_stored(url):
            nameless += 1
        elif number not in catalogue.damage:
            folders[stored.folder(url)].append(number)
    if nameless:
        logger.warning(
            "%d shard(s) are named by the query of their URL, so their indexes have no names and are left out: each "
            "start reads these shards through where they are not in its cache; give them URLs that end in a file name",
            nameless,
        )
    written = 0
    for folder, numbers in folders.items():
        entries: dict[str, KnownShard | None] = {}
        store = in_threads(lambda n: catalogue.store_index(n, stored), numbers, threading.Event(), REQUESTS_IN_FLIGHT)
        for number, known in store:
            entries[base_name(catalogue.url(number))] = known
            if known is None:
                logger.warning(
                    "shard %s has changed while its index was written: it is left out; index it again when nobody "
                    "writes it any more",
                    display_url(catalogue.url(number)),
                )
            else:
                written += 1
        _update_table(stored, folder, entries)
    return written


def _update_table(stored: StoredIndexes, folder: str, entries: Mapping[str, KnownShard | None]) -> None:
    """Changes entries of a table, and does so again if another process has overwritten them meanwhile.

    Stores have no locks: a process that reads the table before these entries are there, and writes it after the last
    look here, still removes them.

    Args:
        stored: Where the table is.
        folder: Folder of the table.
        entries: New entries; None removes one.

    Raises:
        ConfigurationError: The table cannot be read or written.
    """
    for _ in range(_ATTEMPTS):
        table = stored.table(folder)
        changed = {name: known for name, known in {**table, **entries}.items() if known is not None}
        if changed == table:
            return
        stored.save_table(folder, changed)
    if any(stored.table(folder).get(name) != known for name, known in entries.items()):
        logger.warning(
            "the table of indexes of %s does not keep its new entries, as where other processes write it all the time: "
            "a start reads the shards of missing entries through; write the indexes again when nobody else does",
            display_url(folder),
        )

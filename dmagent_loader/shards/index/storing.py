"""Writes the indexes of shards to their store: first those of all shards of a folder, then its table."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict

from dmagent_loader.shards.index.catalogue import Catalogue
from dmagent_loader.shards.index.stored import StoredIndexes, can_be_stored
from dmagent_loader.shards.index.threads import in_threads
from dmagent_loader.shards.sources.listing import REQUESTS_IN_FLIGHT
from dmagent_loader.shards.sources.urls import base_name, display_url

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
        table = stored.table(folder)
        store = in_threads(lambda n: catalogue.store_index(n, stored), numbers, threading.Event(), REQUESTS_IN_FLIGHT)
        for number, known in store:
            name = base_name(catalogue.url(number))
            if known is None:
                table.pop(name, None)
                logger.warning(
                    "shard %s has changed while its index was written: it is left out; index it again when nobody "
                    "writes it any more",
                    display_url(catalogue.url(number)),
                )
            else:
                table[name] = known
                written += 1
        stored.save_table(folder, table)
    return written

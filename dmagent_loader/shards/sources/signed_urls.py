"""Newer URLs of shards, for a running job whose signatures have expired."""

from __future__ import annotations

import functools
import os

from dmagent_loader._validation import read_regular
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.sources.urls import with_long_host, without_signature

SIGNED_URLS_VARIABLE = "DMAGENT_SIGNED_URLS"
"""Names a file with URLs of shards, one a line."""
_MAX_SIGNED_URLS_BYTES = 1 << 30


def newest_url(url: str) -> str | None:
    """The URL of a shard in the file of signed URLs; None if there is none, or the file is not written yet.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    path = os.environ.get(SIGNED_URLS_VARIABLE)
    if not path:
        return None
    try:
        return _signed_urls(path, os.stat(path).st_mtime_ns).get(without_signature(url))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{SIGNED_URLS_VARIABLE} names {path}, which cannot be read ({error}): write the URLs of the shards there, "
            "one a line"
        ) from error


@functools.lru_cache(maxsize=1)
def _signed_urls(path: str, time_ns: int) -> dict[str, str]:
    """The URLs in a file that was written at some time, by their identities."""
    lines = read_regular(path, _MAX_SIGNED_URLS_BYTES).decode("utf-8").splitlines()
    urls = [with_long_host(line.strip()) for line in lines]  # as those of the shards are
    return {without_signature(url): url for url in urls}

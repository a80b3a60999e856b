"""Expansion of paths, URLs and patterns to the list of shards of a domain."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import braceexpand

from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError, ShardNotFoundError
from dmagent_loader.shards.sources.remote import remote_info, remote_names
from dmagent_loader.shards.sources.urls import (
    HTTP,
    INDEX_SUFFIX,
    IPV6_HOST,
    display_url,
    is_local,
    local_path,
    protocol,
    query_parameters,
    split_chain,
    with_long_host,
    without_signature,
)

_GLOB = re.compile(r"[*?\[]")
_REMOTE_GLOB = re.compile(r"[*\[]")
"""Without ``?``, which begins the query of a URL."""
_RANGE = re.compile(r"\{([+-]?\d{1,18})\.\.([+-]?\d{1,18})(?:\.\.([+-]?\d{1,18}))?\}")
_PROTOCOL = re.compile(r"[a-z][a-z0-9_+-]*")
_JOINT = re.compile(r"::(?![0-9A-Fa-f:.]*\])")
"""Between joined patterns, and not in the IPv6 address of a host."""
_LISTED_FROM = 64
"""Files of a domain from which on their folders are listed."""
MAX_SHARDS = 10_000_000
"""Limit for one pattern: ten times the number of shards that the loader was measured with."""

ShardPatterns = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def expand_domains(shards: Mapping[str, ShardPatterns]) -> Iterator[tuple[str, list[str]]]:
    """Each domain with its shards (`expand_shards`). Only one list is in memory at a time.

    Args:
        shards: Domain name -> path, URL or pattern, or several of them.

    Raises:
        ConfigurationError: Shards of two domains differ only in a part of their URLs that does not name a shard.
    """
    listed = {domain: _patterns(patterns) for domain, patterns in shards.items()}
    # A million shards are not remembered where no query could name one.
    names_by_query = any(map(_has_parameters, itertools.chain.from_iterable(listed.values())))
    first_use: dict[str, tuple[str, list[str]]] = {}
    for domain, patterns in listed.items():
        urls = expand_shards(domain, patterns)
        for url in urls if names_by_query else ():
            if not is_local(url):
                parameters = query_parameters(url)
                other, others = first_use.setdefault(without_signature(url), (domain, parameters))
                if parameters != others:
                    raise _differing_queries(f"domains {other!r} and {domain!r} list shards", url, parameters, others)
        yield domain, urls


def _patterns(shards: ShardPatterns) -> list[Any]:
    """The entries of a domain, of any type."""
    return [shards] if isinstance(shards, (str, os.PathLike)) or not isinstance(shards, Iterable) else list(shards)


def _has_parameters(pattern: object) -> bool:
    """Whether the query of a pattern has parameters, other than those of signatures, that may name a shard."""
    return isinstance(pattern, str) and "?" in pattern and any(map(query_parameters, _JOINT.split(pattern)))


def expand_shards(domain: str, shards: ShardPatterns) -> list[str]:
    """Lists the shards of one domain, in order.

    Brace notation is expanded as webdataset does (``a-{000..015}.tar``, ``{a,b}.tar``, several patterns joined by
    ``::``). Paths and URLs may also be globs (without ``?`` in URLs), or folders, which stand for their ``*.tar``; the
    URL of a folder ends with a slash. Both are sorted, and globs leave out the indexes beside shards. A pattern that is
    the exact name of a local file, or with ``[`` of one in an object store, stands for this file. In front of a URL,
    ``::`` chains filesystems of fsspec, as in ``simplecache::https://host/a.tar``.

    Args:
        domain: Name of the domain, for messages.
        shards: A path, URL or pattern, or several of them.

    Raises:
        ConfigurationError: An entry is a shell pipe, or neither path nor URL; a shard is listed twice; or a pattern
            names far too many shards.
        ShardNotFoundError: A pattern matches no file.
        ShardError: A store cannot be listed.

    Example:
        >>> expand_shards("source/web", "s3://corpus/web-{00..02}.tar")
        ['s3://corpus/web-00.tar', 's3://corpus/web-01.tar', 's3://corpus/web-02.tar']
    """
    urls: list[str] = []
    real_path = _RealPaths()
    for pattern in _patterns(shards):
        path = os.fspath(pattern) if isinstance(pattern, os.PathLike) else pattern
        if not isinstance(path, str):
            raise ConfigurationError(
                f"domain {domain!r} lists {shown(pattern)} as its shards: give it a path, a URL or a pattern, or a "
                "list of these"
            )
        urls.extend(_expand_one(domain, path, real_path))
    if not urls:
        raise ShardNotFoundError(f"domain {domain!r} lists no shards: give it a path, a URL or a pattern")
    if real_path.are_distinct(urls):
        return urls
    first_use: dict[str, str] = {}
    real_path.lists_folders = len(urls) >= _LISTED_FROM
    for url in urls:
        if "://" not in url:  # faster than `is_local`
            identity = real_path(url)
        else:
            identity = real_path(local_path(url)) if is_local(url) else without_signature(url)
        if identity in first_use:
            parameters, others = query_parameters(url), query_parameters(first_use[identity])
            if parameters != others and not is_local(url):
                raise _differing_queries(f"domain {domain!r} lists shards", url, parameters, others)
            raise ConfigurationError(
                f"domain {domain!r} lists shard {display_url(url)} twice (also as "
                f"{display_url(first_use[identity])}), so its rows would be trained on twice per epoch: list every "
                "shard once"
            )
        first_use[identity] = url
    return urls


def _differing_queries(
    lists_shards: str, url: str, parameters: Sequence[str], others: Sequence[str]
) -> ConfigurationError:
    """Makes the error for two shards that would be taken for one."""
    # What has no name may be a token.
    names = sorted({parameter.split("=")[0] for parameter in {*parameters} ^ {*others} if "=" in parameter})
    shown_names = f" ({', '.join(names)})" if names else ""
    return ConfigurationError(
        f"{lists_shards} whose URLs differ only in the query of {display_url(url)}{shown_names}: where the "
        "path ends in .tar it names the shard, so the rows of one would be read in place of the other's; use URLs "
        "with a path of its own for each shard (https://host/1.tar), or one that does not end in .tar "
        "(https://host/get?file=1.tar)"
    )


class _RealPaths:
    """`os.path.realpath` of files; the real paths of their folders, which take most of the time, are remembered.

    Attributes:
        lists_folders: Find out which files are links by listing their folders, which is faster for many files.
    """

    def __init__(self) -> None:
        self.lists_folders = False
        self._folders: dict[str, tuple[str, set[str] | None]] = {}
        """Real path and links of each folder; no links are known of one that was not listed. The path of a folder ends
        with a slash, and that of the working folder is empty."""

    def tars_of(self, folder: str) -> list[str]:
        """Sorted paths of the ``*.tar`` in a folder."""
        names, links = [], set()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.endswith(".tar"):
                    names.append(name)
                if entry.is_symlink():
                    links.add(name)
        prefix = os.path.join(folder, "")
        self._folders[prefix] = os.path.join(os.path.realpath(folder), ""), links
        return [prefix + name for name in sorted(names)]

    def are_distinct(self, urls: Sequence[str]) -> bool:
        """Whether all are different files because they were listed in different folders without links."""
        folders = {url[: url.rfind(os.sep) + 1] for url in urls}
        listed = [self._folders[folder] for folder in folders if folder in self._folders]
        return (
            len(listed) == len(folders) == len({real for real, _ in listed})
            and all(links == set() for _, links in listed)
            and len(set(urls)) == len(urls)
        )

    def __call__(self, path: str) -> str:
        begin = path.rfind(os.sep) + 1
        folder, name = path[:begin], path[begin:]
        if folder not in self._folders:
            real = os.path.realpath(folder or os.curdir)
            self._folders[folder] = os.path.join(real, ""), _links(real) if self.lists_folders else None
        real, links = self._folders[folder]
        file = real + name
        is_link = os.path.islink(file) if links is None else name in links
        return os.path.realpath(file) if is_link else file


def _links(folder: str) -> set[str] | None:
    """Names of the links in a folder; None if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:
        return None


def _expand_one(domain: str, pattern: str, real_path: _RealPaths) -> list[str]:
    if re.match(r"^\s*(pipe:|\|)", pattern):
        raise ConfigurationError(
            f"domain {domain!r}: {display_url(pattern)!r} would run a shell command; commands are never run from a "
            "shard list: use a local path or an fsspec URL (s3://, gs://, https://, ...)"
        )
    if is_local(pattern) and os.path.isfile(local_path(pattern)):
        return [pattern]
    urls: list[str] = []
    _refuse_too_many(domain, pattern)
    for part in _joined_patterns(pattern):
        try:
            expanded = list(braceexpand.braceexpand(part))
        except ValueError:  # its text has the pattern as it is, with any signature
            raise ConfigurationError(
                f"domain {domain!r}: the braces in {display_url(part)!r} do not match: open and close each"
            ) from None
        for url in expanded:
            urls.extend(
                _local_matches(domain, pattern, url, real_path) if is_local(url) else _remote_matches(domain, url)
            )
    return urls


def _joined_patterns(pattern: str) -> Iterator[str]:
    """The patterns that ``::`` joins; it also stands behind each filesystem that a URL is read through."""
    chain = ""
    for part in _JOINT.split(pattern):
        if _PROTOCOL.fullmatch(part) and not os.path.exists(part):
            chain += f"{part}::"
        else:
            yield chain + part
            chain = ""
    if chain:
        yield chain.removesuffix("::")


def _refuse_too_many(domain: str, pattern: str) -> None:
    count = 1
    for first, last, step in _RANGE.findall(pattern):
        count *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
        if count > MAX_SHARDS:
            raise ConfigurationError(
                f"domain {domain!r}: the ranges in {display_url(pattern)!r} name more than {MAX_SHARDS:,} shards: "
                "check their ends"
            )


def _local_matches(domain: str, pattern: str, url: str, real_path: _RealPaths) -> list[str]:
    path = local_path(url)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        matches = real_path.tars_of(path)
        if not matches:
            raise ShardNotFoundError(
                f"domain {domain!r}: the folder {path!r} holds no *.tar file (pattern {display_url(pattern)!r})"
            )
        return matches
    matches = _without_indexes(sorted(glob.glob(path, recursive=True))) if _GLOB.search(path) else []
    if not matches:
        detail = "" if url == pattern else f" (from the pattern {display_url(pattern)!r})"
        raise ShardNotFoundError(
            f"domain {domain!r}: no shard matches {path!r}{detail}, seen from {os.getcwd()!r}; check the path, or "
            "leave it out"
        )
    return matches


def _is_file(url: str) -> bool:
    """Whether a store has a file with exactly this name, although it could be a pattern.

    Raises:
        ShardError: The store cannot be reached.
    """
    try:
        return bool(remote_info(split_chain(url)[1]).get("type") == "file")
    except ShardNotFoundError:
        return False


def _without_indexes(matches: list[str]) -> list[str]:
    """The matches of a pattern that are no indexes, which may lie beside shards."""
    return [match for match in matches if not match.endswith(INDEX_SUFFIX)]


def _remote_matches(domain: str, url: str) -> list[str]:
    try:
        urlsplit(url).geturl().encode()
    except ValueError:  # its text may show a password
        raise ConfigurationError(
            f"domain {domain!r} lists {display_url(url)!r}, which is no URL: its host or a character in it is not valid"
        ) from None
    url = with_long_host(url)
    is_http = protocol(url) in HTTP
    if is_http and "#" in url:
        raise ConfigurationError(
            f"domain {domain!r} lists {display_url(url)!r} with a '#' behind it, and no server receives what follows a "
            "'#' in a URL: write %23 where the name of the file has one, or leave it out"
        )
    address, mark, _ = url.partition("?")
    is_pattern = _REMOTE_GLOB.search(IPV6_HOST.sub("", address)) is not None
    if not is_pattern and not address.endswith("/"):
        return [url]
    if mark or is_http:
        raise ConfigurationError(
            f"domain {domain!r}: {display_url(url)!r} has a wildcard or is a folder, which only local paths and object "
            "stores may have: use brace notation, for example shard-{000..015}.tar, or a list"
        )
    if "[" in address and _is_file(url):
        return [url]
    matches = _without_indexes(remote_names(url if is_pattern else f"{url}*.tar"))
    if not matches:
        raise ShardNotFoundError(f"domain {domain!r}: no shard matches {display_url(url)!r}: check it, or leave it out")
    return matches

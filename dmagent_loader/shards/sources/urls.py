"""Paths and URLs: their parts, the identity of a remote file, and how they are shown."""

from __future__ import annotations

import contextlib
import os
import re
from ipaddress import IPv6Address
from urllib.parse import unquote, urlsplit

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(?=//)")
_CHAIN = re.compile(r"^((?:[a-z][a-z0-9_+-]*::)+)(?=[A-Za-z][A-Za-z0-9+.-]*://)")
"""The filesystems of fsspec that a URL is read through, such as ``simplecache::``."""
HTTP = ("http", "https")
INDEX_SUFFIX = ".index"
"""Ending of the file of an index beside its shard; no pattern of shards matches it."""
IPV6_HOST = re.compile(r"(?<=://)[^/?#\[]*\[([0-9A-Fa-f:.]+)\]")
_VERSION = re.compile(r"(?i)versionid|version|generation|snapshot")
_NOT_OF_SIGNATURE = re.compile(
    r"(?i)(?!x-(?:amz|goog|oss|cos)-|q-|(?:x-id|signature|expires|policy|awsaccesskeyid|googleaccessid|ossaccesskeyid"
    r"|key-pair-id|sig|se|sp|sv|sr|st|spr|sip|ske|skoid|sks|skt|sktid|skv|token|security-token)$).+"
)
"""Parameters of a query other than those of signatures of S3, CloudFront, GCS, Azure and their kin."""
_URL = re.compile(r"(?:[a-z][a-z0-9_+-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(
    r"(?<=://)(?!(?:(?<=abfs://)|(?<=abfss://)|(?<=az://)|(?<=adl://))[a-z0-9$-]{3,63}@[\w.-]{1,255}(?:[/?]|:?(?:\s|$)))"
    r"(?!\[[0-9A-Fa-f:.%]+\](?:[:/]|$))(?:[^/?#\n]{0,4096}|[^/?#\s:]{0,4096}:(?!\d+(?:[/?#]|$))\S{0,4096})@"
)
"""User and password in front of a host; what looks like a port, but is no number, is the beginning of a password.
In URLs of Azure, the name of a container stands there, which is shown. Limits here and below keep the time down for a
text of any length."""
_QUERY = re.compile(r"(://[^?:]*(?::(?!//)[^?:]*)*)\?(?:.{0,16384}[=&])?\S*?(?=['\"\])>.,:;]*(?:\s|$))", re.DOTALL)
"""The query of a URL in a text, up to the last word that may be a parameter."""
_FRAGMENT = re.compile(r"(\bhttps?://[^\s#]*)#[^\s'\"]*")


def is_local(url: str) -> bool:
    """Whether the URL is a path or ``file://``."""
    if "://" not in url:  # faster than the pattern, and asked several times for each of a million shards
        return True
    scheme = _SCHEME.match(url)
    return scheme[1].lower() == "file" if scheme is not None else _CHAIN.match(url) is None


def split_chain(url: str) -> tuple[str, str]:
    """The filesystems that a URL is read through, and the URL of the file.

    Example:
        >>> split_chain("simplecache::s3://bucket/a.tar")
        ('simplecache::', 's3://bucket/a.tar')
    """
    chain = _CHAIN.match(url)
    return (chain[1], url[chain.end() :]) if chain is not None else ("", url)


def protocol(url: str) -> str:
    """The protocol of the store that holds the file of a URL, in lower case."""
    return split_chain(url)[1].split("://", 1)[0].lower()


def with_long_host(url: str) -> str:
    """The URL with an IPv6 address as its host written out, because fsspec takes ``::`` for a chain.

    Example:
        >>> with_long_host("http://[::1]:8000/a.tar")
        'http://[0000:0000:0000:0000:0000:0000:0000:0001]:8000/a.tar'
    """
    host = IPV6_HOST.search(url)
    if host is not None and "::" in host[1]:
        with contextlib.suppress(ValueError):  # it is no address, which is said where it is opened
            return f"{url[: host.start(1)]}{IPv6Address(host[1]).exploded}{url[host.end(1) :]}"
    return url


def for_fsspec(url: str) -> str:
    """The URL in the form that fsspec takes: with a long host (`with_long_host`), and its protocol in lower case.

    Example:
        >>> for_fsspec("simplecache::HTTPS://host/a.tar")
        'simplecache::https://host/a.tar'
    """
    chain, address = split_chain(with_long_host(url))
    scheme, mark, rest = address.partition("://")
    return f"{chain}{scheme.lower()}{mark}{rest}" if mark else url


def local_path(url: str) -> str:
    """The path of a local shard."""
    return unquote(urlsplit(url, allow_fragments=False).path) if "://" in url and _SCHEME.match(url) else url


def absolute(url: str) -> str:
    """The URL of a shard, independent of the working folder."""
    return url if not is_local(url) or _SCHEME.match(url) or os.path.isabs(url) else os.path.join(os.getcwd(), url)


def without_signature(url: str) -> str:
    """The URL of a remote file alone: without what grants access to it for a time, or caches it on the way.

    Where the path names a tar, that is the query, except a version. Elsewhere the query may name the shard, and only
    the parameters that signatures consist of are left out.

    Example:
        >>> without_signature("https://host/a.tar?versionId=3&X-Amz-Expires=60&X-Amz-Signature=f00")
        'https://host/a.tar?versionId=3'
        >>> without_signature("https://host/get?file=a.tar&sig=f00&se=2026-01-01")
        'https://host/get?file=a.tar'
        >>> without_signature("simplecache::s3://bucket/a.tar")
        's3://bucket/a.tar'
    """
    if "::" in url:
        url = split_chain(url)[1]
    address, mark, query = url.partition("?")
    if not mark:
        return url
    names_shard = address.endswith(".tar")
    kept = _parameters(query, _VERSION if names_shard else _NOT_OF_SIGNATURE)
    return f"{address}?{'&'.join(kept)}" if kept else address


def query_parameters(url: str) -> list[str]:
    """The parameters in the query of a URL, sorted, except those of signatures.

    Example:
        >>> query_parameters("https://host/get.tar?part=1&X-Amz-Signature=f00")
        ['part=1']
    """
    return sorted(_parameters(url.partition("?")[2], _NOT_OF_SIGNATURE))


def _parameters(query: str, names: re.Pattern[str]) -> list[str]:
    return [part for part in query.split("&") if names.fullmatch(part.partition("=")[0])]


def base_name(url: str) -> str:
    """The file name of a shard, without folders and query string.

    Example:
        >>> base_name("s3://bucket/web/a#1.tar")
        'a#1.tar'
    """
    if "://" not in url:  # faster than `is_local`
        return url.rpartition(os.sep)[2]
    if is_local(url):
        return os.path.basename(local_path(url))
    return _as_sent(url).partition("?")[0].rpartition("/")[2]


def _as_sent(url: str) -> str:
    """A remote URL without what no server receives: in keys of object stores, ``#`` is a character like any other."""
    return url.partition("#")[0] if "#" in url and protocol(url) in HTTP else url


def display_url(url: str) -> str:
    """A URL for a message, without password and query string (signatures, tokens).

    Example:
        >>> display_url("https://user:password@host/it's a.tar?X-Amz-Signature=f00")
        "https://host/it's a.tar?..."
    """
    if _URL.match(url) is None:
        return display_text(url)
    address, mark, _ = _as_sent(url).partition("?")
    return _USER.sub("", address) + ("?..." if mark else "")


def display_text(text: str) -> str:
    """A text for a message, without the passwords and query strings of the URLs in it.

    Nothing marks the end of a URL, which may have blanks and quotes in it: rather a part of the text is lost than a
    part of a signature is shown.
    """
    return _USER.sub("", _FRAGMENT.sub(r"\1", _QUERY.sub(r"\1?...", text)))

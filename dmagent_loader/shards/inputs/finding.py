"""Lists the inputs of a domain: files, globs, folders and URLs. Only known endings are read."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dmagent_loader._validation import read_regular
from dmagent_loader.errors import DomainError, ShardError, ShardNotFoundError
from dmagent_loader.shards.inputs.kinds import DATASET_PREFIX, READ, Input, Kind, kind_of_name, remedy_for
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.manifest import MANIFEST_NAME
from dmagent_loader.shards.sources.local import version_tag
from dmagent_loader.shards.sources.remote import remote_info, remote_names
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path

_LISTED_STRAYS = 5
_NAME = re.compile(r"[\w+-][\w+.-]*/[\w+-][\w+. -]*")
_MAX_INDEX_BYTES = 1 << 26
_DATASET_MARKS = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
"""Files that together mark a folder of `save_to_disk`."""

logger = logging.getLogger(__name__)


def domain_name(path: str | os.PathLike[str]) -> str:
    """The name of the domain of a file: ``Science.jsonl.gz`` -> ``Science``."""
    return os.path.basename(os.path.normpath(os.fspath(path))).split(".")[0]


def check_names(domains: Iterable[str]) -> None:
    """Raises DomainError if the name of a domain is not ``field/domain``, or cannot be a folder."""
    for domain in domains:
        if not _NAME.fullmatch(domain):
            raise DomainError(
                f"domain {domain!r} cannot be a folder: name it field/domain, such as 'source/Science', of letters, "
                "digits, '_', '-', '+' and, except at the beginning of a part, '.'; the domain may have spaces"
            )


def find_inputs(
    domain: str, paths: Sequence[str | os.PathLike[str]], options: ReadOptions | None = None
) -> list[Input]:
    """Lists the inputs of a domain.

    Args:
        domain: Name of the domain, for messages.
        paths: Files, globs, folders, fsspec URLs, or ``hf:`` and the name of a data set. A folder stands for all files
            in it that are not hidden, sorted. Files in folders and globs whose endings are not known are left out, and
            named in a warning.
        options: Endings of text files, and the member of tar shards.

    Raises:
        ShardNotFoundError: A path matches no file.
        ShardError: A file that was named cannot be read as data, or none in a folder can; or a folder cannot be listed.
    """
    options = options or ReadOptions()
    found: list[Input] = []
    for given in paths:
        path = os.fspath(given)
        if path.startswith(DATASET_PREFIX):
            found.append(Input(url=path, kind=Kind.DATASET))
            continue
        is_named, names = _remote_names(path, options) if not is_local(path) else _local_names(local_path(path))
        if not names:
            is_folder = is_local(path) and os.path.isdir(local_path(path))
            raise ShardNotFoundError(
                f"domain {domain!r}: "
                + (
                    f"the folder {display_url(path)!r} holds no files: check the path; what is read: {READ}"
                    if is_folder
                    else f"no file at {display_url(path)!r}, seen from {os.getcwd()!r}; check the path"
                )
            )
        found.extend(_chosen(domain, path, names, is_named, options))
    return _without_partners(domain, found)


def _chosen(domain: str, path: str, names: list[str], is_named: bool, options: ReadOptions) -> Iterator[Input]:
    """The inputs among the files of one path; the others are named in a warning, or refused."""
    kinds = [_kind(name, options) for name in names]
    has_manifest = Kind.TAR in kinds and any(os.path.basename(name) == MANIFEST_NAME for name in names)
    if has_manifest:  # which is no document, where the shards are to be written again
        names = [name for name in names if os.path.basename(name) != MANIFEST_NAME]
        kinds = [_kind(name, options) for name in names]
    tars = [name for name, kind in zip(names, kinds, strict=True) if kind is Kind.TAR and options.tar_member is None]
    strays = [name for name, kind in zip(names, kinds, strict=True) if kind is None]
    if has_manifest and tars:
        raise ShardError(
            f"domain {domain!r}: {display_url(path)} holds shards and their {MANIFEST_NAME}: give the folder to the "
            "sampler, or name the member with the text to write the shards again (--tar-member txt, tar_member=)"
        )
    if tars and (is_named or len(tars) + len(strays) == len(names)):
        raise ShardError(
            f"domain {domain!r}: {display_url(tars[0])} is a tar shard, which the sampler reads as it is, "
            f"{{{domain!r}: {display_url(path)!r}}}: give it to the sampler, or name the member with the text to "
            "write it again (--tar-member txt, tar_member=)"
        )
    if strays and (is_named or len(strays) == len(names)):
        raise ShardError(
            f"domain {domain!r}: {display_url(strays[0])} is not read, because its ending is not that of a known kind: "
            f"{remedy_for(strays[0])}; what is read: {READ}"
        )
    strays.extend(tars)
    if strays:
        listed = ", ".join(display_url(name) for name in strays[:_LISTED_STRAYS])
        logger.warning(
            "domain %r: of the %d files in %s, %d are not read, because they are not data of a known kind, or tar "
            "shards without --tar-member: %s%s",
            domain,
            len(names),
            display_url(path),
            len(strays),
            listed,
            ", ..." if len(strays) > _LISTED_STRAYS else "",
        )
    left_out = {*strays}
    for name, kind in zip(names, kinds, strict=True):
        if kind is not None and name not in left_out:
            yield _described(name, kind)


def _kind(name: str, options: ReadOptions) -> Kind | None:
    if is_local(name) and os.path.isdir(name):
        return _kind_of_folder(Path(name))
    return kind_of_name(name.partition("?")[0] if not is_local(name) else name, options.text_files)


def _local_names(path: str) -> tuple[bool, list[str]]:
    """Whether a path names one file, and the files and data set folders that it stands for."""
    if os.path.isdir(path):
        is_input = _kind_of_folder(Path(path)) is not None
        return is_input, [path] if is_input else list(_walk(path))
    if os.path.isfile(path):
        return True, [path]
    matches = sorted(glob.glob(path, recursive=True))
    _check_listed(os.path.dirname(path))
    return False, [name for match in matches for name in (_walk(match) if os.path.isdir(match) else [match])]


def _check_listed(folders: str) -> None:
    """Raises ShardError if a folder of a glob cannot be listed, which the module glob takes for an empty one."""
    while glob.has_magic(folders):
        for folder in glob.iglob(folders, recursive=True):
            if os.path.isdir(folder):
                _check_listable(folder)
        folders = os.path.dirname(folders)
    if os.path.isdir(folders):
        _check_listable(folders)


def _walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """All files below a folder, without hidden ones, and the folders that are one data set; links are followed.

    Args:
        folder: The folder.
        above: Real paths of the folders above it, into which links may lead back.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    if _kind_of_folder(Path(folder)) is not None:
        yield folder
        return
    _check_listable(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        # The method of an entry raises an error for a link to itself.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(entry.path, above | {real})
        elif entry.is_symlink() or entry.is_file():
            yield entry.path


def _check_listable(folder: str) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ShardError(
            f"the folder {folder} cannot be listed ({error}), so its files would be left out: make it readable, or "
            "name the others without it"
        ) from error


def _kind_of_folder(folder: Path) -> Kind | None:
    """The kind of a folder that is read as one; None: it holds files."""
    if any(all(os.path.isfile(folder / name) for name in marks) for marks in _DATASET_MARKS):
        return Kind.SAVED_DATASET
    try:
        index = json.loads(read_regular(folder / "index.json", _MAX_INDEX_BYTES))
        is_mds = any(shard["format"] == "mds" for shard in index["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Kind.MDS if is_mds else None


def _remote_names(url: str, options: ReadOptions) -> tuple[bool, list[str]]:
    is_pattern = any(character in url.partition("?")[0] for character in "*[")
    if not is_pattern and kind_of_name(url.partition("?")[0], options.text_files) is not None:
        return True, [url]
    names = [name for name in remote_names(url) if _is_shown(name, url)]
    if not is_pattern and names in ([], [url]):
        return True, [url]
    return False, names


def _is_shown(name: str, folder: str) -> bool:
    return not any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


def _described(name: str, kind: Kind) -> Input:
    """An input with its size and version."""
    if is_local(name):
        if not os.path.exists(name):
            if not os.path.islink(name):
                raise ShardError(f"{name} cannot be reached: make its folder readable, or restore the file")
            raise ShardError(
                f"{name} is a link to {os.path.realpath(name)!r}, which does not exist: restore or remove it"
            )
        files = [Path(name)]
        if kind in (Kind.SAVED_DATASET, Kind.MDS):
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        elif kind is Kind.MEGATRON:
            files = [Path(name).with_suffix(".bin"), Path(name).with_suffix(".idx")]
        found = [path.stat() for path in files if path.is_file()]
        version = ",".join(str(status.st_mtime_ns) for status in found)
        return Input(url=name, kind=kind, size=sum(status.st_size for status in found), version=version)
    info = remote_info(name)
    return Input(url=name, kind=kind, size=int(info.get("size") or 0), version=version_tag(info))


def _identity(found: Input) -> str:
    """The location of an input; of a file with hard links, its number on its disk."""
    if found.kind is not Kind.DATASET and is_local(found.url):
        status = os.stat(local_path(found.url))
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and status.st_ino:
            return f"{status.st_dev}:{status.st_ino}"
    return found.location


def _without_partners(domain: str, inputs: Iterable[Input]) -> list[Input]:
    """Every input once; Megatron's two files are one input, called by the name of its ``.bin``."""
    kept: dict[str, Input] = {}
    for found in inputs:
        name = found.url
        if found.kind is Kind.MEGATRON:
            if not is_local(name):
                raise ShardError(
                    f"domain {domain!r}: {display_url(name)}: Megatron's .bin/.idx are read from local disks only: "
                    "copy both files"
                )
            prefix = os.path.splitext(name)[0]
            missing = [end for end in (".bin", ".idx") if not os.path.isfile(prefix + end)]
            if missing:
                raise ShardError(
                    f"domain {domain!r}: {name} is not read without {prefix}{missing[0]}: Megatron's tokens are two "
                    "files, .bin and .idx; other .bin files are not read"
                )
            name = f"{prefix}.bin"
        unique = Input(url=name, kind=found.kind, size=found.size, version=found.version)
        kept.setdefault(_identity(unique), unique)
    urls = {found.url for found in kept.values()}
    for found in kept.values():
        plain = found.url[: -len(found.compression)] if found.compression else ""
        if plain in urls:
            logger.warning(
                "domain %r: both %s and %s are read: if one is the other compressed, its documents count twice",
                domain,
                display_url(plain),
                display_url(found.url),
            )
    return list(kept.values())

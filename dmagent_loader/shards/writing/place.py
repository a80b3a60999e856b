"""Where shards, documents and labels are written: a local folder, or a prefix of an object store.

Work goes on in a local folder, where it can be continued after a kill. Files appear in the place one by one, each as a
whole; of shards, the manifest, which names them, comes last.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.index.cache import default_cache_dir
from dmagent_loader.shards.manifest import read_stored
from dmagent_loader.shards.sources.remote import remote_names
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path, without_signature
from dmagent_loader.shards.sources.writing import refuse_unwritable, remove_url, upload_file, write_url

_UPLOADS = 8
"""Files that are uploaded at the same time."""
_UPLOADED = ".uploaded"
_WRITE_TEST = ".dmagent-write-test"


class Place(ABC):
    """A folder that is written to. Names are relative to it, with forward slashes.

    Attributes:
        work: Local folder for the work in progress.
        work_is_apart: Whether `work` is another folder, from which files are uploaded.
    """

    work: Path
    work_is_apart: bool

    @abstractmethod
    def __str__(self) -> str:
        """The path or URL, for messages."""

    @abstractmethod
    def url(self, name: str) -> str:
        """Path or URL of a file."""

    @abstractmethod
    def check_access(self) -> None:
        """Checks that files can be written here, before hours of work.

        Raises:
            ShardError: The store refuses it or cannot be reached.
        """

    @abstractmethod
    def names(self, domain: str) -> list[str]:
        """The files in the folder of a domain."""

    @abstractmethod
    def move_in(self, files: Mapping[str, Path], *, progress: bool) -> None:
        """Moves files of the work here; files of their names are replaced."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if there is one."""

    @abstractmethod
    def replace_folder(self, name: str, folder: Path, mark: str) -> None:
        """Replaces a folder by one of the work.

        Args:
            name: Name of the folder, in which there are no others.
            folder: The new one; it is gone or useless afterwards.
            mark: File of the new folder that says who wrote it; where files appear one by one, it is the first.
        """

    @abstractmethod
    def holds(self, url: str) -> bool:
        """Whether a path or URL lies in this folder."""

    def read(self, name: str) -> bytes | None:
        """A file; None if there is none."""
        try:
            return read_stored(self.url(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        write_url(self.url(name), data)


class LocalPlace(Place):
    """A local folder, which also holds the work in progress."""

    work_is_apart = False

    def __init__(self, folder: Path) -> None:
        self.work = folder

    def __str__(self) -> str:
        return str(self.work)

    def url(self, name: str) -> str:
        return str(self.work / name)

    def check_access(self) -> None:
        """Nothing is left to check: the lock of the work in progress lies in the same folder."""

    def names(self, domain: str) -> list[str]:
        folder = self.work / domain
        found = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
        return [path.relative_to(self.work).as_posix() for path in found]

    def move_in(self, files: Mapping[str, Path], *, progress: bool) -> None:
        for name, path in files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, self.work / name)

    def remove(self, name: str) -> None:
        (self.work / name).unlink(missing_ok=True)

    def replace_folder(self, name: str, folder: Path, mark: str) -> None:
        if (self.work / name).exists():
            os.replace(self.work / name, folder.with_name(f"{folder.name}.replaced"))
        os.replace(folder, self.work / name)

    def holds(self, url: str) -> bool:
        return is_local(url) and os.path.realpath(local_path(url)).startswith(
            os.path.join(os.path.realpath(self.work), "")
        )


class StorePlace(Place):
    """A prefix of an object store.

    Args:
        url: Its URL.
        work: Local folder for the work in progress.
    """

    work_is_apart = True

    def __init__(self, url: str, work: Path) -> None:
        self._url, self.work = url.rstrip("/"), work

    def __str__(self) -> str:
        return display_url(self._url)

    def url(self, name: str) -> str:
        return f"{self._url}/{name}"

    def check_access(self) -> None:
        """Writes and removes an object."""
        write_url(self.url(_WRITE_TEST), b"")
        remove_url(self.url(_WRITE_TEST))

    def names(self, domain: str) -> list[str]:
        return [url.removeprefix(f"{self._url}/") for url in remote_names(self.url(domain))]

    def move_in(self, files: Mapping[str, Path], *, progress: bool) -> None:
        """Uploads files. Those that an earlier call had uploaded are left out: equal jobs write equal bytes."""
        present = {name for folder in {name.rpartition("/")[0] for name in files} for name in self.names(folder)}

        def upload(item: tuple[str, Path]) -> None:
            name, path = item
            mark = path.with_name(path.name + _UPLOADED)
            if name not in present or not mark.exists():
                upload_file(path, self.url(name))
                mark.touch()

        with ThreadPoolExecutor(_UPLOADS) as pool:
            try:
                uploads = pool.map(upload, files.items())
                for _ in tqdm(uploads, total=len(files), desc="uploading", unit="file", disable=not progress):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def remove(self, name: str) -> None:
        remove_url(self.url(name))

    def replace_folder(self, name: str, folder: Path, mark: str) -> None:
        files = {f"{name}/{path.name}": path for path in folder.iterdir()}
        stale = set(self.names(name)) - files.keys()
        self.move_in({f"{name}/{mark}": files.pop(f"{name}/{mark}")}, progress=False)
        self.move_in(files, progress=False)
        for other in sorted(stale):
            self.remove(other)

    def holds(self, url: str) -> bool:
        return not is_local(url) and without_signature(url).startswith(f"{without_signature(self._url)}/")


def place_of(output: str | os.PathLike[str], work_dir: str | os.PathLike[str] | None = None) -> Place:
    """The place that a path or URL names.

    Args:
        output: Path, or URL of an object store.
        work_dir: Local folder for the work in progress of a store; None: a folder for this URL in the cache folder.

    Raises:
        ConfigurationError: A work folder is given for a local folder, which holds its work itself.
        ShardError: The URL is not that of an object store.
    """
    url = os.fspath(output)
    if is_local(url):
        if work_dir is not None:
            raise ConfigurationError(
                f"work_dir={os.fspath(work_dir)!r} has no effect with the local output {url!r}, which holds the work "
                "in progress: leave it out (--work-dir, work_dir=)"
            )
        return LocalPlace(Path(local_path(url)))
    refuse_unwritable(url)
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return StorePlace(url, Path(work_dir) if work_dir is not None else default_cache_dir() / "writing" / name)

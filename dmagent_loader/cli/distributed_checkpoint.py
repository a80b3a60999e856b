"""The common state of a distributed checkpoint without a ``common.pt``, as Megatron-core 0.19 writes it.

Its ``.metadata`` is a pickle. It is read with inert objects in place of all classes and functions that it names, so
nothing in it is executed, and it need not match the installed version of torch.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from dmagent_loader._run.state import MAX_STATE_BYTES
from dmagent_loader._validation import read_regular

METADATA = ".metadata"
_KEY = "common_state/"
_MAX_METADATA_BYTES = 1 << 30
"""The metadata lists each part of each tensor of each rank."""


class _Inert:
    """Stands for any object; keeps the attributes that were saved with it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert


def common_state(metadata: Path) -> bytes:
    """The part with everything that is not a sharded tensor, as a torch file.

    Args:
        metadata: The checkpoint's file ``.metadata``.

    Raises:
        ValueError: It is not the metadata of a checkpoint with such a part.
        OSError: A file cannot be read.
    """
    data = read_regular(metadata, _MAX_METADATA_BYTES)
    try:
        stored = _InertUnpickler(io.BytesIO(data)).load().storage_data
        found = next(part for index, part in stored.items() if index.fqn.startswith(_KEY))
        name, offset, length = Path(found.relative_path).name, int(found.offset), int(found.length)
    except Exception as error:  # a pickle that is damaged, or holds something else, fails in any way
        raise ValueError(f"{metadata} does not list a common state: {error!r}") from error
    if not 0 < length <= MAX_STATE_BYTES or offset < 0:
        raise ValueError(f"{metadata} lists a common state of {length} bytes at {offset}")
    with (metadata.parent / name).open("rb") as file:
        file.seek(offset)
        return file.read(length)

"""Finds the state of a run in whatever holds it: a JSON file, a trainer's checkpoint, or a folder of these.

Every trainer puts the state somewhere else, and a loop of one's own puts it anywhere. It is recognised by its entries,
so one search serves all:

| kind | file | place of the state |
|---|---|---|
| `save_state` | ``*.json`` | the object itself, or ``sampler`` |
| Hugging Face Trainer | ``trainer_state.json`` | ``stateful_callbacks.DataMixingCallback`` |
| Lightning | ``*.ckpt`` | ``callbacks.DataMixingCallback`` |
| Accelerate | ``custom_checkpoint_*.pkl`` | the object itself |
| NeMo | ``weights/common.pt`` | ``AgentWeightedDataModule``, as JSON text |
| Megatron-core | ``common.pt``, or the common state that ``.metadata`` lists | the user's key, as JSON text |
| Megatron-LM | ``train_dataloader_dprank*.pt`` | ``dataloader_state_dict``, as JSON text |

Nothing in these files is executed: torch files are read with ``weights_only=True``, without the tensors' data.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmagent_loader._run.state import MAX_STATE_BYTES
from dmagent_loader._validation import read_regular, shown
from dmagent_loader.cli.distributed_checkpoint import METADATA, common_state
from dmagent_loader.errors import StateError

JSON_FILES, TORCH_FILES = (".json",), (".ckpt", ".pt", ".pth", ".pkl")
_MARK = b'"ledger"', b"ledger"
_MOST_FOLDERS_DEEP = 5
"""lightning_logs/version_0/checkpoints/epoch=0.ckpt/meta.pt"""
_MOST_VALUES_DEEP = 8
_SAME_RUN = "seed", "first_fingerprint"
_EXPECTED = (
    "pass a file of save_state(), a checkpoint of the Trainer, Lightning, NeMo or Megatron that was saved with data "
    "mixing, or a folder of one run's checkpoints"
)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state and its origin.

    Attributes:
        state: The state of a sampler; not checked any further.
        path: File that holds it.
        last_sample: Samples at which the trainer stops by its own count of steps; None: the file does not say.
        samples_per_step: Samples of one of its steps over all ranks; None: the file does not say.
    """

    state: Mapping[str, Any]
    path: Path
    last_sample: int | None = None
    samples_per_step: int | None = None


def find_saved_state(path: Path) -> SavedState:
    """The state in a file, or the newest one in a folder.

    Raises:
        StateError: There is no state, or there are states of several runs.
    """
    if not path.exists():
        raise StateError(f"there is no file or folder {path}: {_EXPECTED}")
    if path.is_dir():
        found = [saved for file in _candidates(path) for saved in _states_of(file)]
        if not found:
            raise StateError(f"the folder {path} does not contain the state of a sampler: {_EXPECTED}")
    else:
        found = _states_of(path)
        if not found:
            raise StateError(f"{path} does not contain the state of a sampler: {_EXPECTED}")
    newest = max(found, key=_progress)
    if not all(_is_earlier(saved.state, newest.state) for saved in found):
        shown_ones = [saved for saved in found if saved is newest or not _is_earlier(saved.state, newest.state)]
        holders = list(dict.fromkeys(str(saved.path) for saved in shown_ones))
        raise StateError(
            f"{path} contains the states of several runs, in {shown(holders)}, and a report is about one: pass the "
            "checkpoint or the state of one of them"
        )
    return newest


def _is_earlier(state: Mapping[str, Any], newest: Mapping[str, Any]) -> bool:
    """Whether a state is one of the run whose newest state is given, or that state itself.

    Runs with the same seed and shards are told apart by their past, to which a run only adds. The newest mix does not
    count: another that holds from the same sample takes its place.
    """
    if any(state.get(key) != newest.get(key) for key in _SAME_RUN):
        return False
    has_same_data = state.get("begin") == newest.get("begin")
    return _begins(newest.get("measurements"), state.get("measurements"), 0) and (
        not has_same_data or _begins(newest.get("ledger"), state.get("ledger"), 1)
    )


def _begins(newest: Any, earlier: Any, left_out: int) -> bool:
    """Whether a list begins with the entries of an earlier one, without the last ones of that."""
    if not isinstance(newest, list) or not isinstance(earlier, list):
        return True  # damaged, which is reported when the state is read
    count = max(0, len(earlier) - left_out)
    return newest[:count] == earlier[:count]


def _progress(saved: SavedState) -> int:
    consumed = saved.state.get("consumed")
    return consumed if isinstance(consumed, int) else -1


def _candidates(folder: Path) -> Iterator[Path]:
    """Files of a folder that hold the word ``ledger`` where a state would have it; their tensors are not read."""
    for where, folders, files in os.walk(folder):
        if len(Path(where).relative_to(folder).parts) >= _MOST_FOLDERS_DEEP:
            folders.clear()
        folders.sort()
        for file in sorted(map(Path(where).joinpath, files)):
            try:
                if (file.suffix in JSON_FILES and _MARK[0] in read_regular(file, MAX_STATE_BYTES)) or (
                    _is_torch(file) and _MARK[1] in _structure(file)
                ):
                    yield file
            except (OSError, ValueError, zipfile.BadZipFile):
                continue  # another program's file, or one that is being written


def _is_torch(file: Path) -> bool:
    return file.suffix in TORCH_FILES or file.name == METADATA


def _torch_file(file: Path) -> Path | io.BytesIO:
    return io.BytesIO(common_state(file)) if file.name == METADATA else file


def _structure(file: Path) -> bytes:
    """The part of a torch file that describes its objects, as bytes."""
    with zipfile.ZipFile(_torch_file(file)) as archive:
        names = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(names) != 1 or names[0].file_size > MAX_STATE_BYTES:
            raise ValueError("it is not a torch file")
        return archive.read(names[0])


def _states_of(file: Path) -> list[SavedState]:
    """All states in a file.

    Raises:
        StateError: The file cannot be read.
    """
    value = _read_torch(file) if _is_torch(file) else _read_json(file)
    last, step = _trainer_steps(value)
    return [SavedState(state=state, path=file, last_sample=last, samples_per_step=step) for state in _states_in(value)]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(read_regular(file, MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{file} cannot be read as JSON: {error}; {_EXPECTED}") from error


def _read_torch(file: Path) -> Any:
    # Imported here, because reading JSON and the help of the commands should not wait for it.
    import pickle

    import torch

    try:
        opened = _torch_file(file)
        return torch.load(opened, map_location="cpu", weights_only=True, mmap=opened is file)
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{file} contains objects that could execute code when they are loaded: {_unsafe(file)}; this command "
            "loads numbers, text and tensors only. If you trust the file, load it in Python with "
            "torch.load(path, weights_only=False), write the callback's entry with save_state('state.json', entry), "
            "and pass that file"
        ) from error
    except Exception as error:
        raise StateError(f"{file} cannot be read as a torch file: {error}; {_EXPECTED}") from error


def _unsafe(file: Path) -> str:
    import torch

    try:
        return shown(torch.serialization.get_unsafe_globals_in_checkpoint(_torch_file(file)))
    except Exception:  # the pickle is damaged, too
        return "unknown ones"


def _states_in(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """All states inside nested mappings, sequences and JSON text."""
    if isinstance(value, str) and _MARK[0].decode() in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, Mapping):
        if {"schema", "ledger", "consumed"} <= set(value):
            yield value
            return
        parts: Any = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        return
    if depth < _MOST_VALUES_DEEP:
        for part in parts:
            yield from _states_in(part, depth + 1)


def _trainer_steps(value: Any) -> tuple[int | None, int | None]:
    """Samples at which the Hugging Face Trainer stops, and those of a step, from its ``trainer_state.json``."""
    try:
        held = value["stateful_callbacks"]["DataMixingCallback"]
        attributes = (held[-1] if isinstance(held, list) else held)["attributes"]
        left, step = int(value["max_steps"]) - int(value["global_step"]), int(attributes["samples_per_step"])
        return int(attributes["sampler"]["consumed"]) + left * step, step if step > 0 else None
    except (LookupError, TypeError, ValueError):
        return None, None

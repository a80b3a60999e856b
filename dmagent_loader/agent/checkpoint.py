"""Checkpoint folders: ``config.json``, ``model.safetensors`` and a model card, ``README.md``.

This module reads and writes the files; `MixingAgent.from_pretrained` and `critic.load_critics` build the networks.
Loading never unpickles. The sha256 of the weights is stored in ``config.json`` and verified on loading.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dmagent_loader._files import write_atomically
from dmagent_loader._validation import read_regular, shown, without_repeats
from dmagent_loader.agent.config import AgentConfig
from dmagent_loader.errors import CheckpointError, ConfigurationError, require_extra

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

PLUS = "dmagent-plus"
"""Value of ``kind`` in the config of a `plus.network.PlusNetwork`; the config of a `MixingAgent` has none."""

MAX_HEADER_BYTES = 1 << 20
"""Size limit of config.json and of the header of the weights; both are a few kilobytes."""

RECORD_FOLDER = "training_record"
"""Folder of the repository, not installed, with what the bundled agent was trained on and compared with."""

IN_REPOSITORY = ("dmagent-sft", "recorded-math")
"""The names in `RECORD_FOLDER` that load in a checkout."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def bundled_roots() -> list[Path]:
    """Folders with checkpoints and recorded sets that have names: in the package, or, in a checkout, beside it."""
    package = Path(__file__).resolve().parents[1]
    roots = [package / "agent_checkpoints"]
    if (package.parent / "setup.cfg").is_file():
        roots += [package.parent / "agent_checkpoints", package.parent / RECORD_FOLDER]
    return roots


def list_bundled() -> dict[str, Path]:
    """The checkpoints that come with the package, as name -> directory; in a checkout, those of the repository too."""
    found: dict[str, Path] = {}
    for root in bundled_roots():
        for config in sorted(root.glob(f"*/{CONFIG_FILE}")):
            found.setdefault(config.parent.name, config.parent)
    return found


def resolve(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Directory of a checkpoint.

    Args:
        name_or_path: The name of a bundled checkpoint, a directory, or a Hub id ``org/name``. A bundled name takes
            precedence over a folder of that name in the working directory: write ``./name`` for the folder.
        revision: Branch, tag or commit on the Hub; a commit is the only one that cannot change.

    Raises:
        CheckpointError: No checkpoint has that name, or the Hub cannot be reached.
        MissingExtraError: ``huggingface_hub``, which a Hub id needs, is not installed.
    """
    name = os.fspath(name_or_path)
    bundled = list_bundled()
    if isinstance(name_or_path, str) and name in bundled:
        return bundled[name]
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        return _download(name, revision)
    raise CheckpointError(
        f"no agent checkpoint {name!r}: it is neither bundled ({', '.join(bundled) or 'none are'}), nor a directory, "
        f"nor a Hub id like 'org/name'{only_in_repository(name)}"
    )


def only_in_repository(name: str) -> str:
    """The end of an error message about a name that is not found: where it is, if it is not installed."""
    if name not in IN_REPOSITORY:
        return ""
    return (
        f"; {name!r} is not part of the installed package: run this in a checkout of the repository after "
        f"'pip install -e .', or pass the path of {RECORD_FOLDER}/{name} there"
    )


def name_of(name_or_path: str | os.PathLike[str], directory: Path) -> str:
    """Name of an agent in messages and ledgers: its Hub id, or the name of its folder.

    Args:
        name_or_path: The argument of `resolve`.
        directory: Its result.
    """
    name = os.fspath(name_or_path)
    is_hub_id = isinstance(name_or_path, str) and not Path(name).is_dir() and _HUB_ID.fullmatch(name)
    return name if is_hub_id else directory.resolve().name


def read_agent_config(directory: Path) -> tuple[AgentConfig, str]:
    """The config of an agent, and the sha256 of its weights.

    Raises:
        CheckpointError: ``config.json`` is missing, is not JSON, or does not describe an agent.
    """
    values = read_config(directory)
    if values.get("kind") == PLUS:
        raise CheckpointError(
            f"{directory} holds an agent of the kind {PLUS!r}, which is not a MixingAgent: pass it as agent= to "
            "AgentWeightedSampler, or load it with policies.PlusPolicy.from_pretrained"
        )
    if "kind" in values:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} has the kind {shown(values['kind'])}, which this version of dmagent_loader "
            "does not know: install a newer one"
        )
    sha256 = values.pop("weights_sha256", None)
    if not isinstance(sha256, str):
        raise CheckpointError(f"{directory / CONFIG_FILE} has no weights_sha256: it was not written by save_pretrained")
    try:
        return AgentConfig.from_dict(values), sha256
    except ConfigurationError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from error


def is_plus(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is a `plus.network.PlusNetwork`.

    Raises:
        CheckpointError: See `resolve` and `read_config`.
    """
    return read_config(resolve(name_or_path)).get("kind") == PLUS


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        CheckpointError: The file is missing or does not hold a JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(read_regular(path, MAX_HEADER_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is not an agent checkpoint: it has no {CONFIG_FILE}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; fetch the checkpoint again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    owner: str,
    card: str | None = None,
) -> None:
    """Writes a checkpoint folder; weights are stored as float32.

    Each file is written under a temporary name, flushed to disk and renamed, the config last. After a crash the folder
    holds the old checkpoint, or new weights whose digest does not match the old config: loading refuses these.

    Args:
        directory: Created if missing; the files of an older checkpoint are replaced.
        config: JSON-serialisable contents of ``config.json``; ``weights_sha256`` is added.
        weights: Parameter name -> values.
        owner: Name of the model in the error message.
        card: Text of ``README.md``; None: the file is not written.

    Raises:
        CheckpointError: A weight is not finite.
    """
    stored = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    _refuse_non_finite(stored, owner, "it is not saved, because it diverged in training")
    data = safetensors.torch.save(stored, metadata={"format": "pt"})
    text = json.dumps({**config, "weights_sha256": hashlib.sha256(data).hexdigest()}, indent=2) + "\n"
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / WEIGHTS_FILE, data)
    if card is not None:
        write_atomically(target / CARD_FILE, card.encode())
    write_atomically(target / CONFIG_FILE, text.encode())


def read_weights(path: Path, sha256: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads and verifies weights.

    Args:
        path: A safetensors file.
        sha256: Digest of the file, in hex.
        expected: Tensors, on any device, with the names and shapes that the config describes.

    Raises:
        CheckpointError: The file is missing, damaged or changed, or its tensors have other names, shapes or types, or
            hold values that are not finite.
    """
    needed = sum(4 * tensor.numel() for tensor in expected.values())
    try:
        data = read_regular(path, needed + MAX_HEADER_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a complete checkpoint: it has no {path.name}") from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise CheckpointError(
                f"{path} is too large: {error.strerror}, because the config describes weights of {needed}: the two "
                "files are of different models"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; fetch the checkpoint again"
        ) from error
    _check_layout(path, data, expected)
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise CheckpointError(
            f"{path} has sha256 {found[:12]}..., but {CONFIG_FILE} says {sha256[:12]}...: the weights were changed "
            "after they were saved, or a save was interrupted; fetch the checkpoint again"
        )
    try:
        weights: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}; fetch the checkpoint again") from error
    _refuse_non_finite(weights, str(path), "the model diverged in training or the file was damaged")
    return weights


def _check_layout(path: Path, data: bytes, expected: Mapping[str, Tensor]) -> None:
    """Checks header, size, names, dtypes and shapes, whose faults a mismatch of digests alone would not explain."""
    header_size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if len(data) < 8 or header_size > len(data) - 8 or header_size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has {len(data)} bytes and declares a header of {header_size}: it is truncated or not "
            "a safetensors file"
        )
    try:
        header = json.loads(data[8 : 8 + header_size], object_pairs_hook=without_repeats)
        header.pop("__metadata__", None)
        tensors = {
            name: (entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1]) for name, entry in header.items()
        }
        end = max((int(stop) for _, _, stop in tensors.values()), default=0)
    except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is damaged: {error!r}; fetch the checkpoint again") from error
    if end > len(data) - 8 - header_size:
        raise CheckpointError(
            f"{path} is truncated: its tensors need {end} bytes, {len(data) - 8 - header_size} are there: "
            "fetch it again"
        )
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"{path} lacks tensors {missing[:4]} and has unexpected {[name[:100] for name in unexpected[:4]]}: another "
            "model's weights"
        )
    for name, (dtype, shape, _) in tensors.items():
        if shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"tensor {name!r} in {path} has shape {str(list(shape))[:100]}, but the config describes "
                f"{list(expected[name].shape)}: weights and config are of different models"
            )
        if dtype != "F32":
            raise CheckpointError(
                f"tensor {name!r} in {path} is {str(dtype)[:20]}; agent weights are stored as F32: save it again"
            )


def _refuse_non_finite(weights: Mapping[str, Tensor], owner: str, reason: str) -> None:
    """Raises CheckpointError, with `owner` and `reason` in its message, if a weight is infinite or NaN."""
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(f"{owner} has weights that are not finite in {', '.join(bad[:4])}: {reason}")


def _download(name: str, revision: str | None) -> Path:
    hub = require_extra("huggingface_hub", "hf")
    try:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE])
        )
    except Exception as error:  # the Hub client raises errors of its own, of requests, of httpx and of the system
        reason = (str(error).strip().splitlines() or ["no details"])[0]
        raise CheckpointError(
            f"agent {name!r} is not a local directory and cannot be fetched from the Hub ({type(error).__name__}: "
            f"{reason}): check the name and the network, or download the folder elsewhere and pass its path"
        ) from error


def default_card(config: AgentConfig, title: str, num_parameters: int) -> str:
    """A model card with nothing but the facts of the config, which must have statistics."""
    assert config.statistics is not None
    rows = "\n".join(
        f"| {role} | {mean:.6g} | {std:.6g} |"
        for role, mean, std in zip(config.feedback_roles, config.statistics.mean, config.statistics.std, strict=True)
    )
    return f"""---
library_name: dmagent-loader
tags: [data-mixing, continual-pre-training]
---

# {title}

A data mixing agent: {num_parameters:,} parameters, {config.num_layers} decoder layers of width {config.d_model},
{config.num_domains} domains, histories of up to {config.max_steps} steps. Its training was not described when it was
saved.

Feedback of the training trajectories, {config.statistics.count} values per role; standardised in use as
`{config.standardization}`:

| role | mean | std |
|---|---|---|
{rows}

```python
from dmagent_loader import MixingAgent

agent = MixingAgent.from_pretrained("path/to/this/folder")
```
"""

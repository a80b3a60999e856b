"""The interface of all classifiers, and how one is chosen by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dmagent_loader._validation import read_regular, shown
from dmagent_loader.errors import CheckpointError, ConfigurationError, require_extra
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.simplex import FloatArray

BUNDLED = "linear"
"""Name of the bundled classifier."""
_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 1 << 20


class Classifier(Protocol):
    """Assigns one of several labels to a text.

    Attributes:
        name: Name and version, recorded with everything that it labelled.
        labels: (L,) names of the labels.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    def probabilities(self, texts: Sequence[str]) -> FloatArray:
        """Probability of each label of each text: (n, L), rows sum to 1."""
        ...


def load_classifier(
    name_or_path: str | os.PathLike[str] = BUNDLED, *, device: str | None = None, batch_size: int = 64
) -> Classifier:
    """Loads a classifier of topics or quality.

    Args:
        name_or_path: ``"linear"``, the bundled classifier of 26 topics; a folder, or the Hub id, of NVIDIA's domain or
            quality classifier or of WebOrganizer's topic classifier. Only a Hub id uses the network.
        device: Torch device; None: the GPU if there is one.
        batch_size: Texts in one forward pass.

    Raises:
        CheckpointError: The classifier cannot be loaded.
        ConfigurationError: `batch_size` is less than 1.
        MissingExtraError: transformers is not installed.
    """
    name = os.fspath(name_or_path)
    if name == BUNDLED:
        return LinearClassifier.bundled()
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}; it must be at least 1")
    folder = Path(name) if os.path.isdir(name) else _download(name)
    config = _read_config(folder)
    # Imported here, because they load torch and transformers, which the bundled classifier does not need.
    from dmagent_loader.labelling.deberta import is_deberta, load_deberta
    from dmagent_loader.labelling.web_organizer import is_web_organizer, load_web_organizer

    if is_deberta(config):
        found = load_deberta(folder, config, name=name, device=device, batch_size=batch_size)
    elif is_web_organizer(config):
        found = load_web_organizer(folder, config, name=name, device=device, batch_size=batch_size)
    else:
        raise CheckpointError(
            f"{name!r} is neither of the known kinds of classifier: its {_CONFIG} has the keys "
            f"{shown(sorted(config))}; give NVIDIA's domain or quality classifier (base_model, fc_dropout, id2label), "
            "or WebOrganizer's topic classifier (model_type 'new')"
        )
    return replace(found, loader=partial(load_classifier, name, device=device, batch_size=batch_size))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(read_regular(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the classifier's {path} cannot be read ({error}): give the folder with {_CONFIG}, model.safetensors and "
            "the tokenizer"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"the classifier's {path} is not a JSON object: copy it again")
    return config


def _download(name: str) -> Path:
    hub = require_extra("huggingface_hub", "label")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the Hub's client raises its own, requests' and OS errors
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"there is no folder {name!r}, and it could not be fetched from the Hub ({reason}): give the path of a "
            f"folder, a Hub id, or {BUNDLED!r}"
        ) from error

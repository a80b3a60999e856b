"""Classification by a transformer: truncation, batches of similar length, and the forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmagent_loader.errors import CheckpointError, require_extra
from dmagent_loader.mixture.simplex import FloatArray

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TransformerClassifier:
    """A classifier on a transformer. `load_classifier` makes it.

    Args:
        name: See `labelling.Classifier`.
        labels: (L,) names of the labels.
        logits: Function from token ids (B, T) and their mask (B, T) to logits (B, L).
        tokenizer: Tokenizer of transformers.
        device: Device of the model.
        batch_size: Texts in one forward pass.
        max_tokens: Number of leading tokens read.
        max_characters: Number of leading characters read.
        loader: Loads the classifier; a pickled one is loaded again, on a device of the process that unpickles it.
    """

    name: str
    labels: tuple[str, ...]
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    tokenizer: Any
    device: torch.device
    batch_size: int
    max_tokens: int
    max_characters: int
    loader: Callable[[], Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.loader is not None, "only classifiers of load_classifier are pickled"
        return self.loader, ()

    def probabilities(self, texts: Sequence[str]) -> FloatArray:
        """Probability of each label of each text: (n, L), rows sum to 1. Texts of similar length share a batch."""
        result = np.zeros((len(texts), len(self.labels)))
        if not texts:
            return result
        cut = [text[: self.max_characters] for text in texts]
        encoded = self.tokenizer(cut, truncation=True, max_length=self.max_tokens, verbose=False)["input_ids"]
        order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            longest = len(encoded[members[0]])
            ids = torch.full((len(members), longest), self.tokenizer.pad_token_id)
            mask = torch.zeros((len(members), longest), dtype=torch.long)
            for row, number in enumerate(members):
                ids[row, : len(encoded[number])] = torch.tensor(encoded[number])
                mask[row, : len(encoded[number])] = 1
            with torch.inference_mode():
                logits = self.logits(ids.to(self.device), mask.to(self.device))
            result[members] = logits.double().softmax(dim=-1).cpu().numpy()
        return result


def versioned(name: str, folder: Path) -> str:
    """Name of a classifier with the digest of its weights."""
    with open(folder / WEIGHTS_FILE, "rb") as file:
        return f"{Path(name).name} ({hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"


def labels_of(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The labels of a configuration, in the order of the logits.

    Raises:
        CheckpointError: Their numbers are not 0, 1, ...
    """
    numbered = config.get("label2id") or {label: number for number, label in (config.get("id2label") or {}).items()}
    try:
        by_number = {int(number): str(label) for label, number in numbered.items()}
        return tuple(by_number[number] for number in range(len(numbered)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the classifier {str(folder)!r} does not number its labels 0, 1, ... in label2id or id2label: copy its "
            "config.json again"
        ) from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by name.

    Raises:
        CheckpointError: They are missing, damaged, or in a format that can execute code.
    """
    import safetensors.torch

    path = folder / WEIGHTS_FILE
    try:
        weights: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"the classifier's weights {path} cannot be read ({error}): copy the folder again; other formats than "
            "safetensors are not loaded, because they can execute code"
        ) from error
    return weights


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Loads weights into a model.

    Raises:
        CheckpointError: Weights are missing, or have another shape.
    """
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {str(folder)!r} do not fit its config.json: {error}") from error
    unknown = [name for name in unknown if not name.endswith("position_ids")]  # a buffer of older versions
    if missing or unknown:
        raise CheckpointError(
            f"the weights in {str(folder)!r} lack {missing[:3]} and have {unknown[:3]} besides: this is another "
            "architecture than its config.json says"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder.

    Raises:
        CheckpointError: The folder has none.
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "label")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(
            f"the classifier {str(folder)!r} has no usable tokenizer ({error}): its folder needs tokenizer.json, or "
            "spm.model, and tokenizer_config.json"
        ) from error


def chosen_device(device: str | None) -> torch.device:
    """The device of a model; None: the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def placed(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on its device, for inference; in bfloat16 on a GPU."""
    return model.eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)

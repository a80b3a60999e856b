"""NVIDIA's domain and quality classifiers: DeBERTa-v3, dropout, and a linear layer on token 0.

The published ``config.json`` names the backbone only by its Hub id (``base_model``), although ``model.safetensors``
holds the backbone's weights. The backbone is therefore built without the network: its sizes from the weights, and what
has no weights from the settings that all DeBERTa-v3 models share (arXiv 2111.09543).

Shapes: B batch, T tokens, D width, L labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmagent_loader.errors import CheckpointError, require_extra
from dmagent_loader.labelling.transformer import (
    TransformerClassifier,
    chosen_device,
    labels_of,
    load_tokenizer,
    load_weights,
    placed,
    read_weights,
    versioned,
)

QUALITY_LABELS = ("High", "Medium", "Low")
_KEYS = frozenset({"base_model", "fc_dropout", "id2label"})
_HEAD_WIDTH = 64
_LIMITS, _QUALITY_LIMITS = (512, 2000), (1024, 6000)
"""Tokens and characters read, as published for the domain and for the quality classifier."""
_SHARED_SETTINGS: dict[str, Any] = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "max_position_embeddings": 512,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
}


class _Network(torch.nn.Module):
    """The published network; the names of its parts are those of the weights."""

    def __init__(self, backbone: torch.nn.Module, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.model = backbone
        self.dropout = torch.nn.Dropout(dropout)
        self.fc = torch.nn.Linear(width, num_labels)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits from token ids and their mask, (B, T) each: (B, L)."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: torch.Tensor = self.fc(self.dropout(hidden[:, 0]))
        return logits


def is_deberta(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of such a classifier."""
    return config.keys() >= _KEYS


def load_deberta(
    folder: Path, config: Mapping[str, Any], *, name: str, device: str | None, batch_size: int
) -> TransformerClassifier:
    """Loads a classifier from a local folder.

    Raises:
        CheckpointError: The folder does not hold such a classifier.
        MissingExtraError: transformers is not installed.
    """
    require_extra("transformers", "label")
    from transformers import DebertaV2Config, DebertaV2Model

    if "deberta" not in str(config["base_model"]).lower():
        raise CheckpointError(
            f"the classifier {str(folder)!r} has the backbone {config['base_model']!r}, but only DeBERTa-v3 is known"
        )
    weights, labels = read_weights(folder), labels_of(config, folder)
    sizes = _sizes(weights, folder)
    network = _Network(
        DebertaV2Model(DebertaV2Config(**_SHARED_SETTINGS, **sizes)),
        sizes["hidden_size"],
        len(labels),
        float(config["fc_dropout"]),
    )
    load_weights(network, weights, folder)
    place = chosen_device(device)
    max_tokens, max_characters = _QUALITY_LIMITS if set(labels) == set(QUALITY_LABELS) else _LIMITS
    return TransformerClassifier(
        name=versioned(name, folder),
        labels=labels,
        logits=placed(network, place),
        tokenizer=load_tokenizer(folder),
        device=place,
        batch_size=batch_size,
        max_tokens=max_tokens,
        max_characters=max_characters,
    )


def _sizes(weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, int]:
    layers = [re.match(r"model\.encoder\.layer\.(\d+)\.", name) for name in weights]
    try:
        vocabulary, width = weights["model.embeddings.word_embeddings.weight"].shape
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
            "num_attention_heads": width // _HEAD_WIDTH,
            "intermediate_size": weights["model.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "position_buckets": weights["model.encoder.rel_embeddings.weight"].shape[0] // 2,
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the weights in {str(folder)!r} are not those of DeBERTa-v3 with a linear layer ({error}): copy the "
            "folder again"
        ) from error

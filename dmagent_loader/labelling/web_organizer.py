"""WebOrganizer's topic classifier: gte-base-en-v1.5 with a classification head, 24 topics (arXiv 2502.10341).

The published checkpoint needs code from the Hub (``trust_remote_code``). It is not run: transformers has the same
network as `GteForSequenceClassification`, and the weights are renamed for it here. The classifier reads the text
without its URL, as the published variant *TopicClassifier-NoURL* does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import CheckpointError, require_extra
from dmagent_loader.labelling.taxonomy import WEB_ORGANIZER, topic_of
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

MODEL_TYPE = "new"
_MAX_TOKENS = 8192
_MAX_CHARACTERS = 16 * _MAX_TOKENS
"""More characters than `_MAX_TOKENS` tokens of any text have, to bound the work of the tokenizer."""
_RENAMED = (
    ("new.", "gte."),
    ("encoder.layer.", "layers."),
    ("attention.o_proj", "self_attn.o_proj"),
    ("attn_ln", "post_attention_layernorm"),
    ("mlp_ln", "post_mlp_layernorm"),
)
_SPLIT = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
}
_FIXED = {"position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False}
_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
)


def is_web_organizer(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a classifier on this network."""
    return config.get("model_type") == MODEL_TYPE


def load_web_organizer(
    folder: Path, config: Mapping[str, Any], *, name: str, device: str | None, batch_size: int
) -> TransformerClassifier:
    """Loads a classifier from a local folder.

    Raises:
        CheckpointError: The folder does not hold such a classifier, or transformers is too old for it.
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "label")
    if not hasattr(transformers, "GteForSequenceClassification"):
        raise CheckpointError(
            f"transformers {transformers.__version__} lacks the network of WebOrganizer's classifier: upgrade it "
            "(pip install -U transformers), or use NVIDIA's classifier"
        )
    other = {key: config[key] for key, value in _FIXED.items() if config.get(key, value) != value}
    if other:
        raise CheckpointError(f"the classifier {str(folder)!r} has the settings {other}, and only {_FIXED} are known")
    labels = labels_of(config, folder)
    if any(topic_of(label) is None for label in labels) and len(labels) == len(WEB_ORGANIZER):
        labels = tuple(WEB_ORGANIZER)  # the labels are numbers, or abbreviations: the order is that of the taxonomy
    settings = {key: config[key] for key in _COPIED if key in config}
    theta = float(config.get("rope_theta", 10_000.0))
    try:
        network = transformers.GteForSequenceClassification(
            transformers.GteConfig(
                **settings,
                num_labels=len(labels),
                rope_parameters={"rope_type": "default", "rope_theta": theta},
            )
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the config.json of the classifier {str(folder)!r} cannot be used: {error}") from error
    load_weights(network, _renamed(read_weights(folder)), folder)
    place = chosen_device(device)
    model: Any = placed(network, place)
    # After the cast to the precision of inference, which would shift the positions of long texts.
    rotary = model.gte.rotary_emb
    rotary.inv_freq = _frequencies(theta, config.get("rope_scaling"), 2 * len(rotary.inv_freq), folder).to(place)

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
        return found

    return TransformerClassifier(
        name=versioned(name, folder),
        labels=labels,
        logits=logits,
        tokenizer=load_tokenizer(folder),
        device=place,
        batch_size=batch_size,
        max_tokens=_MAX_TOKENS,
        max_characters=_MAX_CHARACTERS,
    )


def _renamed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published weights by the names of transformers' network; joint projections are split."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        joint = next((joint for joint in _SPLIT if joint in name), None)
        if joint is None:
            result[name] = tensor
        else:
            parts = tensor.chunk(len(_SPLIT[joint]))
            result |= {name.replace(joint, part): piece for part, piece in zip(_SPLIT[joint], parts, strict=True)}
    return result


def _frequencies(theta: float, scaling: Any, width: int, folder: Path) -> torch.Tensor:
    """Rotary frequencies, (width / 2,), with the fixed NTK scaling of gte-base-en-v1.5.

    The published network computes its table once, for ``factor`` times the longest input, and so always with the scaled
    base theta * factor and the frequencies divided by factor^(2 / width).

    Raises:
        CheckpointError: The scaling is of another kind.
    """
    factor = 1.0
    if scaling is not None:
        kind = scaling.get("type") if isinstance(scaling, Mapping) else None
        if kind != "ntk" or scaling.get("mixed_b") is not None or not is_finite_number(scaling.get("factor")):
            raise CheckpointError(f"the classifier {str(folder)!r} has rope_scaling {shown(scaling)}, not fixed NTK")
        factor = float(scaling["factor"])
    exponents = torch.arange(0, width, 2) / width
    frequencies: torch.Tensor = torch.full_like(exponents, theta * factor).pow(-exponents) / factor ** (2 / width)
    return frequencies

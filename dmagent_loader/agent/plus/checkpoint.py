"""Checkpoints of `dmagent-plus`: ``config.json``, ``model.safetensors`` and a model card, as for the other agents."""

from __future__ import annotations

import os

import torch

from dmagent_loader._validation import is_count, shown
from dmagent_loader.agent.checkpoint import (
    CONFIG_FILE,
    PLUS,
    WEIGHTS_FILE,
    name_of,
    read_config,
    read_weights,
    resolve,
    write_checkpoint,
)
from dmagent_loader.agent.plus.network import PlusNetwork, shapes
from dmagent_loader.agent.plus.observation import DOMAIN_FEATURES, RUN_FEATURES
from dmagent_loader.errors import CheckpointError

MOST = 4096
"""Largest width and number of attention heads."""


def save(network: PlusNetwork, directory: str | os.PathLike[str], *, card: str | None = None) -> None:
    """Writes a checkpoint folder; weights are rounded to float32.

    Args:
        network: The network.
        directory: Created if missing.
        card: Text of ``README.md``; None: the file is not written.

    Raises:
        CheckpointError: A weight is not finite.
    """
    config = {
        "kind": PLUS,
        "width": network.width,
        "queries": network.queries,
        "domain_features": list(DOMAIN_FEATURES),
        "run_features": list(RUN_FEATURES),
    }
    tensors = {name: torch.from_numpy(value.copy()) for name, value in network.weights.items()}
    write_checkpoint(directory, config, tensors, owner="the network", card=card)


def load(name_or_path: str | os.PathLike[str]) -> tuple[PlusNetwork, str]:
    """A network and its name.

    Args:
        name_or_path: Name of a bundled checkpoint, directory or Hub id.

    Raises:
        CheckpointError: It cannot be found or read, is of another kind, or reads other features than this version.
    """
    directory = resolve(name_or_path)
    values = read_config(directory)
    path = directory / CONFIG_FILE
    if values.get("kind") != PLUS:
        raise CheckpointError(
            f"{path} has the kind {shown(values.get('kind'))}, not {PLUS!r}: load it with MixingAgent.from_pretrained"
        )
    if (values.get("domain_features"), values.get("run_features")) != (list(DOMAIN_FEATURES), list(RUN_FEATURES)):
        raise CheckpointError(
            f"{path} reads other features than this version of dmagent_loader computes: install the version that it "
            "was trained with, or train it again"
        )
    sha256 = values.get("weights_sha256")
    width, queries = (int(v) if is_count(v) else 0 for v in (values.get("width", 0), values.get("queries", 0)))
    if not 0 < queries <= width <= MOST or width % queries or not isinstance(sha256, str):
        raise CheckpointError(
            f"{path} has width {shown(values.get('width'))}, queries {shown(values.get('queries'))} and weights_sha256 "
            f"{shown(sha256)}, which do not describe a network: fetch the checkpoint again"
        )
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes(width, queries).items()}
    weights = read_weights(directory / WEIGHTS_FILE, sha256, expected)
    network = PlusNetwork({name: tensor.double().numpy() for name, tensor in weights.items()})
    return network, name_of(name_or_path, directory)

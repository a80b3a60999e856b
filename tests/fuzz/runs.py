"""Harnesses for what a run loads: checkpoints of agents and states. They import torch, the others do not."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz.inputs import Choices, edit_seeds, edited, expect, folder, json_seeds

from dmagent_loader import ReadingConfig
from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.checkpoint import read_agent_config, read_weights
from dmagent_loader.errors import CheckpointError, StateError
from dmagent_loader.mixture.history import FeedbackStatistics
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.testing import write_toy_shards


def check_checkpoint(data: bytes) -> None:
    """Loads a checkpoint whose config or weights were edited, the digest put right or not.

    Building the network takes 10 ms and reads nothing; only one in 64 inputs goes all the way.
    """
    home, config, weights, expected = _checkpoint()
    choices = Choices(data)
    mode, whole = choices.byte() % 4, choices.byte() % 64 == 1
    if mode == 0:
        text = choices.rest()
    else:
        if mode == 1:
            config = edited(config, choices)
        elif mode == 2:
            weights = _edited_weights(weights, choices)
        else:
            weights = choices.rest()
        if isinstance(config, dict) and mode != 1:
            config = {**config, "weights_sha256": hashlib.sha256(weights).hexdigest()}
        text = json.dumps(config).encode()
    (home / "config.json").write_bytes(text)
    (home / "model.safetensors").write_bytes(weights)
    try:
        found, sha256 = read_agent_config(home)
        loaded = (
            MixingAgent.from_pretrained(home).state_dict()
            if whole
            else read_weights(home / "model.safetensors", sha256, expected)
        )
    except CheckpointError as error:
        expect(error)
        return
    assert found.num_layers
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.values())


def check_state(data: bytes) -> None:
    """Restores a sampler from a state that was edited; what is accepted gives samples and the same state again."""
    sampler, state = _sampler()
    choices = Choices(data)
    if choices.byte() % 4:
        edit = edited(state, choices)
    else:
        try:
            edit = json.loads(choices.rest())
        except (ValueError, RecursionError):
            return
    try:
        sampler.load_state_dict(edit)
    except StateError as error:
        expect(error)
        return
    again = sampler.state_dict(consumed=edit["consumed"])
    assert again["counts"] == edit["counts"]
    json.dumps(again, allow_nan=False)


def _edited_weights(weights: bytes, choices: Choices) -> bytes:
    size = int.from_bytes(weights[:8], "little")
    header = json.dumps(edited(json.loads(weights[8 : 8 + size]), choices)).encode()
    declared = len(header) if choices.byte() % 4 else abs(choices.integer())
    return struct.pack("<Q", declared % 2**64) + header + weights[8 + size :] + bytes(choices.byte() % 9)


@functools.cache
def _checkpoint() -> tuple[Path, dict[str, Any], bytes, dict[str, torch.Tensor]]:
    """A folder; config, weights and tensors of an agent of a few hundred weights."""
    home = folder() / "agent"
    config = AgentConfig(
        d_model=4,
        num_layers=1,
        num_heads=2,
        d_ff=4,
        domains=("source/a", "target/b"),
        statistics=FeedbackStatistics(mean=(0.0, 0.0), std=(1.0, 1.0), count=1),
    )
    agent = MixingAgent(config)
    agent.save_pretrained(home)
    values, weights = ((home / name).read_bytes() for name in ("config.json", "model.safetensors"))
    return home, json.loads(values), weights, agent.state_dict()


@functools.cache
def _sampler() -> tuple[AgentWeightedSampler, dict[str, Any]]:
    """A sampler with a policy, and its state after two decisions."""
    shards = write_toy_shards(folder() / "shards", {"source/a": 30, "target/b": 20})
    sampler = AgentWeightedSampler(
        shards,
        policy=StaticPolicy({"source/a": 0.25, "target/b": 0.75}),
        samples_per_reweight=8,
        reading=ReadingConfig(cache_dir=folder() / "cache", progress=False),
    )
    stream = iter(sampler)
    for consumed in (0, 8, 16):
        sampler.reweight({"general": -2.0 - consumed / 100, "math": -3.0}, consumed=consumed)
        for _ in range(8):
            next(stream)
    return sampler, json.loads(json.dumps(sampler.state_dict(consumed=20)))


HARNESSES: dict[str, Callable[[bytes], None]] = {"checkpoint": check_checkpoint, "state": check_state}

SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "checkpoint": lambda: [
        *edit_seeds(),
        b"\x03\x01" + _checkpoint()[2],
        b"\0\0" + json.dumps(_checkpoint()[1]).encode(),
    ],
    "state": lambda: json_seeds(_sampler()[1]),
}

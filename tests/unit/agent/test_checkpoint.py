"""Checkpoints: what was saved is what is loaded, and everything else is refused with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dmagent_loader.agent import AgentConfig, MixingAgent, list_bundled
from dmagent_loader.agent.checkpoint import is_plus
from dmagent_loader.agent.config import SCHEMA_VERSION
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.errors import CheckpointError
from dmagent_loader.mixture.history import FeedbackStatistics, History


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other weights with a digest that fits, so that what is refused is the weights themselves."""
    put_bytes(directory, safetensors.torch.save(weights))


def put_bytes(directory: Path, data: bytes) -> None:
    (directory / "model.safetensors").write_bytes(data)
    edit_config(directory, weights_sha256=hashlib.sha256(data).hexdigest())


def with_header(header: dict[str, Any] | bytes, body: bytes = b"", declared: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if declared is None else declared).to_bytes(8, "little") + raw + body


def test_round_trip_is_bitwise(agent: MixingAgent, saved: Path, make_history: Callable[..., History]) -> None:
    loaded = MixingAgent.from_pretrained(saved)
    assert loaded.config == agent.config
    assert loaded.name == "seven"
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    np.testing.assert_array_equal(loaded.propose(make_history(30)), agent.propose(make_history(30)))


def test_a_loaded_agent_can_be_trained_further(saved: Path) -> None:
    loaded = MixingAgent.from_pretrained(saved)
    loaded(torch.rand(1, 3, 54)).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "seven"
    MixingAgent.from_pretrained(saved).save_pretrained(again)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_loading_touches_neither_random_numbers_nor_default_dtype_nor_default_device(saved: Path) -> None:
    """Building the network the plain way draws two million random numbers, and follows torch's defaults."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index,union-attr] # noqa: NPY002
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            loaded = MixingAgent.from_pretrained(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in loaded.parameters()} == {(torch.float32, "cpu")}
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002
    assert states[2] == random.getstate()


def test_the_generated_card_states_the_facts_and_a_given_card_is_kept(agent: MixingAgent, tmp_path: Path) -> None:
    agent.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "2,125,568 parameters" in card
    assert "| acquire | -4 | 0.5 |" in card
    agent.save_pretrained(tmp_path / "a", card="# mine\n")
    assert (tmp_path / "a" / "README.md").read_text() == "# mine\n"


def test_an_agent_that_could_not_be_used_is_not_saved(tmp_path: Path) -> None:
    small = AgentConfig(d_model=16, num_heads=2, d_ff=32)
    with pytest.raises(CheckpointError, match="no feedback statistics"):
        MixingAgent(small).save_pretrained(tmp_path / "a")
    diverged = MixingAgent(
        AgentConfig(
            d_model=16, num_heads=2, d_ff=32, statistics=FeedbackStatistics(mean=(0.0, 0.0), std=(1.0, 1.0), count=1)
        )
    )
    with torch.no_grad():
        diverged.head.weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite in head.weight: it is not saved"):
        diverged.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"has no {name}"):
        MixingAgent.from_pretrained(saved)


def test_one_changed_bit_is_noticed(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="weights were changed"):
        MixingAgent.from_pretrained(saved)


def test_weights_of_another_width_are_refused(saved: Path) -> None:
    statistics = FeedbackStatistics(mean=(0.0, 0.0), std=(1.0, 1.0), count=1)
    narrow = MixingAgent(AgentConfig(d_model=128, statistics=statistics))
    replace_weights(saved, dict(narrow.state_dict()))
    with pytest.raises(CheckpointError, match=r"shape \[.*\], but the config describes \[.*\]"):
        MixingAgent.from_pretrained(saved)


def test_a_config_that_describes_another_width_is_refused(saved: Path) -> None:
    edit_config(saved, d_model=128)
    with pytest.raises(CheckpointError, match="of different models"):
        MixingAgent.from_pretrained(saved)


def test_a_config_of_an_enormous_model_is_refused_before_any_memory_is_taken(saved: Path) -> None:
    edit_config(saved, d_model=2**24, d_ff=2**26)
    with pytest.raises(CheckpointError, match=r"different models|truncated|shape"):
        MixingAgent.from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved: Path, agent: MixingAgent, value: float) -> None:
    weights = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    weights["norm.weight"][5] = value
    replace_weights(saved, weights)
    with pytest.raises(CheckpointError, match=r"not finite in norm\.weight"):
        MixingAgent.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 7, 100, 5_000, -1])
def test_a_truncated_file_is_refused(saved: Path, kept: int) -> None:
    put_bytes(saved, (saved / "model.safetensors").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        MixingAgent.from_pretrained(saved)


@pytest.mark.parametrize("declared", [2**63, 2**64 - 1, 2**20 + 1, 10_000_000])
def test_a_header_that_declares_too_much_is_refused(saved: Path, declared: int) -> None:
    body = (saved / "model.safetensors").read_bytes()[8:]
    put_bytes(saved, with_header(b"", body, declared))
    with pytest.raises(CheckpointError, match=f"declares a header of {declared}"):
        MixingAgent.from_pretrained(saved)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1, 2]",
        b"[" * 200_000,
        b'{"head.weight": 3}',
        b'{"head.weight": {"dtype": "F32", "shape": [1]}}',
        b'{"head.weight": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_header_is_refused(saved: Path, header: bytes) -> None:
    put_bytes(saved, with_header(header, b"0" * 64))
    with pytest.raises(CheckpointError, match=r"header of .* is damaged"):
        MixingAgent.from_pretrained(saved)


def test_overlapping_tensors_are_refused(saved: Path) -> None:
    """Every entry is plausible alone; only the parser of safetensors sees that two share their bytes."""
    data = (saved / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["blocks.1.attention.k_proj.weight"]["data_offsets"] = header["blocks.1.attention.q_proj.weight"][
        "data_offsets"
    ]
    put_bytes(saved, with_header(header, data[8 + size :]))
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        MixingAgent.from_pretrained(saved)


def test_missing_and_unexpected_tensors_are_named(saved: Path, agent: MixingAgent) -> None:
    weights = dict(agent.state_dict())
    weights["critic.weight"] = weights.pop("head.weight")
    replace_weights(saved, weights)
    with pytest.raises(
        CheckpointError, match=r"lacks tensors \['head.weight'\] and has unexpected \['critic.weight'\]"
    ):
        MixingAgent.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_another_dtype_is_refused(saved: Path, agent: MixingAgent, dtype: torch.dtype) -> None:
    replace_weights(saved, {name: tensor.to(dtype) for name, tensor in agent.state_dict().items()})
    with pytest.raises(CheckpointError, match="stored as F32"):
        MixingAgent.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a JSON list"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "no weights_sha256"),
        (" " * 2_000_000, "2000000 bytes, more than the 1048576 expected"),
    ],
)
def test_a_config_that_is_none_is_refused(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        MixingAgent.from_pretrained(saved)


def test_a_newer_schema_asks_for_a_newer_package(saved: Path) -> None:
    edit_config(saved, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(CheckpointError, match="install a newer dmagent-loader"):
        MixingAgent.from_pretrained(saved)


def test_a_pickle_in_place_of_the_weights_is_never_executed(saved: Path, tmp_path: Path) -> None:
    """torch.load would run it."""

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save(Touch(), saved / "model.safetensors")
    data = (saved / "model.safetensors").read_bytes()
    edit_config(saved, weights_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(CheckpointError):
        MixingAgent.from_pretrained(saved)
    assert not (tmp_path / "executed").exists()


def test_a_save_that_fails_midway_leaves_the_old_checkpoint_whole(saved: Path, agent: MixingAgent) -> None:
    """A real limit on file sizes stops the second save inside the weights. Fails for one that writes in place."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = MixingAgent(agent.config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            other.save_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_save_that_ends_between_its_files_is_refused_at_load(saved: Path, agent: MixingAgent) -> None:
    """New weights beside the old config are what a crash before the last rename leaves."""
    weights = MixingAgent(agent.config).state_dict()
    (saved / "model.safetensors").write_bytes(safetensors.torch.save(dict(weights)))
    with pytest.raises(CheckpointError, match="a save was interrupted"):
        MixingAgent.from_pretrained(saved)


def test_files_get_the_users_usual_permissions(saved: Path) -> None:
    """Temporary files are private; a checkpoint on a shared disk must be readable by others."""
    (saved / "plain").write_text("")
    usual = (saved / "plain").stat().st_mode
    assert {(saved / name).stat().st_mode for name in ("config.json", "model.safetensors", "README.md")} == {usual}


def test_every_bundled_checkpoint_loads() -> None:
    for name in list_bundled():
        loaded = checkpoint.load(name)[1] if is_plus(name) else MixingAgent.from_pretrained(name).name
        assert loaded == name


def test_relative_paths_load(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert MixingAgent.from_pretrained("seven").name == "seven"
    monkeypatch.chdir(saved)
    assert MixingAgent.from_pretrained(".").name == "seven"


def test_an_unknown_name_is_refused_with_the_bundled_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'dmagent-nonesuch': it is neither bundled \("):
        MixingAgent.from_pretrained("dmagent-nonesuch")
    with pytest.raises(CheckpointError, match="neither bundled"):
        MixingAgent.from_pretrained(Path("org/name"))

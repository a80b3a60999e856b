"""Checkpoints written to do harm: each is refused with a `CheckpointError` that names the file, in bounded time.

What a damaged or foreign checkpoint does is in `tests/unit/agent/test_checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.critic import CriticConfig, MixingCritic, load_critics, save_critics
from dmagent_loader.errors import CheckpointError
from dmagent_loader.mixture.history import FeedbackStatistics

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small agent, saved."""
    config = AgentConfig(
        d_model=8,
        num_heads=2,
        d_ff=8,
        statistics=FeedbackStatistics(mean=(0.0, 0.0), std=(1.0, 1.0), count=4),
    )
    MixingAgent(config).save_pretrained(tmp_path / "agent")
    return tmp_path / "agent"


def load_and_fail(folder: Path, match: str | None = None) -> str:
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=match) as error:
        MixingAgent.from_pretrained(folder)
    assert time.perf_counter() - begin < 10
    text = str(error.value)
    assert str(folder) in text
    assert len(text) < 3000
    return text


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another header in front of the same tensors, with a digest that fits."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    put_weights(folder, json.dumps(header).encode(), data[8 + size :])


def put_weights(folder: Path, header: bytes, body: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + body
    (folder / "model.safetensors").write_bytes(data)
    edit_config(folder, lambda values: values.update(weights_sha256=hashlib.sha256(data).hexdigest()))


HUGE = 10**400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_model", HUGE),
        ("d_model", 2**62),
        ("d_model", True),
        ("d_model", 8.0),
        ("d_ff", 2**40),
        ("num_heads", 2**63),
        ("num_layers", 10**9),
        ("max_steps", -1),
        ("rope_theta", HUGE),
        ("rope_theta", float("nan")),
        ("rope_theta", float("inf")),
        ("norm_eps", -1e-6),
        ("norm_eps", False),
        ("prior_weight", HUGE),
        ("prior_weight", "10"),
        ("domains", "abc"),
        ("domains", {"a": 1}),
        ("domains", ["a", "a"]),
        ("domains", ["a", 3]),
        ("domains", [["a"]]),
        ("domains", [f"domain {n}" for n in range(30_000)]),
        ("feedback_roles", []),
        ("standardization", "x" * 100_000),
        ("standardization", {"a": 1}),
        ("statistics", {"mean": "12", "std": [1, 1], "count": 3}),
        ("statistics", {"mean": [HUGE, 0], "std": [1, 1], "count": 3}),
        ("statistics", {"mean": [0, 0], "std": [float("nan"), 1], "count": 3}),
        ("statistics", {"mean": [0, 0], "std": [1, 1], "count": float("inf")}),
        ("statistics", {"mean": [0, 0], "std": [1, 1], "count": HUGE}),
        ("statistics", {"mean": [0, 0], "std": [1, 1], "count": -3}),
        ("statistics", {"mean": [None, 0], "std": [1, 1], "count": 3}),
        ("statistics", [1, 2]),
        ("statistics", 0),
        ("schema_version", 2),
        ("schema_version", HUGE),
        ("schema_version", [[[1]]]),
        ("weights_sha256", 3),
        ("weights_sha256", "0" * 64),
        ("weights_sha256", "z" * 100_000),
        ("unknown" * 1000, 1),
        ("__class__", "os.system"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_configs_that_cannot_be_are_refused_by_name(saved: Path, key: str, value: Any) -> None:
    """Fails for one that trusts JSON's integers, which no float and no tensor library holds."""
    edit_config(saved, lambda values: values.update({key: value}))
    load_and_fail(saved)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b'{"a": ' * 100_000,
        b"1" * 100_000,
        b'"' + b"x" * 500_000 + b'"',
        b"{}" + b" " * (2 << 20),
    ],
)
def test_configs_that_are_no_json_object_are_refused(saved: Path, text: bytes) -> None:
    (saved / "config.json").write_bytes(text)
    load_and_fail(saved)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["named pipe", "character device", "folder"])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(saved: Path, name: str, kind: str) -> None:
    """An unpacked archive may hold a link to /dev/zero: its size is 0, its bytes have no end."""
    path = saved / name
    path.unlink()
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "character device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    load_and_fail(saved, "directory" if kind == "folder" else kind)


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header["head.weight"]
    return entry


@pytest.mark.parametrize(
    "change",
    [
        lambda header: _first(header).update(data_offsets=[0, float("inf")]),
        lambda header: _first(header).update(data_offsets=[0, float("nan")]),
        lambda header: _first(header).update(data_offsets=[0, HUGE]),
        lambda header: _first(header).update(data_offsets=[-8, 0]),
        lambda header: _first(header).update(data_offsets=[8, 4]),
        lambda header: _first(header).update(data_offsets=[0.5, 1.5]),
        lambda header: _first(header).update(data_offsets=[0]),
        lambda header: _first(header).update(data_offsets="08"),
        lambda header: _first(header).update(shape=[HUGE, 8]),
        lambda header: _first(header).update(shape=[-52, -8]),
        lambda header: _first(header).update(shape="x" * 100_000),
        lambda header: _first(header).update(shape=None),
        lambda header: _first(header).update(dtype="F64"),
        lambda header: _first(header).update(dtype="X" * 100_000),
        lambda header: _first(header).update(dtype=[[]]),
        lambda header: header.update({"head.weight": [1]}),
        lambda header: header.update({"x" * 100_000: header["head.weight"]}),
        lambda header: header.update({"__metadata__": {"format": 3}}),
        lambda header: header.update({"__metadata__": [[[]]]}),
        lambda header: header.pop("head.weight"),
        lambda header: header.clear(),
        lambda header: _first(header).update(data_offsets=header["norm.weight"]["data_offsets"]),
    ],
)
def test_headers_of_weights_that_lie_are_refused_by_name(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_header(saved, change)
    load_and_fail(saved)


def test_a_tensor_that_is_named_twice_is_refused(saved: Path) -> None:
    """Readers differ in which of the two they take: checks that see one and a loader that takes the other."""
    data = (saved / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(header)["head.weight"]).encode()
    put_weights(saved, header[:-1] + b', "head.weight": ' + entry + b"}", data[8 + size :])
    load_and_fail(saved, "comes twice")


@pytest.mark.parametrize("declared", [0, 1, 7, 2**20 + 1, 2**32, 2**63, 2**64 - 1])
def test_headers_of_lengths_that_cannot_be_are_refused(saved: Path, declared: int) -> None:
    data = declared.to_bytes(8, "little") + (saved / "model.safetensors").read_bytes()[8:]
    (saved / "model.safetensors").write_bytes(data)
    edit_config(saved, lambda values: values.update(weights_sha256=hashlib.sha256(data).hexdigest()))
    load_and_fail(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_named_with_its_tensor(saved: Path, value: float) -> None:
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    weights["blocks.1.feed_forward_norm.weight"][3] = value
    data = safetensors.torch.save(weights)
    (saved / "model.safetensors").write_bytes(data)
    edit_config(saved, lambda values: values.update(weights_sha256=hashlib.sha256(data).hexdigest()))
    load_and_fail(saved, r"not finite in blocks\.1\.feed_forward_norm\.weight")


def test_every_changed_byte_is_noticed(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    for place in range(0, len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        load_and_fail(saved)
    path.write_bytes(data)
    MixingAgent.from_pretrained(saved)


def test_a_large_file_is_refused_before_it_is_read(saved: Path) -> None:
    os.truncate(saved / "model.safetensors", 1 << 40)
    tracemalloc.start()
    load_and_fail(saved, "of different models")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_domains", HUGE),
        ("d_model", 2**40),
        ("low", HUGE),
        ("low", float("nan")),
        ("span", float("inf")),
        ("span", True),
        ("num_critics", 10**9),
        ("num_critics", [1]),
        ("schema_version", 7),
        ("weights_sha256", None),
        ("extra", 1),
    ],
)
def test_critics_that_cannot_be_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "critic"
    save_critics([MixingCritic(CriticConfig(d_model=8, num_heads=2, d_ff=8, low=-1.0, span=2.0))], folder)
    load_critics(folder)
    edit_config(folder, lambda values: values.update({key: value}))
    with pytest.raises(CheckpointError, match="critic") as error:
        load_critics(folder)
    assert len(str(error.value)) < 3000

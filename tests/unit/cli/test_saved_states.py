"""The state of a run is found in whatever holds it, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from dmagent_loader import AgentWeightedSampler, ReadingConfig, save_state
from dmagent_loader.cli.saved_states import find_saved_state
from dmagent_loader.errors import StateError
from dmagent_loader.testing import write_toy_shards

State = dict[str, Any]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[int, State]:
    """States of one run by consumed samples, and of a run with another seed under -1."""
    folder = tmp_path_factory.mktemp("run")
    shards = write_toy_shards(folder / "shards", {"source/web": 60, "target/math": 40})

    def build(seed: int) -> AgentWeightedSampler:
        reading = ReadingConfig(cache_dir=folder / "cache", progress=False)
        return AgentWeightedSampler(shards, samples_per_reweight=10, seed=seed, reading=reading)

    sampler = build(0)
    return {**{consumed: sampler.state_dict(consumed=consumed) for consumed in (10, 20, 30)}, -1: build(1).state_dict()}


def trainer_state(state: State) -> State:
    attributes = {"sampler": state, "environment": None, "samples_per_step": 5}
    held = {"DataMixingCallback": {"args": {}, "attributes": attributes}, "EarlyStoppingCallback": {"args": {}}}
    return {"global_step": 4, "max_steps": 50, "log_history": [{"loss": 1.0}], "stateful_callbacks": held}


def lightning(state: State) -> dict[str, Any]:
    callbacks = {"DataMixingCallback": {"sampler": state, "environment": None}, "ModelCheckpoint{}": {"monitor": None}}
    return {"state_dict": {"weight": torch.zeros(4)}, "global_step": 4, "callbacks": callbacks}


def nemo(state: State) -> dict[str, Any]:
    module = {"consumed_samples": state["consumed"], "sampler": json.dumps(state)}
    return {"global_step": 4, "AgentWeightedDataModule": module, "optimizer": [{"step": torch.tensor(4.0)}]}


def megatron(state: State) -> dict[str, Any]:
    return {"optimizer": {}, "any name": {"json": json.dumps({"sampler": state, "environment": None})}, "step": 4}


def megatron_lm(state: State) -> dict[str, Any]:
    return {"dataloader_state_dict": {"json": json.dumps({"sampler": state, "environment": None})}}


def put(path: Path, value: Any) -> Path:
    """Writes JSON or a torch file, by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        save_state(path, value)
    elif path.name == ".metadata":
        parts = {"common_state/shard_0_1": [value], "weight": torch.ones(3), "extra/shard_0_1": [b"ledger"]}
        checkpoint.save(parts, checkpoint_id=path.parent, no_dist=True)
    else:
        torch.save(value, path)
    return path


KINDS = [
    ("state.json", dict),
    ("mixing.json", lambda state: {"step": 4, "sampler": state, "environment": None}),
    ("checkpoint-4/trainer_state.json", trainer_state),
    ("lightning_logs/version_0/checkpoints/epoch=0-step=4.ckpt", lightning),
    ("lightning_logs/version_0/checkpoints/step=4.ckpt/meta.pt", lightning),
    ("checkpoint_0/custom_checkpoint_0.pkl", lambda state: {"sampler": state, "environment": None}),
    ("checkpoints/run--step=4/weights/common.pt", nemo),
    ("iter_0000004/common.pt", megatron),
    ("iter_0000004/.metadata", megatron),
    ("iter_0000004/train_dataloader_dprank000.pt", megatron_lm),
]


@pytest.mark.parametrize(("name", "wrap"), KINDS, ids=[name for name, _ in KINDS])
def test_a_state_is_found_by_its_file_and_by_any_folder_above(name, wrap, states, tmp_path):
    path = put(tmp_path / name, wrap(states[20]))
    put(tmp_path / "other.json", {"settings": [1, 2]})
    torch.save({"rng": torch.zeros(2)}, path.parent / "rng_state.pth")
    for place in (path, path.parent, tmp_path):
        found = find_saved_state(place)
        assert found.state == states[20]
        assert found.path == path


@pytest.mark.parametrize(("name", "wrap"), KINDS, ids=[name for name, _ in KINDS])
def test_of_one_runs_checkpoints_the_newest_is_taken(name, wrap, states, tmp_path):
    """By consumed samples: names need not sort (checkpoint-9, checkpoint-10), and files may be copied."""
    for number, consumed in enumerate((20, 30, 10)):
        put(tmp_path / str(number) / name, wrap(states[consumed]))
    found = find_saved_state(tmp_path)
    assert found.state == states[30]
    assert found.path == tmp_path / "1" / name


def test_the_trainers_own_end_comes_with_its_state(states, tmp_path):
    put(tmp_path / "trainer_state.json", trainer_state(states[20]))
    assert find_saved_state(tmp_path).last_sample == 20 + (50 - 4) * 5
    put(tmp_path / "state.json", states[20])
    assert find_saved_state(tmp_path / "state.json").last_sample is None


def test_states_of_several_runs_are_refused_by_name(states, tmp_path):
    put(tmp_path / "first" / "state.json", states[20])
    put(tmp_path / "second" / "state.json", states[-1])
    with pytest.raises(StateError, match=r"several runs, in \[.*first.state\.json.*second.state\.json"):
        find_saved_state(tmp_path)


def decided(folder: Path, last: float) -> list[State]:
    """States of a run with the default seed after each of three decisions, on feedback that ends at `last`."""
    shards = write_toy_shards(folder / "shards", {"source/web": 60, "target/math": 40})
    reading = ReadingConfig(cache_dir=folder / "cache", progress=False)
    sampler = AgentWeightedSampler(shards, policy="uniform", samples_per_reweight=10, reading=reading)
    states, stream = [], iter(sampler)
    for step, feedback in enumerate((-4.0, -3.5, last)):
        sampler.reweight({"general": feedback}, consumed=10 * step)
        states.append(sampler.state_dict(consumed=10 * step))
        for _ in range(10):
            next(stream)
    return states


def test_runs_with_the_same_seed_and_shards_are_told_apart(tmp_path):
    """A folder of runs that compare policies or learning rates: the page was about the longest of them, silently."""
    run, other = decided(tmp_path, -3.0), decided(tmp_path, -2.9)
    for number, state in enumerate(run):
        put(tmp_path / "runs" / "first" / f"{number}.json", state)
    assert find_saved_state(tmp_path / "runs").state == run[-1]
    put(tmp_path / "runs" / "second" / "2.json", {**other[-1], "consumed": 19})
    with pytest.raises(StateError, match=r"several runs, in \[.*first.2\.json.*second.2\.json'\]"):
        find_saved_state(tmp_path / "runs")


def test_a_mix_that_another_replaced_before_a_sample_was_drawn_belongs_to_the_run(tmp_path):
    shards = write_toy_shards(tmp_path / "shards", {"source/web": 60, "target/math": 40})
    sampler = AgentWeightedSampler(shards, reading=ReadingConfig(cache_dir=tmp_path / "cache", progress=False))
    for name, share in (("a", 0.2), ("b", 0.3)):
        sampler.set_mix({"source/web": share, "target/math": 1 - share})
        put(tmp_path / "run" / f"{name}.json", sampler.state_dict())
    assert find_saved_state(tmp_path / "run").path.name in ("a.json", "b.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b'{"stateful_callbacks": {}, "global_step": 4}'),
        ("state.json", b"[]"),
        ("state.json", b'{"ledger": []}'),
        ("notes.json", b'"the \\"ledger\\" is {"'),
    ],
)
def test_a_file_without_a_state_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StateError, match=r"does not contain the state of a sampler: pass a file of save_state\(\)"):
        find_saved_state(tmp_path / name)
    with pytest.raises(StateError, match=r"the folder .* does not contain the state of a sampler"):
        find_saved_state(tmp_path)


class Executed:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [Executed(), {"storage_data": Executed()}, [1], b"ledger"], ids=range(4))
def test_metadata_of_a_distributed_checkpoint_execute_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(StateError, match=r"metadata cannot be read as a torch file: .* does not list a common state"):
        find_saved_state(tmp_path / ".metadata")
    with pytest.raises(StateError, match=r"the folder .* does not contain the state of a sampler"):
        find_saved_state(tmp_path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["cut.json", "cut.ckpt", "noise.pt", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_refused(name, states, tmp_path):
    path = tmp_path / name
    if name == "cut.ckpt":
        whole = put(tmp_path / "whole.ckpt", lightning(states[20])).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(b'{"ledger": [' + os.urandom(100))
    with pytest.raises(StateError, match="cannot be read"):
        find_saved_state(path)


def test_a_path_without_anything_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"there is no file or folder .*nowhere"):
        find_saved_state(tmp_path / "nowhere")


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("in_folder", [False, True])
def test_nothing_in_a_checkpoint_is_executed(in_folder, states, tmp_path):
    """The file names a function that makes a folder: the folder must not be there afterwards."""
    mark = tmp_path / "executed"
    path = put(tmp_path / "run" / "last.ckpt", {**lightning(states[20]), "hyper_parameters": {"x": _Bomb(mark)}})
    with pytest.raises(StateError, match=r"could execute code when they are loaded: \['.*mkdir'\]") as error:
        find_saved_state(path.parent if in_folder else path)
    assert "save_state('state.json', entry)" in str(error.value)
    assert not mark.exists()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count the bytes of a process")
def test_tensors_are_not_read(states, tmp_path):
    """Catches a search that reads the weights of every checkpoint in a folder."""

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    put(tmp_path / "last.ckpt", {**lightning(states[20]), "weights": torch.zeros(1 << 23)})
    find_saved_state(tmp_path)  # what is imported at the first call is read, too
    before = bytes_read()
    find_saved_state(tmp_path)
    assert bytes_read() - before < 1 << 20

"""The stand-in for a GPU: what is on the CPU within it, what is undone after it, and scripts that it cannot run."""

from __future__ import annotations

import pytest
import torch

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.testing.on_cpu import cuda_on_cpu, main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the stand-in does nothing")


def test_tensors_and_modules_for_a_gpu_are_on_the_cpu():
    with cuda_on_cpu():
        made = [torch.zeros(2, device="cuda"), torch.zeros(2).cuda(), torch.zeros(2).to("cuda:0"), torch.ones(2).to(0)]
        made += [torch.nn.Linear(2, 2).cuda().weight, torch.zeros(2, pin_memory=True)]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert torch.cuda.current_device() == 0


def test_random_states_of_the_gpu_are_those_of_the_cpu():
    with cuda_on_cpu():
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3, device="cuda")
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("available", [False, True])
def test_a_driver_is_made_up_only_on_request(available):
    with cuda_on_cpu(available=available):
        assert torch.cuda.is_available() is available
        if available:
            assert torch.cuda.get_device_properties(0).total_memory > 0
            torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()  # asks for the stream of the accelerator


def test_nothing_of_it_is_left_afterwards():
    names = ("current_device", "is_available", "get_rng_state", "Stream", "default_generators")
    before = [getattr(torch.cuda, name) for name in names]
    with pytest.raises(ZeroDivisionError), cuda_on_cpu(available=True):
        raise ZeroDivisionError
    assert [getattr(torch.cuda, name) for name in names] == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_a_script_is_run_with_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [])
    script = tmp_path / "train.py"
    script.write_text("import sys, torch\ndef main():\n    print(sys.argv[1:], torch.zeros(1, device='cuda').device)\n")
    main([str(script), "--steps", "3"])
    assert capsys.readouterr().out == "['--steps', '3'] cpu\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no file cannot be run"),
        (["missing.py"], "missing.py cannot be run: pass the path of a Python script"),
        (["notes.txt"], "is not a Python file"),
        (["empty.py"], r"empty.py has no function main\(\)"),
    ],
)
def test_what_is_not_a_script_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])
    for name in ("notes.txt", "empty.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigurationError, match=message):
        main(arguments)

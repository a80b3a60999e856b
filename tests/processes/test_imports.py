"""A fresh process: the package is light to import, and an extra that is missing is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["transformers", "accelerate", "nemo", "megatron", "lightning", "d3rlpy", "gymnasium", "datasets", "matplotlib"]


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, dmagent_loader;"
        "dmagent_loader.AgentWeightedSampler, dmagent_loader.MixingAgent, dmagent_loader.Environment;"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_shards_loads_no_torch() -> None:
    program = (
        "import sys, dmagent_loader.shards; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_list_of_commands_and_one_about_shards_load_no_torch() -> None:
    for arguments in (["--help"], ["index", "--help"]):
        program = (
            f"import sys, dmagent_loader.cli as cli\n"
            f"try:\n    cli.main({arguments})\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()[0]) == (0, "usage:"), done.stderr


def test_influence_loads_no_fsdp_but_knows_a_model_that_is_wrapped_in_it() -> None:
    program = """
import sys, torch
from dmagent_loader.environment.gradients import Parameters
from dmagent_loader.errors import InfluenceError
assert "torch.distributed.fsdp" not in sys.modules
Parameters(torch.nn.Linear(2, 2))
from torch.distributed.fsdp import FullyShardedDataParallel
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
try:
    Parameters(FullyShardedDataParallel(torch.nn.Linear(2, 2), device_id=torch.device("cpu")))
except InfluenceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "FSDP 1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("package", "integration", "extra"),
    [("transformers", "huggingface", "hf"), ("lightning", "lightning", "lightning")],
)
def test_a_missing_extra_is_named(package, integration, extra):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        f"try:\n    import dmagent_loader.integrations.{integration}\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MissingExtraError" in done.stdout
    assert f"dmagent-loader[{extra}]" in done.stdout


def test_the_package_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "dmagent_loader", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "dmagent-loader")

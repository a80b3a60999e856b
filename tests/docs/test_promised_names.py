"""Names and arguments that users' scripts call: they stay where they are."""

from __future__ import annotations

import importlib
import inspect

import pytest

SAMPLER = "dmagent_loader.AgentWeightedSampler"
ENVIRONMENT = "dmagent_loader.Environment"
AGENT = "dmagent_loader.MixingAgent"
PROMISED = {
    SAMPLER: ["mix", "achieved", "set_mix", "reweight_due", "reweight", "state_dict", "load_state_dict", "ledger"],
    AGENT: ["from_pretrained", "save_pretrained", "num_parameters", "propose"],
    ENVIRONMENT: ["from_files", "evaluate", "influence"],
    "dmagent_loader.DomainSpace": [],
    "dmagent_loader.Mixing": ["begin", "due", "reweight", "finished", "state_dict", "load_state_dict"],
    "dmagent_loader.MixingDataLoader": [],
    "dmagent_loader.integrations.huggingface.DataMixingCallback": [],
    "dmagent_loader.integrations.huggingface.DataMixingTrainerMixin": [],
    "dmagent_loader.integrations.lightning.DataMixingCallback": [],
    "dmagent_loader.integrations.megatron.MegatronMixing": ["data_iterator", "begin", "step_end", "finished"],
}
"""Class -> its methods and attributes."""
ARGUMENTS = {
    SAMPLER: (
        "shards agent policy samples_per_reweight seed initial_mix exhausted rank world_size decode transform "
        "on_bad_row data"
    ),
    f"{SAMPLER}.set_mix": "weights",
    f"{SAMPLER}.reweight": "feedback consumed",
    f"{SAMPLER}.reweight_due": "consumed",
    f"{SAMPLER}.state_dict": "consumed",
    f"{SAMPLER}.load_state_dict": "state data",
    f"{ENVIRONMENT}.from_files": "files tokenizer",
    f"{ENVIRONMENT}.influence": "model rows_by_domain",
    f"{AGENT}.from_pretrained": "name_or_path",
}
COMMANDS = ["demo", "fit-mix", "index", "inspect", "simulate", "replay", "state", "report", "shard", "train-agent"]


def found(name: str) -> object:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


@pytest.mark.parametrize("name", PROMISED)
def test_the_promised_names_are_there(name: str) -> None:
    value = found(name)
    source = inspect.getsource(value)  # type: ignore[arg-type]
    for member in PROMISED[name]:
        assert hasattr(value, member) or f"self.{member}" in source, f"{name}.{member}"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_promised_arguments_are_there(name: str) -> None:
    arguments = inspect.signature(found(name)).parameters  # type: ignore[arg-type]
    assert set(ARGUMENTS[name].split()) <= set(arguments), list(arguments)


def test_the_promised_commands_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    from dmagent_loader.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)

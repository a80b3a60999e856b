"""Options that take lists."""

from __future__ import annotations

import pytest

from dmagent_loader.cli import build_parser

SHARD = ["shard", "--domain", "source/a=a.jsonl", "--output", "out"]
FILTER = ["filter", "--domain", "source/a=a.jsonl", "--output", "out"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (SHARD, "--keep-columns"),
        (SHARD, "--text-files"),
        (FILTER, "--text-files"),
        (FILTER, "--decontaminate"),
        (FILTER, "--drop-quality"),
        (["label", "--output", "out"], "--shards"),
        (["start-state"], "--data"),
        (["start-state"], "--shards"),
        (["fit-mix", "losses.csv", "--output", "mix.json"], "--test"),
    ],
)
def test_an_option_of_a_list_can_be_repeated(command: list[str], option: str) -> None:
    """Only the last list was taken, without a word."""
    args = build_parser().parse_args([*command, option, ".a", ".b", option, ".c"])
    assert list(map(str, getattr(args, option.removeprefix("--").replace("-", "_")))) == [".a", ".b", ".c"]


@pytest.mark.parametrize("command", [["state", "state.json"], ["simulate", "--mix", "source=0.7,target=0.3"]])
def test_an_option_of_one_value_that_others_can_repeat_is_refused_if_it_comes_twice(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`replay` takes several manifests; these compared and simulated the last one alone, without a word."""
    assert build_parser().parse_args([*command, "--shards", "a"]).shards == "a"
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--shards", "a", "--shards", "b"])
    assert "--shards is given twice, but this command takes one" in capsys.readouterr().err

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

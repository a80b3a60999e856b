"""The command line: ``dmagent``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dmagent_loader._compiled import why_in_python
from dmagent_loader._version import __version__
from dmagent_loader.errors import DMAgentError

__all__ = ["build_parser", "main"]


_COMMANDS = {
    "demo": ("demo", "compare four mixes on real text while a small model trains: a few minutes on two CPU cores"),
    "shard": ("shards", "write shards per domain from JSON lines, parquet, CSV, data sets and other kinds of data"),
    "index": ("shards", "index shards and list rows, bytes and damage"),
    "generate": ("generate", "let a base model write the documents of a source field"),
    "filter": ("filter", "drop repeated, contaminated, short and low-quality documents"),
    "label": ("label", "find the topic of every document, and sort documents by topic"),
    "compose": ("compose", "measure the topics of each domain on a sample of its rows"),
    "start-state": ("compose", "measure the topics of the base model's own training data, or of texts that it writes"),
    "simulate": ("plan", "predict when domains run out, before you spend GPU time"),
    "state": ("state", "describe a saved state, and what it takes to resume it with other shards"),
    "replay": ("state", "list the samples of a run from its saved state"),
    "report": ("report", "write a page about a run: mix, feedback, passes, decisions, forecast"),
    "inspect": ("inspect", "show an agent checkpoint, or what is in shards: topics, lengths, repeats"),
    "fit-mix": (
        "fit_mix",
        "fit RegMix or Olmix to a table of your proxy runs, and write the mix it predicts to be best",
    ),
    "train-agent": ("train_agent", "train an agent on trajectories of small proxy models"),
}
"""Command -> module of this package whose ``configure_COMMAND`` adds its options, and its help."""


class _Version(argparse.Action):
    """Prints the version and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"dmagent-loader {__version__}")
        if reason := why_in_python():
            print(f"Samples are ordered, and packed rows read, by loops in Python, not in C: {reason}.")
        parser.exit()


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        command: The only command that gets its options, which imports its module and, for some commands, torch; None:
            all commands get theirs.
    """
    parser = argparse.ArgumentParser(
        prog="dmagent",
        description="Data mixing for continual pre-training: shards, plans, agents.",
        epilog="`dmagent COMMAND --help` describes a command. `dmagent demo` shows a whole run in a few minutes.",
    )
    parser.add_argument("--version", action=_Version, help="show the version, and whether the loops in C are in use")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        of_command = commands.add_parser(name, help=text)
        if command in (None, name):
            configure = f"configure_{name.replace('-', '_')}"
            getattr(importlib.import_module(f"{__name__}.{module}"), configure)(of_command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; an error of this package becomes one line on stderr and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser(given[0] if given else "").parse_args(given)
    try:
        return int(args.run(args) or 0)
    except DMAgentError as error:
        print(f"dmagent {args.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the output is gone, as after `head`: not an error. Without the redirection, Python would report
        # it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"dmagent {args.command}: interrupted", file=sys.stderr)
        return 130

"""The command line: ``dmagent``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dmagent_loader._version import __version__
from dmagent_loader.cli.compose import add_compose_commands
from dmagent_loader.cli.demo import add_demo_command
from dmagent_loader.cli.filter import add_filter_command
from dmagent_loader.cli.fit_mix import add_fit_mix_command
from dmagent_loader.cli.generate import add_generate_command
from dmagent_loader.cli.inspect import add_inspect_command
from dmagent_loader.cli.label import add_label_command
from dmagent_loader.cli.plan import add_simulate_command
from dmagent_loader.cli.report import add_report_command
from dmagent_loader.cli.shards import add_shard_commands
from dmagent_loader.cli.state import add_state_commands
from dmagent_loader.cli.train_agent import add_train_agent_command
from dmagent_loader.errors import DMAgentError

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="dmagent",
        description="Data mixing for continual pre-training: shards, plans, agents.",
        epilog="`dmagent COMMAND --help` describes a command. `dmagent demo` shows a whole run in a few minutes.",
    )
    parser.add_argument("--version", action="version", version=f"dmagent-loader {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    add_demo_command(commands)
    add_shard_commands(commands)
    add_generate_command(commands)
    add_filter_command(commands)
    add_label_command(commands)
    add_compose_commands(commands)
    add_simulate_command(commands)
    add_state_commands(commands)
    add_report_command(commands)
    add_inspect_command(commands)
    add_fit_mix_command(commands)
    add_train_agent_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; an error of this package becomes one line on stderr and exit status 2."""
    args = build_parser().parse_args(arguments)
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

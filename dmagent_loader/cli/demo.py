"""``dmagent demo``: continual pre-training of a small language model in four ways, in minutes, without downloads."""

from __future__ import annotations

import argparse
import logging
import textwrap
from pathlib import Path

from dmagent_loader._demo.config import DEFAULT_AGENT, DemoConfig
from dmagent_loader.errors import require_extra


def configure_demo(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``demo``."""
    parser.description = (
        "Trains a small language model on the documentation of this Python installation, then continues in four "
        "ways with the same token budget: on source code only, half and half, and with mixes chosen by the agent "
        "and by the policy 'influence'. Writes a table, a chart and an HTML page. Downloads nothing."
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the results (%(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        help=(
            "text of your own: DATA/source/*.jsonl(.gz) and DATA/target*/*.jsonl(.gz) with a column 'text', "
            "DATA/env/general.jsonl(.gz) and DATA/env/<target>.jsonl(.gz) with the columns 'question' and 'answer'"
        ),
    )
    parser.add_argument("--target", help="with --data: the target folder to use (default: the first)")
    parser.add_argument("--agent", default=DEFAULT_AGENT, help="name or folder of the agent (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny run that only checks that everything works")
    parser.set_defaults(run=run_demo_command)


def run_demo_command(args: argparse.Namespace) -> int:
    """Runs the demo, and prints the table and the paths of the report."""
    # At once, because the imports take seconds.
    print(f"{'starting':<25}results go to {args.output.resolve()}", flush=True)
    transformers = require_extra("transformers", "demo")
    # Imported here, because it loads torch, which would delay the help of the other commands.
    from dmagent_loader._demo.run import run_demo

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = run_demo(
        args.output,
        data=args.data,
        target=args.target,
        agent=args.agent,
        config=DemoConfig.quick() if args.quick else DemoConfig(),
    )
    print(f"\n{report.table.to_text()}\n")
    for note in report.notes:
        print(textwrap.fill(note, width=79, subsequent_indent="  "))
    print(f"\nDone in {report.seconds:.0f} seconds.")
    for name in ("report", "chart", "numbers"):
        print(f"  {name:<8} {report.files[name].resolve()}")
    return 0

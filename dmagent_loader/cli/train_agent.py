"""``dmagent train-agent``: train agents offline, from text files to a checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from dmagent_loader.errors import ConfigurationError


def add_train_agent_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``train-agent preview``."""
    parser = subparsers.add_parser("train-agent", help="train an agent on trajectories of small proxy models")
    commands = parser.add_subparsers(dest="train_agent_command", required=True)
    preview = commands.add_parser(
        "preview",
        help="the whole pipeline at the size of the preview weights: minutes on one CPU core",
        description=(
            "Text files -> corpus -> trajectories (Algorithm 1) -> feedback of nano-proxies -> agent (supervised "
            "warm-up) -> OUTPUT/checkpoint and OUTPUT/report.md. Run it again to continue after a break."
        ),
    )
    preview.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with source/<Topic>.jsonl(.gz), target_math/*.jsonl(.gz) ('text' column) and the question files",
    )
    preview.add_argument("--output", type=Path, required=True, help="folder for the results of all stages")
    preview.add_argument(
        "--settings", type=Path, help="JSON file with settings to change, nested as in pipeline.preview.PreviewConfig"
    )
    preview.add_argument(
        "--notes", type=Path, help="Markdown sections for the model card: what the text is, under which licences"
    )
    preview.add_argument("--no-progress", action="store_true", help="no progress bars")
    preview.set_defaults(run=run_preview)


def run_preview(args: argparse.Namespace) -> int:
    """Trains the agent and prints where it is.

    Raises:
        ConfigurationError: The settings file is not a JSON object of known settings.
    """
    # Here, because it loads torch, which the other commands' help should not wait for.
    from dmagent_loader.pipeline.preview import PreviewConfig, train_preview, with_settings

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = PreviewConfig()
    if args.settings is not None:
        try:
            values = json.loads(args.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"the settings in {args.settings} cannot be read: {error}") from error
        config = with_settings(config, values)
    notes = "## Data\n\nThe person who trained this agent has not described the data."
    if args.notes is not None:
        notes = args.notes.read_text(encoding="utf-8")
    checkpoint = train_preview(config, args.data, args.output, notes=notes, progress=not args.no_progress)
    print(f"agent: {checkpoint}")
    print(f"report: {args.output / 'report.md'}")
    return 0

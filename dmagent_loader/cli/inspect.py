"""``dmagent inspect``: a summary of an agent checkpoint."""

from __future__ import annotations

import argparse
import json

from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.checkpoint import CARD_FILE, is_plus, list_bundled, read_config, resolve
from dmagent_loader.agent.plus import checkpoint

CARD_LINES = 12


def add_inspect_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``inspect NAME_OR_PATH``."""
    parser = subparsers.add_parser("inspect", help="show an agent checkpoint: size, config, statistics, digest, card")
    parser.add_argument(
        "name_or_path", help=f"bundled ({', '.join(list_bundled()) or 'none'}), a directory or a Hub id"
    )
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Verifies the checkpoint by loading it, and prints it."""
    directory = resolve(args.name_or_path)
    values = read_config(directory)
    if is_plus(args.name_or_path):
        network, name = checkpoint.load(args.name_or_path)
        print(f"{name}: {network.num_parameters():,} parameters, any number of domains")
    else:
        agent = MixingAgent.from_pretrained(args.name_or_path)
        domains = values.pop("domains")
        ends = f"{domains[0]} ... {domains[-1]}"
        print(f"{agent.name}: {agent.num_parameters():,} parameters, {len(domains)} domains ({ends})")
    for key, value in values.items():
        print(f"  {key}: {json.dumps(value)}")
    card = directory / CARD_FILE
    if card.is_file():
        print(f"--- {CARD_FILE}")
        print("\n".join(card.read_text(encoding="utf-8").splitlines()[:CARD_LINES]))
    return 0

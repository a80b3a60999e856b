"""``dmagent train-agent``: trains agents offline, from text files to checkpoints."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmagent_loader.errors import ConfigurationError

if TYPE_CHECKING:
    from dmagent_loader.training.stages import PipelineConfig

STAGES = {
    "trajectories": "text files -> corpus, start states, mixing trajectories (Algorithm 1)",
    "feedback": "trajectories -> base models, proxies trained along the trajectories, recorded set",
    "sft": "recorded set -> agent that imitates the expert trajectories",
    "cql": "recorded set and imitating agent -> agent trained further with Conservative Q-Learning",
    "all": "all stages, from text files to both agents",
}
PLUS = "recorded runs -> calibrated surrogate -> evolution strategies -> dmagent-plus"


def configure_train_agent(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``train-agent``."""
    parser.description = "Trains a mixing agent in stages: `all` runs them in order, and `plus` trains dmagent-plus."
    commands = parser.add_subparsers(dest="stage", required=True)
    for stage, text in STAGES.items():
        command = commands.add_parser(
            stage,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. A stage first runs the earlier stages whose results are not in "
            "the output folder. Repeat the command to continue after an interruption.",
        )
        command.add_argument("--output", type=Path, required=True, help="folder for the results of all stages")
        command.add_argument(
            "--data",
            type=Path,
            help="folder with source/<Topic>.jsonl(.gz), target_math/*.jsonl(.gz) ('text' column) and the question "
            "files env/mmlu_val.jsonl.gz and env/math_train_500.jsonl.gz",
        )
        command.add_argument(
            "--config",
            default="full",
            help="'full' (for the bundled agents, hours), 'small' (minutes), or a JSON file with settings that replace "
            "those of 'full', nested as in dmagent_loader.training.stages.PipelineConfig (default: %(default)s)",
        )
        if stage in ("sft", "cql"):
            command.add_argument(
                "--recorded",
                help="a recorded set to train on instead of collecting one: a file, or in a checkout of the repository "
                "'recorded-math'",
            )
        if stage != "trajectories":
            _add_worker_arguments(command)
        command.add_argument(
            "--notes", type=Path, help="Markdown sections for the model cards: description of the text, licences"
        )
        command.add_argument("--no-progress", action="store_true", help="no progress bars")
        command.set_defaults(run=run_stage)
    _add_plus_arguments(commands.add_parser("plus", help=PLUS, description=f"{PLUS}. Repeat it to continue."))


def _add_plus_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True, help="folder for the trainings and the checkpoint")
    command.add_argument(
        "--recorded", default="recorded-math", help="recorded trajectories for the rate (default: %(default)s)"
    )
    command.add_argument(
        "--calibration",
        type=Path,
        help="calibration record (default: that of the checkout, training_record/plus/calibration.safetensors)",
    )
    command.add_argument("--trainings", type=int, default=10, help="trainings to choose from (default: %(default)s)")
    command.add_argument("--generations", type=int, help="generations of each training")
    command.add_argument("--notes", type=Path, help="Markdown sections for the model card")
    command.set_defaults(run=run_plus)


def _add_worker_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=int, help="processes that train proxies (default: 1; on Ray: as many as the cluster allows)"
    )
    command.add_argument(
        "--backend", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster (extra [ray])"
    )
    command.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="GPUs of each worker on Ray (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", help="device of the proxies: cpu, cuda (default: %(default)s)")
    command.add_argument(
        "--proxies-at-once", type=int, help="proxies in one batched model (on a GPU: as many as its memory holds)"
    )


def run_stage(args: argparse.Namespace) -> int:
    """Runs a stage and prints the paths of its results.

    Raises:
        ConfigurationError: The settings file is not a JSON object of known settings, or the notes cannot be read.
    """
    # Imported here, because it loads torch and the help of other commands should not wait for it.
    from dmagent_loader.training.proxies.workers import Workers
    from dmagent_loader.training.stages import RECORDED, RL, SFT, TRAJECTORIES, Pipeline, with_settings

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = read_config(args.config)
    if getattr(args, "proxies_at_once", None) is not None:
        config = with_settings(config, {"feedback": {"proxies_at_once": args.proxies_at_once}})
    optional: dict[str, Any] = {}
    if args.notes is not None:
        optional["notes"] = _notes(args.notes)
    if args.stage != "trajectories":
        backend = args.backend
        count = args.workers if args.workers is not None or backend == "ray" else 1
        optional["workers"] = Workers(count=count, backend=backend, gpus_per_worker=args.gpus_per_worker)
        optional["device"] = args.device
    pipeline = Pipeline(
        config=config,
        output=args.output,
        data=args.data,
        recorded=getattr(args, "recorded", None),
        progress=not args.no_progress,
        **optional,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    made: Sequence[str]
    if args.stage == "trajectories":
        pipeline.trajectories()
        made = [TRAJECTORIES]
    elif args.stage == "feedback":
        pipeline.record()
        made = [RECORDED]
    elif args.stage == "sft":
        pipeline.sft()
        made = [SFT, "sft.md"]
    else:
        pipeline.cql()
        made = [SFT, RL, "sft.md", "cql.md"]
    for name in made:
        print(args.output / name)
    return 0


def run_plus(args: argparse.Namespace) -> int:
    """Trains `dmagent-plus` and prints the paths of its results.

    Raises:
        StateError: A record is missing, or the output folder holds results of other settings.
    """
    from dmagent_loader.agent.checkpoint import bundled_roots
    from dmagent_loader.training.plus.calibration import CALIBRATION
    from dmagent_loader.training.plus.evolution import EvolutionConfig
    from dmagent_loader.training.plus.train import PlusConfig, PlusTraining
    from dmagent_loader.training.record import FeedbackRecord
    from dmagent_loader.training.stages import find_record

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = [path for root in bundled_roots() if (path := root / "plus" / CALIBRATION).is_file()]
    calibration = args.calibration or (known[0] if known else Path(CALIBRATION))
    evolution = EvolutionConfig() if args.generations is None else EvolutionConfig(generations=args.generations)
    training = PlusTraining(
        config=PlusConfig(trainings=args.trainings, evolution=evolution),
        calibration=calibration,
        record=FeedbackRecord.load(find_record(args.recorded)),
        output=args.output,
        notes="" if args.notes is None else _notes(args.notes),
    )
    print(training.run())
    print(args.output / "plus.md")
    return 0


def _notes(path: Path) -> str:
    """Text of the notes.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the notes {str(path)!r} cannot be read: {error}; pass another --notes") from error


def read_config(name: str) -> PipelineConfig:
    """Settings of a name in `CONFIGS`, or the full settings with replacements from a JSON file.

    Raises:
        ConfigurationError: The file cannot be read, or is not a JSON object of known settings.
    """
    from dmagent_loader.training.stages import CONFIGS, full_config, with_settings

    if name in CONFIGS:
        return CONFIGS[name]()
    try:
        values = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the settings {name!r} cannot be read ({error}): give a JSON file, or one of {', '.join(CONFIGS)}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"the settings in {name} are a JSON {type(values).__name__}, not an object")
    return with_settings(full_config(), values)

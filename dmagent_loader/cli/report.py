"""``dmagent report``: a page and a picture about a run, from its saved state."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmagent_loader._files import write_atomically
from dmagent_loader.cli.saved_states import find_saved_state
from dmagent_loader.errors import ConfigurationError, require_extra

DEFAULT_OUTPUT = Path("dmagent-report.html")


def configure_report(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``report``."""
    parser.description = (
        "Writes a self-contained HTML page and a PNG about a run, from its saved state alone: no shards, no model, "
        "no GPU. Nothing in the checkpoint is executed."
    )
    parser.add_argument(
        "state",
        metavar="STATE",
        type=Path,
        help="a saved state_dict() as JSON; a checkpoint of the Trainer, Lightning, NeMo or Megatron; or a folder of "
        "one run's checkpoints, of which the newest is used",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FILE.html",
        help="the page; the picture goes beside it as FILE.png (default: %(default)s)",
    )
    parser.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    """Writes the report and prints a summary.

    Raises:
        ConfigurationError: The output cannot be written.
        MissingExtraError: matplotlib is not installed.
        StateError: There is no state, there are several, or it is damaged.
    """
    output: Path = args.output
    if output.suffix != ".html":
        raise ConfigurationError(f"--output is {str(output)!r}; it must be a file that ends in .html")
    if not output.parent.is_dir():
        raise ConfigurationError(f"--output is {str(output)!r}, but there is no folder {str(output.parent)!r}: make it")
    require_extra("matplotlib.figure", "report")
    # Imported here, because it loads the rest of the package, and the help of the commands should not wait for it.
    from dmagent_loader._report.history import read_history
    from dmagent_loader._report.page import write_report

    saved = find_saved_state(args.state)
    name = args.state.resolve().name
    history = read_history(
        saved.state, name=name, last_sample=saved.last_sample, samples_per_step=saved.samples_per_step
    )
    written = write_report(history, source=str(saved.path))
    print(f"{saved.path}:")
    for line in written.lines:
        print(f"  {line}")
    files = {output: written.page.encode()}
    if written.picture is not None:
        files[output.with_suffix(".png")] = written.picture
    for path, data in files.items():
        try:
            write_atomically(path, data)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error}; pass another --output") from error
        print(f"wrote {path}")
    return 0

"""Coverage-guided fuzzing of one harness with atheris: ``python tests/fuzz/run.py tar -runs=100000 [FOLDER]``.

Options behind the name are libFuzzer's. FOLDER keeps the inputs that reached new code, so that a later run goes on from
them; the harness's seeds are added to it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzz.harnesses import NAMES, harness


def main() -> None:
    """Runs until libFuzzer's limits, or the first input that breaks the property."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: run.py {'|'.join(NAMES)} [libFuzzer options] [FOLDER]")
    name, options = sys.argv[1], sys.argv[2:]
    logging.getLogger("dmagent_loader").setLevel(logging.CRITICAL)
    with atheris.instrument_imports(include=["dmagent_loader", "numpy.lib", "safetensors", "tarfile", "zipfile"]):
        check, seeds = harness(name)
    folders = [Path(option) for option in options if not option.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (folders[0] / f"seed-{number:03d}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

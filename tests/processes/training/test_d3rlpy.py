"""A fresh process: d3rlpy is loaded only for training, and its effects on the process end with it."""

from __future__ import annotations

import os
import subprocess
import sys


def test_missing_d3rlpy_names_the_extra() -> None:
    """Importing must work without it; training must say what to install."""
    code = (
        "import sys; sys.modules['d3rlpy'] = None; sys.modules['structlog'] = None\n"
        "from dmagent_loader.training.cql import train\n"
        "try:\n    train._d3rlpy_contained().__enter__()\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "MissingExtraError" in done.stdout
    assert "dmagent-loader[rl]" in done.stdout


def test_a_training_loads_d3rlpy_and_leaves_structlog_as_it_was() -> None:
    code = (
        "import structlog\n"
        "structlog.configure(wrapper_class=structlog.BoundLogger, cache_logger_on_first_use=True)\n"
        "before = structlog.get_config()\n"
        "from dmagent_loader.training.cql import train\n"
        "with train._d3rlpy_contained():\n    import d3rlpy\n    assert structlog.get_config() != before\n"
        "assert structlog.get_config() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

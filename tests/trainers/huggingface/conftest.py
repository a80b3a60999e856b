from __future__ import annotations

from pathlib import Path

import pytest
from trainers.conformance.launch import Launcher

PROGRAM = Path(__file__).parents[1] / "conformance" / "run_huggingface.py"


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("trainer"), PROGRAM)

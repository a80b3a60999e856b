from __future__ import annotations

import pytest
from samplers import Build, builder

from dmagent_loader.testing import write_toy_shards

ROWS = {"source/web": 400, "target/math": 400}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds samplers over two equal domains that repeat without end."""
    folder = tmp_path_factory.mktemp("loading")
    settings = {"samples_per_reweight": 40, "exhausted": "repeat", "initial_mix": dict.fromkeys(ROWS, 0.5)}
    return builder(write_toy_shards(folder / "shards", ROWS), folder / "cache", **settings)

from __future__ import annotations

import pytest
from samplers import Build, builder

from dmagent_loader.testing import write_toy_shards


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("run")
    shards = write_toy_shards(folder / "shards", {"source/web": 60, "target/math": 60})
    return builder(shards, folder / "cache", samples_per_reweight=16)

from __future__ import annotations

import pytest
from samplers import ROWS, Build, builder

from dmagent_loader.testing import write_toy_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return write_toy_shards(tmp_path_factory.mktemp("shards"), ROWS)


@pytest.fixture(scope="session")
def build(shards: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(shards, tmp_path_factory.mktemp("cache"), samples_per_reweight=32)

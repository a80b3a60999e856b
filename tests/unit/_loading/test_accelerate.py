"""Under accelerate without the callback, half of the data would be lost in silence."""

import pytest
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from reading import quiet

from dmagent_loader import AgentWeightedSampler
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.testing import write_toy_shards


def test_accelerate_without_the_callback_is_refused_with_several_processes(tmp_path):
    shards = write_toy_shards(tmp_path / "s", {"source/a": 8, "target/x": 8}, tokens=4)
    Accelerator(cpu=True)
    settings = {"samples_per_reweight": 4, "reading": quiet(tmp_path / "c")}
    alone = DataLoaderShard(AgentWeightedSampler(shards, **settings), batch_size=2)
    assert len(list(alone)) == 8
    two = DataLoaderShard(AgentWeightedSampler(shards, rank=0, world_size=2, **settings), batch_size=2)
    with pytest.raises(ConfigurationError, match="add DataMixingCallback"):
        next(iter(two))

"""Under accelerate without the callback, half of the data would be lost in silence."""

import pytest
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from reading import quiet
from torch.utils.data import DataLoader

from dmagent_loader import AgentWeightedSampler, MixingDataLoader
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


@pytest.mark.parametrize("kind", [DataLoader, MixingDataLoader])
def test_one_process_may_prepare_the_loader(tmp_path, kind):
    """accelerate takes the size of a batch from its first entry, and cannot from strings."""
    shards = write_toy_shards(tmp_path / "s", {"source/a": 8, "target/x": 8}, tokens=4)
    sampler = AgentWeightedSampler(shards, samples_per_reweight=4, reading=quiet(tmp_path / "c"))
    batches = list(Accelerator(cpu=True).prepare(kind(sampler, batch_size=3)))
    assert [index for batch in batches for index in batch["__index__"].tolist()] == list(range(16))
    assert set(batches[0]["__domain__"]) == {"source/a", "target/x"}

"""The loader tells the sampler how it reads, and refuses settings that would change the order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samplers import Build, builder

from dmagent_loader import MixingDataLoader, ReadingConfig
from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.testing import write_toy_shards


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("loader")
    shards = write_toy_shards(folder / "shards", {"source/web": 30, "target/math": 20})
    return builder(shards, folder / "cache", samples_per_reweight=16)


def test_the_sampler_knows_how_the_loader_reads(build):
    """Workers take whole batches in turn, and a new mix begins after what they hold: both follow from this."""
    sampler = build()
    MixingDataLoader(sampler, batch_size=4, samples_per_step=8, num_workers=2, prefetch_factor=3)
    assert sampler.loader == LoaderSettings(
        batch_size=4, samples_per_fetch=4, samples_per_step=8, prefetch_factor=3, by_trainer=False
    )
    MixingDataLoader(sampler, batch_size=None, by_trainer=True)
    assert sampler.loader == LoaderSettings(batch_size=1, samples_per_fetch=1, prefetch_factor=2, by_trainer=True)


def test_batches_are_those_of_the_run_and_the_last_may_be_smaller(build):
    sampler = build()
    end = sampler.end
    batches = list(MixingDataLoader(sampler, batch_size=4))
    assert [i for batch in batches for i in batch["__index__"].tolist()] == list(range(end))
    assert [len(batch["__key__"]) for batch in batches] == [4] * (end // 4) + [end % 4] * (end % 4 > 0)


def test_whole_steps_end_all_ranks_at_the_same_batch(build):
    """Catches loaders that each drop their own last batch: ranks would take different numbers of steps."""
    ranks = [list(MixingDataLoader(build(rank=r, world_size=3), batch_size=2, samples_per_step=4)) for r in range(3)]
    assert {len(batches) for batches in ranks} == {build().end // (3 * 4) * 2}
    assert {len(batch["__key__"]) for batches in ranks for batch in batches} == {2}


def test_without_workers_there_is_nothing_to_prefetch_or_to_keep(build):
    loader = MixingDataLoader(build(), batch_size=4, prefetch_factor=8, persistent_workers=True)
    assert loader.prefetch_factor is None
    assert not loader.persistent_workers


def test_the_models_random_state_is_left_alone(build):
    """torch would draw the seed of each iterator from it, so that the loader would change the training."""
    before = torch.get_rng_state()
    next(iter(MixingDataLoader(build(), batch_size=4)))
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(7)
    assert MixingDataLoader(build(), generator=generator).generator is generator


def test_another_batch_size_than_the_loaders_is_refused(build):
    with pytest.raises(ConfigurationError, match=r"batch_size=4.*has batch size 8"):
        MixingDataLoader(build(reading=ReadingConfig(batch_size=4)), batch_size=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle": True}, "does not take shuffle"),
        ({"drop_last": True}, "does not take drop_last"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": 1.5}, "num_workers is 1.5"),
        ({"samples_per_step": 0}, "samples_per_step is 0"),
        ({"prefetch_factor": 0}, "prefetch_factor is 0; it must be at least 1"),
    ],
)
def test_a_loader_refuses_settings_that_contradict_the_order(build, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        MixingDataLoader(build(), **settings)
    with pytest.raises(ConfigurationError, match="must be an AgentWeightedSampler"):
        MixingDataLoader([1, 2])


def test_a_refused_loader_leaves_the_sampler_as_it_was(build):
    sampler = build()
    before = sampler.loader
    with pytest.raises(ConfigurationError):
        MixingDataLoader(sampler, batch_size=4, num_workers=-1)
    assert sampler.loader == before


def test_two_loaders_of_one_program_seed_their_workers_differently(build):
    """The workers of an older loader are told from those of a newer one by the seed."""
    seeds = {MixingDataLoader(build()).generator.initial_seed() for _ in range(3)}
    assert len(seeds) == 3


def test_of_two_loaders_the_one_that_is_iterated_describes_itself(build):
    """Otherwise a second loader that is only built would change the batches of the first."""
    sampler = build()
    first, second = MixingDataLoader(sampler, batch_size=8), MixingDataLoader(sampler, batch_size=2)
    assert sampler.loader.batch_size == 2
    next(iter(first))
    assert sampler.loader.batch_size == 8
    next(iter(second))
    assert sampler.loader.batch_size == 2


def test_what_an_integration_knows_of_the_loader_stays(build):
    sampler = build()
    loader = MixingDataLoader(sampler, batch_size=8)
    known = dataclasses.replace(sampler.loader, samples_per_step=16, by_trainer=True)
    sampler.bind(known)
    next(iter(loader))
    assert sampler.loader == known

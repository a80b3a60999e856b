"""Settings that cannot work are refused by name, when the sampler is built."""

from __future__ import annotations

import itertools
import re
import tarfile

import pytest
from samplers import indices

from dmagent_loader import DecisionConfig, ReadingConfig
from dmagent_loader.errors import (
    CheckpointError,
    ConfigurationError,
    DomainError,
    EmptyShardError,
    MixError,
    ShardNotFoundError,
)
from dmagent_loader.policies import GuardConfig, StaticPolicy


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"deciding": ReadingConfig()}, "must be a DecisionConfig"),
        ({"samples_per_reweight": "80"}, "samples_per_reweight is '80'"),
        ({"samples_per_reweight": True}, "samples_per_reweight is True"),
        ({"rank": 0, "world_size": 1.5}, "world_size is 1.5"),
        ({"transform": 5}, "transform is 5"),
        ({"policy": object()}, "with a method propose"),
        ({"policy": StaticPolicy}, "which cannot be called with the domains"),
        ({"agent": 5}, "agent is 5"),
        ({"exhausted": ["stop"]}, "exhausted is"),
        ({"initial_mix": "half"}, "the mix is 'half'"),
        ({"initial_mix": {"source": "a", "target": 1.0}}, "not a list of numbers"),
        ({"initial_mix": {"source": 10**400}}, "not a list of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_setting_of_another_type_is_refused_by_name(build, setting, message):
    with pytest.raises((ConfigurationError, MixError), match=re.escape(message)):
        build(**setting)


def test_bad_settings_are_refused_by_name(build, tmp_path, shards):
    with pytest.raises(DomainError, match=r"'wiki' belongs to no field.*source/wiki"):
        build(shards={"wiki": shards["source/web"]})
    with pytest.raises(ShardNotFoundError, match="source/web"):
        build(shards={"source/web": str(tmp_path / "nothing-{00..03}.tar")})
    with pytest.raises(DomainError, match="target/maths"):
        build(initial_mix={"target/maths": 1.0})
    with pytest.raises(MixError, match=r"sums to 0\.9"):
        build(initial_mix={"source/web": 0.9})
    with pytest.raises(ConfigurationError, match="larger than the 180 rows"):
        build(rank=0, world_size=181)
    with pytest.raises(ConfigurationError, match="rank 3"):
        build(rank=3, world_size=2)
    with pytest.raises(ConfigurationError, match="samples_per_reweight"):
        build(samples_per_reweight=0)
    with pytest.raises(ConfigurationError, match="only one can decide"):
        build(agent="x", policy=StaticPolicy({"source": 1.0}))
    with pytest.raises(CheckpointError, match="no-such-agent"):
        build(agent="no-such-agent")
    with pytest.raises(ConfigurationError, match="nonsense"):
        build(exhausted="nonsense")
    with pytest.raises(ConfigurationError, match="targets"):
        build(exhausted={"targets": "repeat"})


def test_a_world_without_a_rank_is_refused(build):
    """Every process would read the share of rank 0."""
    with pytest.raises(ConfigurationError, match=r"world_size=2 without rank.*pass rank="):
        build(world_size=2)
    shares = [indices(itertools.islice(build(rank=rank, world_size=2), 3)) for rank in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(6))


@pytest.mark.parametrize(
    "deciding",
    [
        DecisionConfig(shadow=True),
        DecisionConfig(guard=GuardConfig(max_change=0.1)),
        DecisionConfig(roles={"keep": "a", "acquire": "b"}),
        DecisionConfig(standardization="frozen"),
    ],
)
def test_settings_of_decisions_without_anybody_who_decides_are_refused(build, deciding):
    with pytest.raises(ConfigurationError, match="no effect"):
        build(deciding=deciding)


def test_one_shard_in_place_of_a_manifest_is_refused(build):
    with pytest.raises(
        ConfigurationError, match=r"is a shard or a pattern of shards, not a manifest.*map its domain to it, \{'source"
    ):
        build(shards="shards/web-000000.tar")


def test_a_domain_of_empty_shards_is_refused(build, shards, tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(EmptyShardError, match="source/empty"):
        build(shards={**shards, "source/empty": str(tmp_path / "empty.tar")})

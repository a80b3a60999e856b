"""All ranks agree on the settings of a run, and each share of the samples has a process."""

from __future__ import annotations

import pytest

from dmagent_loader._run import rank_check
from dmagent_loader.errors import RankError, StateError

STEP = "building the sampler"


@pytest.fixture
def run(build):
    return build(rank=0, world_size=1)._run


def refuse_to_tell():
    raise AssertionError("the settings of one process are compared with nobody's")


def test_alone_nothing_is_compared_and_any_rank_may_be_missing():
    """A process may read the share of one of many ranks, for example to look at it."""
    with rank_check.together(STEP, refuse_to_tell, rank=3) as facts:
        assert facts == {}
    rank_check.check_ranks(STEP, rank=3, world_size=8)


def test_in_a_group_every_setting_is_compared(run, group_of_one):
    with rank_check.together(STEP, lambda: run.settings, rank=0) as facts:
        assert facts == run.settings.to_compare()
        facts["consumed"] = 8


def test_a_share_without_a_process_is_refused(run, build, group_of_one):
    """Its samples would never be trained on."""
    rank_check.check_ranks(STEP, rank=0, world_size=1)
    with pytest.raises(RankError, match=r"no process has data-parallel rank 0, 2 of 3 \(the processes have \[1\]\)"):
        rank_check.check_ranks(STEP, rank=1, world_size=3)
    with pytest.raises(RankError, match=r"building the sampler: no process has data-parallel rank 1 of 2"):
        build(rank=0, world_size=2)
    run.feed.set_ranks(1, 2)
    with pytest.raises(RankError, match=r"no process has data-parallel rank 0 of 2"):
        run.set_mix({"source": 1.0}, renormalize=False)


def test_an_error_of_the_ranks_own_comes_before_the_check(run, group_of_one):
    with pytest.raises(StateError, match="damaged"), rank_check.together(STEP, lambda: run.settings, rank=1):
        raise StateError("damaged")


def test_a_digest_differs_where_values_differ_in_the_last_bit():
    weights = [0.1, 0.2, 0.7]
    assert rank_check.digest(weights) == rank_check.digest(list(weights))
    assert rank_check.digest(weights) != rank_check.digest([0.1, 0.2, 0.7 + 2**-53])
    assert len(rank_check.digest(weights * 1000)) == 16

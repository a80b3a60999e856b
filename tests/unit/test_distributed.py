"""Steps that ranks take together: in one process, in a group of one, and what is said where ranks differ."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader import _distributed as distributed
from dmagent_loader.errors import FeedbackError, RankError

STEP = "loading the state"


def test_without_a_process_group_everything_is_the_case_of_one_process():
    assert not distributed.is_active()
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    values = np.array([1.0, 2.0])
    assert distributed.all_reduce_sum(values, STEP) is values
    assert distributed.all_reduce_max(7, STEP) == 7
    assert distributed.broadcast_object({"a": 1}, STEP) == {"a": 1}
    assert distributed.all_gather_object("own", STEP) == ["own"]
    distributed.barrier(STEP)


def test_a_group_of_one_gives_each_value_back(group_of_one):
    assert distributed.is_active()
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert distributed.all_reduce_sum(np.array([1.0, 1e-300]), STEP).tolist() == [1.0, 1e-300]
    assert distributed.all_reduce_max((1 << 62) + 1, STEP) == (1 << 62) + 1, "catches a float on the way"
    assert distributed.broadcast_object({"a": (1, 2)}, STEP) == {"a": (1, 2)}
    assert distributed.all_gather_object("own", STEP) == ["own"]
    distributed.barrier(STEP)


@pytest.mark.parametrize("group", [False, True])
def test_a_step_raises_the_ranks_own_error(group, request):
    if group:
        request.getfixturevalue("group_of_one")
    with pytest.raises(FeedbackError, match="not finite"), distributed.together(STEP):
        raise FeedbackError("not finite")
    with distributed.together(STEP) as facts:
        facts["consumed"] = 4
    with pytest.raises(KeyboardInterrupt), distributed.together(STEP):
        raise KeyboardInterrupt


def report(step=STEP, fault=None, **facts):
    return step, fault, facts


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        (
            [report(), report("deciding"), report()],
            ["rank 0 is at 'loading the state', but rank 1 is at 'deciding'", "the same steps"],
        ),
        (
            [report(), report(fault="ValueError: no"), report(fault="OSError: gone")],
            ["failed on 2 of 3 ranks; rank 1: ValueError: no; rank 2: OSError: gone"],
        ),
        (
            [report(seed="0", consumed="8"), report(seed="0", consumed="9"), report(seed="0", consumed="8")],
            ["the ranks differ in consumed (ranks 0, 2: 8; rank 1: 9)", "start all ranks with the same shards"],
        ),
        ([report(seed="0"), report()], ["the ranks differ in seed (rank 0: 0; rank 1: missing)"]),
        (
            [report(seed="0"), *(report(seed="1") for _ in range(10))],
            ["(rank 0: 0; ranks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more: 1)"],
        ),
        ([report(seed="0"), report(seed="x" * 5000)], [f"rank 1: {'x' * 200}...)"]),
    ],
    ids=["steps", "faults", "facts", "a fact that is missing", "many ranks", "a long value"],
)
def test_ranks_that_differ_are_named_with_how_they_differ(reports, words):
    with pytest.raises(RankError) as error:
        distributed._refuse_differences(STEP, reports)
    for expected in words:
        assert expected in str(error.value)


def test_ranks_that_agree_go_on():
    distributed._refuse_differences(STEP, [report(seed="0", consumed="8")] * 4)


def test_a_group_that_breaks_is_an_error_that_says_what_to_do(group_of_one):
    def broken():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711\nmore of it")

    with pytest.raises(
        RankError,
        match=r"^loading the state: rank 0 of 1 waited 0\.\d s .*Error of the process group: Connection .*:4711$",
    ):
        distributed._collective(STEP, broken)


def test_a_ranks_own_error_comes_before_that_of_a_group_that_breaks(group_of_one, monkeypatch):
    """The first error is the one to mend; that the others are gone by then follows from it."""

    def broken(*arguments):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_gather_object", broken)
    with pytest.raises(RankError, match="Connection closed by peer"), distributed.together(STEP):
        pass
    with pytest.raises(FeedbackError, match="not finite"), distributed.together(STEP):
        raise FeedbackError("not finite")

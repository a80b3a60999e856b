"""The surrogate of runs: what it promises about mixes, rows, noise, and the policies on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plus_fixtures import RECORD, training_source

from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.errors import StateError
from dmagent_loader.training.plus.calibration import Calibration
from dmagent_loader.training.plus.fitting import fit, rank_correlations
from dmagent_loader.training.plus.sampling import KINDS, TaskSource
from dmagent_loader.training.plus.surrogate import SurrogateTasks, limited, ranges, rewards, rollout, static
from dmagent_loader.training.plus.train import split


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.load(RECORD)


@pytest.fixture(scope="module")
def source() -> TaskSource:
    return training_source()


@pytest.fixture(scope="module")
def plain(source: TaskSource) -> SurrogateTasks:
    """Unperturbed tasks whose rows suffice and whose learning rate is constant."""
    tasks = source.batch(16, 12, 3, kinds=["none"])
    easy = np.full_like(tasks.passes, 0.01)
    return replace(tasks, passes=easy, learning_rate=np.ones_like(tasks.learning_rate))


def test_splits_share_no_question_set(calibration):
    train, validation, test = split(calibration)
    names = calibration.environments
    assert sorted([*train, *validation, *test]) == list(range(len(names)))
    keeps = [{names[i].split("+")[0] for i in part} for part in (train, validation)]
    assert not keeps[0] & keeps[1]
    assert {names[i].split("+")[0] for i in train}.isdisjoint({"hellaswag", "arc", "boolq"})


def test_it_ranks_runs_of_environments_that_were_not_fitted(calibration):
    """512 recorded runs of real proxies; the constants come from other environments."""
    train, validation, test = split(calibration)
    found = rank_correlations(calibration, fit(calibration, train), [*validation, *test]).mean(axis=0)
    assert found[0] > 0.85
    assert found[1] > 0.7


def test_the_same_seed_gives_the_same_run(source, plain):
    network = PlusNetwork.untrained(1).in_float32().mix
    pair = [rollout(plain, network, 5) for _ in range(2)]
    assert np.array_equal(pair[0].feedback, pair[1].feedback)
    assert not np.array_equal(pair[0].feedback, rollout(plain, network, 6).feedback)
    again = source.batch(16, 12, 3, kinds=["none"])
    assert np.array_equal(again.value, plain.value)


def test_more_of_a_field_has_diminishing_returns_and_costs_the_other(plain):
    gains = np.array([rollout(plain, static(plain.natural_at(s)), 0).gains for s in (0.1, 0.3, 0.5, 0.7)])
    keep, acquire = np.moveaxis(gains, -1, 0)
    assert (np.diff(acquire, axis=0) > 0).all()
    assert (np.diff(acquire, n=2, axis=0) < 0).all()
    assert np.median(np.diff(keep, axis=0)[-1]) < 0


def test_rows_that_are_read_often_are_worth_less_and_then_do_harm(plain):
    mix = static(plain.natural_at(0.5))
    # Without the limit on passes: the length of the run is unknown.
    unknown = replace(plain, progress_known=np.zeros_like(plain.progress_known))
    few, often = (
        rollout(replace(unknown, passes=np.full_like(plain.passes, passes)), mix, 0).gains for passes in (1.0, 200.0)
    )
    assert (often < few).all()


def test_the_weight_of_a_used_up_domain_goes_to_the_rest_of_its_field(plain):
    """Domain 0 has rows for one percent of the run; afterwards it has no effect, and the mix still counts fully."""
    gone = replace(plain, passes=plain.passes.copy(), repeats=np.ones_like(plain.repeats))
    gone.passes[:, 0], gone.repeats[:, 0] = 1e4, 0.0
    only = plain.natural_at(0.3)
    worthless = replace(gone, value=gone.value.copy(), late_value=gone.late_value.copy())
    worthless.value[:, :, 0] = worthless.late_value[:, :, 0] = 0.0
    first, second = (rollout(tasks, static(only), 0).gains for tasks in (gone, worthless))
    assert np.allclose(first, second, atol=0.1)
    assert np.isfinite(first).all()


def test_noise_begins_at_its_onset(source):
    tasks = source.batch(12, 20, 8, kinds=["noise"])
    clean = replace(tasks, noise=np.zeros_like(tasks.noise))
    mix = static(tasks.facts.prior)
    late = replace(tasks, onset=np.full_like(tasks.onset, 0.5))
    pair = [rollout(own, mix, 0).feedback for own in (late, clean)]
    assert np.array_equal(pair[0][:, :10], pair[1][:, :10])
    assert (pair[0][:, -1] < pair[1][:, -1]).all()


def test_the_limit_on_passes_holds_and_keeps_the_weight_of_each_field(source):
    tasks = source.batch(40, 8, 11)
    mix = tasks.facts.prior
    found = limited(tasks, mix)
    share = np.einsum("bfd,bd->bf", tasks.facts.fields, mix)
    assert np.allclose(np.einsum("bfd,bd->bf", tasks.facts.fields, found), share, atol=1e-5)
    ceiling = np.where((tasks.repeats > 0) & (tasks.progress_known[:, None] > 0), 4 / np.maximum(tasks.passes, 1e-9), 9)
    room = np.einsum("bfd,bd->bf", tasks.facts.fields, ceiling * (tasks.facts.natural > 0))
    possible = np.einsum("bfd,bf->bd", tasks.facts.fields, room > 1.01 * share) > 0
    assert (found <= ceiling * 1.05 + 1e-6)[possible].all()


def test_every_kind_of_task_has_finite_rewards_and_any_number_of_domains(source):
    sizes = set()
    for kind in KINDS:
        tasks = source.batch(12, 6, 2, kinds=[kind])
        sizes |= set((tasks.facts.natural > 0).sum(axis=1).tolist())
        gains = rollout(tasks, PlusNetwork.untrained(0).in_float32().mix, 0).gains
        assert np.isfinite(rewards(tasks, gains, ranges(tasks))).all()
    assert min(sizes) < 15
    assert max(sizes) > 90


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(StateError, match="no calibration record"):
        Calibration.load(tmp_path / "none.safetensors")

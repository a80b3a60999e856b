"""Training rows of a task: pools, noise and a domain that runs out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.training.data.spaces import Space
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.rows import TaskRows, with_target_pool
from dmagent_loader.training.tasks.spec import Noise, Perturbation, TaskSpec


@pytest.fixture
def space(library: TaskLibrary) -> Space:
    return library.space("math", "canonical", 0)


def perturbed(task: TaskSpec, **settings: object) -> TaskSpec:
    return replace(task, perturbation=Perturbation(**settings))  # type: ignore[arg-type]


def reads(rows: TaskRows, mix: np.ndarray) -> np.ndarray:
    return np.stack([rows.next(mix) for _ in range(4)])


@pytest.mark.parametrize("noise", ["random", "shuffled", "repeated"])
def test_noise_is_in_one_topic_from_its_onset_on(task: TaskSpec, space: Space, noise: Noise) -> None:
    task = replace(task, steps=4)
    topic, other = (int(space.canonical[space.domains == domain][0]) for domain in (2, 5))
    both = np.zeros(len(space.names))
    both[[2, 5]] = 0.5
    clean = reads(TaskRows(space, task, 1, topic=topic), both)
    spoilt = reads(TaskRows(space, perturbed(task, kind="noise", noise=noise, onset=0.5), 1, topic=topic), both)
    changed = (clean != spoilt).any(axis=2)
    assert not changed[:2].any()
    assert 0 < changed[2:].sum() <= changed[2:].size / 2
    same_topic = reads(TaskRows(space, perturbed(task, kind="noise", noise=noise, onset=0.5), 1, topic=other), both)
    assert not ((same_topic != clean).any(axis=2) & changed).any()


def test_a_measurement_reads_as_much_noise_as_the_domain_will_have(task: TaskSpec, space: Space) -> None:
    """Rows of a measurement are spread over the whole domain: `AgentWeightedSampler.probe_rows`."""
    topic = int(space.canonical[space.domains == 2][0])
    clean = TaskRows(space, task, 1, topic=topic).of_each(4)
    late = TaskRows(space, perturbed(task, kind="noise", noise="random", onset=0.5), 1, topic=topic).of_each(4)
    early = TaskRows(space, perturbed(task, kind="noise", noise="random"), 1, topic=topic).of_each(4)
    name = space.names[2]
    assert (early[name] != clean[name]).any(axis=1).all()
    assert (late[name] != clean[name]).any(axis=1).tolist() == [False, False, True, True]
    assert all((late[n] == clean[n]).all() for n in space.names if n != name)
    assert all((early[n] == clean[n]).all() for n in space.names if n != name)


def test_weight_of_a_domain_that_ran_out_stays_in_its_field(task: TaskSpec, space: Space) -> None:
    task = perturbed(replace(task, steps=20), kind="runs_out")
    rows = TaskRows(space, task, 1, topic=0)
    domain = int(np.flatnonzero(~rows.repeats)[0])
    assert space.fields[domain] == TARGET
    mix = space.natural(0.3)
    while rows._stream.taken[domain] < rows.capacity[domain]:
        assert rows.delivered(mix)[domain] == pytest.approx(mix[domain])
        rows.next(mix)
    delivered = rows.delivered(mix)
    is_target = np.array([field == TARGET for field in space.fields])
    assert delivered[domain] == 0
    assert delivered[is_target].sum() == pytest.approx(0.3)
    assert delivered.sum() == pytest.approx(1)
    taken = int(rows._stream.taken[domain])
    reads(rows, mix)
    assert rows._stream.taken[domain] == taken


def test_a_pool_holds_the_rows_for_its_passes_and_keeps_every_domain(task: TaskSpec, space: Space) -> None:
    task = replace(task, steps=40, target_passes=2.0)
    pool = with_target_pool(space, task)
    is_target = np.array([field == TARGET for field in pool.fields])
    wanted = 0.3 * 40 * 8 / 2
    assert pool.num_rows[is_target].min() == 2
    assert pool.num_rows[is_target].sum() <= max(wanted * 1.5, 2 * is_target.sum() + wanted)
    assert (pool.num_rows[~is_target] == space.num_rows[~is_target]).all()
    assert with_target_pool(space, replace(task, target_passes=None)) is space

"""Evolution strategies and offline training of `dmagent-plus`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plus_fixtures import RECORD, made_up_facts, training_source

from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.errors import StateError
from dmagent_loader.training.plus.calibration import Calibration
from dmagent_loader.training.plus.evolution import EvolutionConfig, Judged, evolve
from dmagent_loader.training.plus.offline import acted, actions_of
from dmagent_loader.training.plus.train import TRAININGS, Bucket, PlusConfig, PlusTraining
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record

SMALL = EvolutionConfig(generations=6, pairs=3, batches=1, save_every=2)


@pytest.fixture(scope="module")
def tasks() -> list[Judged]:
    source = training_source()
    return [Judged.of(source.batch(6, 5, seed)) for seed in range(3)]


def test_a_stopped_training_continues_to_the_same_weights(tasks, tmp_path):
    whole = evolve(tasks, SMALL, 1, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(generation: int, _: float) -> None:
        if generation == 4:
            raise Stopped

    with pytest.raises(Stopped):
        evolve(tasks, SMALL, 1, tmp_path / "part", on_generation=stop)
    assert np.array_equal(evolve(tasks, SMALL, 1, tmp_path / "part").vector(), whole.vector())
    assert not np.array_equal(evolve(tasks, SMALL, 2, tmp_path / "other").vector(), whole.vector())
    with pytest.raises(StateError, match="other sigma"):
        evolve(tasks, replace(SMALL, sigma=0.5), 1, tmp_path / "part")


def test_the_influence_policy_has_no_advantage_over_itself(tasks):
    even = [replace(b, tasks=replace(b.tasks, balance=np.full_like(b.tasks.balance, 0.5))) for b in tasks]
    even = [Judged.of(b.tasks) for b in even]
    found = np.concatenate([b.advantages(PlusNetwork.untrained(4).in_float32().mix, 3) for b in even])
    assert np.allclose(found, 0, atol=1e-5)


def test_the_whole_stage_leaves_a_checkpoint_and_a_report(tmp_path):
    small = (Bucket(decisions=4, tasks=6, batch=3),)
    config = PlusConfig(trainings=2, evolution=replace(SMALL, generations=1), train=small, judged=small)
    record = FeedbackRecord.load(find_record("recorded-math"))
    training = PlusTraining(config=config, calibration=RECORD, record=record, output=tmp_path, notes="## Notes")
    folder = training.run()
    network, _ = checkpoint.load(folder)
    assert np.abs(network.vector() - PlusNetwork.untrained(0).vector()).max() > 0
    assert "## Notes" in (folder / "README.md").read_text()
    assert "| training 1" in (tmp_path / "plus.md").read_text()
    before = (folder / "model.safetensors").read_bytes()
    trainings = [(tmp_path / TRAININGS / str(n) / "model.safetensors").read_bytes() for n in range(2)]
    assert before in trainings
    assert trainings[0] != trainings[1]
    assert (training.run() / "model.safetensors").read_bytes() == before
    other = replace(record, feedback=record.feedback + 0.01 * np.arange(record.feedback.shape[1])[:, None])
    with pytest.raises(StateError, match="trainings of other record"):
        replace(training, record=other).run()
    changed = Calibration.load(RECORD)
    replace(changed, values=changed.values * 2).save(tmp_path / "changed.safetensors")
    with pytest.raises(StateError, match="trainings of other calibration"):
        replace(training, calibration=tmp_path / "changed.safetensors").run()


def test_actions_of_a_mix_lead_back_to_it():
    rng = np.random.default_rng(1)
    actions = np.stack([rng.uniform(-1.5, 1.5, 20), rng.uniform(-1.5, 0.8, 20), rng.uniform(-1.5, 0.8, 20)], axis=1)
    own = made_up_facts()
    mixes = np.stack([acted(own, action) for action in actions])
    assert np.allclose(mixes.sum(axis=1), 1)
    assert np.allclose(actions_of(own, mixes), actions, atol=1e-6)
    assert np.allclose(acted(own, np.zeros(3)), own.prior)

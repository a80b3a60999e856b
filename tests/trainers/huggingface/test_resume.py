"""A run that was killed goes on as if nothing had happened; and what the Trainer's own skipping would have done."""

from __future__ import annotations

import json
import signal
from itertools import chain

import pytest

from dmagent_loader.integrations.huggingface import last_whole_checkpoint


# The conformance suite kills two processes in `make test`.
@pytest.mark.parametrize(
    ("processes", "workers", "accumulation"), [(1, 2, 4), pytest.param(2, 0, 1, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_gives_the_same_samples_mixes_and_weights(launch, processes, workers, accumulation):
    """Catches the Trainer's skip (the first samples again, under today's mix), a lost history of the policy, and a mix
    that takes effect at another sample after the restart."""
    common = ["--workers", str(workers), "--accumulation", str(accumulation), "--save-every", "5", "--dropout", "0.1"]
    whole = launch(*common, "--steps", "14", processes=processes)
    killed = launch(*common, "--steps", "14", "--kill-at", "8", processes=processes, check=False)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.printed[-2000:]
    checkpoint = last_whole_checkpoint(killed.out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-5")
    resumed = launch(*common, "--steps", "14", "--resume", checkpoint, processes=processes)

    done = 5 * accumulation
    assert resumed.micro_batches() == whole.micro_batches()[done:]
    assert resumed.keys() == {i: k for i, k in whole.keys().items() if i in set(resumed.indices())}
    assert resumed.results[0]["ledger"] == whole.results[0]["ledger"]
    assert len(whole.results[0]["ledger"]) > 2
    assert resumed.results[0]["weights"] == whole.results[0]["weights"]


def test_a_checkpoint_of_one_process_goes_on_in_two(launch):
    """The global batch is the same, so are the samples of every step."""
    whole = launch("--steps", "10", "--save-every", "4", processes=1, batch_size=4)
    checkpoint = str(whole.out / "checkpoints" / "checkpoint-4")
    resumed = launch("--steps", "10", "--resume", checkpoint, processes=2, batch_size=2)
    whole_steps = [sorted(chain(*ranks)) for ranks in whole.micro_batches()]
    assert [sorted(chain(*ranks)) for ranks in resumed.micro_batches()] == whole_steps[4:]


def test_a_checkpoint_without_the_callback_can_be_resumed_and_saved(launch):
    """The Trainer looks its callbacks' states up by name when it saves: without an entry it dies with a KeyError."""
    first = launch("--steps", "4", "--save-every", "2")
    checkpoint = first.out / "checkpoints" / "checkpoint-2"
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("DataMixingCallback")["attributes"]["sampler"]["consumed"] == 4
    path.write_text(json.dumps(state))
    resumed = launch("--steps", "4", "--save-every", "1", "--resume", str(checkpoint))
    assert resumed.indices() == [0, 1, 2, 3]
    assert (resumed.out / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists()


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step, text in ((10, '{"global_step": 10}'), (9, '{"global_step": 9}'), (20, '{"global_st'), (30, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")

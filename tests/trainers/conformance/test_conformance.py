"""What a user may expect of every integration, asked of each on the real package.

One training program per integration, `run_<name>.py`, is started as a user starts it, alone or under torchrun, and the
tests read what it leaves behind. An integration of another environment (`make test-nemo`) is skipped here, by name.
`pytest tests/trainers/conformance --conformance-table FILE` writes who passed what.
"""

from __future__ import annotations

import functools
import importlib.util
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pytest
from trainers.conformance.launch import DOMAINS, NEW_DOMAIN, SEED, Launcher, Run

from dmagent_loader._report.history import read_history
from dmagent_loader.cli.saved_states import find_saved_state
from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.sharding import StreamLayout

SAMPLES_PER_REWEIGHT = 16


@dataclass(frozen=True, kw_only=True)
class Integration:
    """How an integration is run, and what its trainer is known to do.

    Args:
        name: Shown in the table.
        program: Name of ``run_<program>.py``.
        needs: Modules that must be importable.
        options: For the program, beyond the common ones.
        prefix: Of the metrics' names in the trainer's logger.
        ahead: Micro-batches of all ranks that the trainer fetches before training on them, without torch workers.
        worker_ranks: Whether the torch workers of every rank read (1), or those of rank 0 only (0).
        workers: Whether the trainer takes torch data workers.
        model_parallel: Processes that hold parts of one model.
        variant: Whether another integration of the same trainer is asked everything: then the rest is for
            ``make test-all``.
    """

    name: str
    program: str
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    prefix: str = ""
    ahead: int = 0
    every_rank_reads: bool = True
    workers: bool = True
    model_parallel: int = 1
    variant: bool = False

    def bound(self, *, batch_size: int, data_ranks: int, workers: int) -> int:
        """Samples that are trained under the old mix after a decision."""
        unit = batch_size * data_ranks
        prefetched = 2 * workers * batch_size * (data_ranks if self.every_rank_reads else 1)
        return self.ahead * unit + -(-prefetched // unit) * unit


MEGATRON = ("megatron.core",)
NEMO = ("nemo.collections.llm",)
INTEGRATIONS = [
    Integration(name="plain loop", program="plain"),
    Integration(name="HF Trainer", program="huggingface", prefix="train/", ahead=1, every_rank_reads=False),
    Integration(
        name="HF Trainer, mixin", program="huggingface", options=("--mode", "mixin"), prefix="train/", variant=True
    ),
    Integration(name="Accelerate", program="accelerate", variant=True),
    Integration(name="Lightning", program="lightning", needs=("lightning.pytorch",)),
    Integration(
        name="Lightning, no length",
        program="lightning",
        needs=("lightning.pytorch",),
        options=("--no-length",),
        ahead=1,
        variant=True,
    ),
    Integration(name="Megatron-core", program="megatron", needs=MEGATRON),
    Integration(
        name="Megatron-core, tensor-parallel",
        program="megatron",
        needs=MEGATRON,
        options=("--tensor", "2"),
        model_parallel=2,
        variant=True,
    ),
    Integration(
        name="Megatron-core, pipeline-parallel",
        program="megatron",
        needs=MEGATRON,
        options=("--pipeline", "2"),
        model_parallel=2,
        variant=True,
    ),
    Integration(name="NeMo", program="nemo", needs=NEMO),
    Integration(
        name="NeMo, tensor-parallel",
        program="nemo",
        needs=NEMO,
        options=("--tensor", "2"),
        model_parallel=2,
        variant=True,
    ),
    Integration(
        name="NeMo, pipeline-parallel",
        program="nemo",
        needs=NEMO,
        options=("--pipeline", "2"),
        model_parallel=2,
        variant=True,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Processes, torch workers of each, micro-batches of an optimizer step; whether `make test` asks variants too."""

    processes: int
    workers: int
    accumulation: int
    steps: int = field(default=12)
    for_variants: bool = False

    def __str__(self) -> str:
        return f"{self.processes} processes, {self.workers} workers, accumulation {self.accumulation}"


FAST = [
    Setting(processes=2, workers=0, accumulation=4, steps=5, for_variants=True),
    Setting(processes=1, workers=2, accumulation=1),
]
SLOW = [
    Setting(processes=1, workers=0, accumulation=1),
    Setting(processes=2, workers=2, accumulation=1),
    Setting(processes=2, workers=2, accumulation=4, steps=5),
]
SETTINGS = [*FAST, *(pytest.param(setting, marks=pytest.mark.slow) for setting in SLOW)]

every_integration = pytest.mark.parametrize("integration", INTEGRATIONS, ids=lambda integration: integration.name)
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)

Start = Callable[..., Run]


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Integration], Start]:
    """Equal runs are made once."""

    @functools.cache
    def launcher(integration: Integration) -> Start:
        program = Path(__file__).with_name(f"run_{integration.program}.py")
        start = Launcher(tmp_path_factory.mktemp(integration.program), program)

        @functools.cache
        def run(
            *options: str, processes: int = 1, batch_size: int = 2, check: bool = True, changed: bool = False
        ) -> Run:
            return start(
                *integration.options,
                *options,
                processes=max(processes, integration.model_parallel),
                data_ranks=max(1, processes // integration.model_parallel),
                batch_size=batch_size,
                check=check,
                changed=changed,
            )

        run.launcher = start  # type: ignore[attr-defined]
        return run

    return launcher


@pytest.fixture
def start(integration: Integration, launchers: Callable[[Integration], Start]) -> Start:
    missing = [name for name in integration.needs if not _importable(name)]
    if missing:
        pytest.skip(f"{integration.name} needs {', '.join(missing)}")
    return launchers(integration)


@pytest.fixture
def run(integration: Integration, setting: Setting, start: Start) -> Run:
    if setting.workers and not integration.workers:
        pytest.skip(f"{integration.name} takes no torch workers")
    return start(
        *("--workers", str(setting.workers), "--accumulation", str(setting.accumulation)),
        *("--steps", str(setting.steps), "--slow-until", str(setting.steps)),
        processes=setting.processes,
    )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def samples_per_step(run: Run, setting: Setting) -> int:
    return run.batch_size * run.data_ranks * setting.accumulation


def share(run: Run, rank: int) -> StreamLayout:
    key = stream_key(SEED, "ranks")
    return StreamLayout(base=0, key=key, rank=rank, world_size=run.data_ranks, batch_size=run.batch_size)


@every_setting
@every_integration
def test_every_sample_is_trained_on_once_and_in_order(integration, setting, run, start):
    """Catches a trainer that splits what is split already, and workers that deal samples instead of batches."""
    size = run.batch_size * run.data_ranks
    batches = run.micro_batches()
    assert len(batches) == setting.steps * setting.accumulation
    for number, ranks in enumerate(batches):
        assert sorted(chain(*ranks)) == list(range(number * size, (number + 1) * size))
        for rank, indices in enumerate(ranks):
            assert indices == share(run, rank).indices(number * run.batch_size, run.batch_size).tolist()
    keys = run.keys()
    assert keys == start.launcher.replay(run, sorted(keys))
    assert [line["step"] for line in run.seen(0)] == [n // setting.accumulation for n in range(len(batches))]


@every_setting
@every_integration
def test_the_base_model_is_measured_before_the_first_step(integration, setting, run):
    """Catches a first decision on the feedback of a model that has trained."""
    first = run.results[0]["ledger"][0]
    assert (first["start"], first["decided_at"]) == (0, 0)
    assert first["decided_by"] not in ("initial", "manual")
    assert run.results[0]["metrics"][f"{integration.prefix}env/general"][0][0] == 0


@every_setting
@every_integration
def test_decisions_come_at_the_right_steps(integration, setting, run):
    """Catches an integration that counts micro-batches, or its own rank's samples, as all samples."""
    per_step = samples_per_step(run, setting)
    due = range(0, setting.steps * per_step + 1, SAMPLES_PER_REWEIGHT)
    expected = sorted({-(-consumed // per_step) for consumed in due})
    assert [step for step, _ in run.results[0]["metrics"][f"{integration.prefix}env/math"]] == expected
    decided = [entry["decided_at"] for entry in run.results[0]["ledger"]]
    assert decided == [step * per_step for step in expected]
    assert run.results[0]["consumed"] == setting.steps * per_step


@every_setting
@every_integration
def test_all_ranks_hold_the_same_decisions(integration, setting, run):
    ledgers = [result["ledger"] for result in run.results]
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert len({tuple(entry["mix"]) for entry in ledgers[0]}) == len(ledgers[0])
    if integration.model_parallel == 1:
        assert len({result["weights"] for result in run.results}) == 1


@every_setting
@every_integration
def test_staleness_is_as_declared(integration, setting, run):
    """Catches a new mix that comes later than it says, or earlier than nobody had fetched."""
    bound = integration.bound(batch_size=run.batch_size, data_ranks=run.data_ranks, workers=setting.workers)
    stale = [value for _, value in run.results[0]["metrics"][f"{integration.prefix}dmagent/staleness_samples"]]
    assert stale[0] == 0
    assert set(stale[1:]) == {bound}


@every_setting
@every_integration
def test_metrics_are_in_the_trainers_own_log(integration, setting, run):
    metrics = run.results[0]["metrics"]
    names = [f"mix/{domain}" for domain in DOMAINS] + [f"achieved/{domain}" for domain in DOMAINS]
    names += ["env/general", "env/math", "mix/source", "mix/target", "dmagent/evaluation_share"]
    assert {f"{integration.prefix}{name}" for name in names} <= set(metrics)
    logged = [value for _, value in metrics[f"{integration.prefix}mix/target/Science"]]
    assert logged == pytest.approx([entry["mix"][2] for entry in run.results[0]["ledger"]], abs=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(processes=2, workers=0, accumulation=2),
        pytest.param(Setting(processes=1, workers=2, accumulation=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
@every_integration
def test_killed_and_resumed_is_as_if_nothing_had_happened(integration, setting, start):
    """Catches replayed or skipped samples, a lost history of the policy, and a mix that holds from another sample on.

    Dropout is on, so that equal weights mean an equal random state too.
    """
    if setting.workers and not integration.workers:
        pytest.skip(f"{integration.name} takes no torch workers")
    common = ["--workers", str(setting.workers), "--accumulation", str(setting.accumulation), "--dropout", "0.1"]
    common += ["--steps", "12", "--save-every", "5"]
    whole = start(*common, processes=setting.processes)
    killed = start(*common, "--kill-at", "8", processes=setting.processes, check=False)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.printed[-2000:]
    resumed = start(*common, "--resume", str(killed.out / "checkpoints"), processes=setting.processes)
    done = 5 * setting.accumulation
    assert resumed.micro_batches() == whole.micro_batches()[done:]
    assert resumed.keys() == {i: key for i, key in whole.keys().items() if i in set(resumed.indices())}
    assert resumed.results[0]["ledger"] == whole.results[0]["ledger"]
    assert resumed.results[0]["weights"] == whole.results[0]["weights"]


@pytest.mark.parametrize(
    "integration",
    [pytest.param(i, marks=pytest.mark.slow) if i.name in ("Lightning", "Megatron-core") else i for i in INTEGRATIONS],
    ids=lambda integration: integration.name,
)
def test_a_run_continues_with_changed_data(integration, start):
    """Catches a trainer that begins such a run anew, repeats rows of the present pass, or keeps the old domains."""
    common = ["--workers", "0", "--steps", "12", "--save-every", "5"]
    killed = start(*common, "--kill-at", "8", processes=2, check=False)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.printed[-2000:]
    resume = [*common, "--resume", str(killed.out / "checkpoints")]
    refused = start(*resume, processes=2, check=False, changed=True)
    assert refused.returncode != 0
    assert "AgentWeightedSampler(data='changed')" in refused.printed
    resumed = start(*resume, "--data", "changed", processes=2, changed=True)
    done = 5 * killed.batch_size * killed.data_ranks
    assert sorted(resumed.indices()) == list(range(done, resumed.results[0]["consumed"]))
    before = {index: key for index, key in killed.keys().items() if index < done}
    after = set(resumed.keys().values())
    assert len({*before.values(), *after}) == resumed.results[0]["consumed"]  # so few samples are no second pass
    launcher = start.launcher
    assert not after & launcher.keys_of([launcher.lost_shard])
    assert after & launcher.keys_of(launcher.changed_shards[NEW_DOMAIN])
    assert {len(entry["mix"]) for entry in resumed.results[0]["ledger"]} == {len(launcher.changed_shards)}
    assert resumed.results[0]["global_step"] == 12


@every_integration
def test_a_report_reads_the_newest_of_the_trainers_checkpoints(integration, start):
    """Catches a search that misses where a trainer keeps the state, or takes an older checkpoint."""
    common = ["--workers", "0", "--accumulation", "2", "--dropout", "0.1", "--steps", "12", "--save-every", "5"]
    run = start(*common, processes=2)
    history = read_history(find_saved_state(run.out / "checkpoints").state, name="run")
    per_step = run.batch_size * run.data_ranks * 2
    assert history.consumed in (10 * per_step, 12 * per_step)  # some trainers save after the last step, too
    made = [entry for entry in run.results[0]["ledger"] if entry["decided_at"] <= history.consumed]
    assert history.plan.ledger.to_json() == made
    trained = [key for index, key in run.keys().items() if index < history.consumed]
    assert int(history.counts.sum()) == len(trained)


@every_integration
def test_training_stops_cleanly_when_the_target_is_used_up(integration, start):
    """Catches a crash or a hang at the end of data, and ranks that end at different batches."""
    run = start("--steps", "500", "--accumulation", "2", processes=2, batch_size=4)
    size = 4 * run.data_ranks
    consumed, end = run.results[0]["consumed"], run.results[0]["end"]
    assert consumed == end
    assert 150 < consumed < 206
    assert sorted(run.indices()) == list(range(consumed))
    assert run.results[0]["global_step"] == -(-consumed // (2 * size))

"""What a stock Trainer's user meets first: where metrics go, which settings hold, and what is refused at once.

`make test-transformers` runs it with other versions of transformers.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from reading import quiet
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.integrations.huggingface import DataMixingCallback, DataMixingTrainerMixin
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens

METRICS = {"env/general", "mix/source/a", "dmagent/staleness_samples"}
STRATEGIES = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
"""Older versions have `group_by_length`, and refuse it themselves for data without an index."""


class Reporter(TrainerCallback):
    """Takes down what reporters such as TensorBoard's are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class MixingTrainer(DataMixingTrainerMixin, Trainer):
    pass


class Parts:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = write_toy_shards(folder / "shards", {"source/a": 60, "target/x": 40}, tokens=8, vocabulary=64)

    def sampler(self, **settings: Any) -> AgentWeightedSampler:
        return AgentWeightedSampler(
            self.shards,
            samples_per_reweight=8,
            reading=quiet(self.folder / "cache"),
            transform=packed_tokens,
            **settings,
        )

    def trainer(
        self, kind: type[Trainer] = Trainer, *, progress: bool = False, callbacks: Any = None, **arguments: Any
    ) -> Trainer:
        sampler = self.sampler(policy=StaticPolicy({"source/a": 0.5, "target/x": 0.5}))
        environment = Environment.from_pairs(
            {"general": [("a b", "c")]}, lambda text: [ord(c) % 64 for c in text], progress=progress
        )
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        given = {"max_steps": 8, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100}
        evaluated = arguments.pop("eval_dataset", None)
        args = TrainingArguments(
            str(self.folder / "out"),
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            **{**given, **arguments},
        )
        self.callback = DataMixingCallback(sampler, environment)
        return kind(
            model=LlamaForCausalLM(config),
            args=args,
            train_dataset=sampler,
            callbacks=[self.callback] if callbacks is None else callbacks,
            eval_dataset=sampler if evaluated == "train" else evaluated,
        )


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """The Trainer's log levels are those of the process."""
    ours, theirs = logging.getLogger("dmagent_loader"), transformers.logging.get_verbosity()
    before = ours.level
    yield
    ours.setLevel(before)
    transformers.logging.set_verbosity(theirs)


def mixing_logs(reporter: Reporter) -> list[dict[str, Any]]:
    return [logs for logs in reporter.logs if logs.keys() >= METRICS]


@pytest.mark.parametrize("kind", [Trainer, MixingTrainer])
@pytest.mark.parametrize("added", ["when the Trainer is built", "afterwards"])
def test_metrics_reach_the_reporters(parts: Parts, kind: type[Trainer], added: str) -> None:
    """Reporters are called before the callbacks of a user, so what the callback puts into `logs` is too late."""
    reporter = Reporter()
    trainer = parts.trainer(kind, callbacks=[reporter])
    if added == "afterwards":
        trainer.add_callback(parts.callback)
    else:
        trainer = parts.trainer(kind)
        trainer.add_callback(reporter)
        trainer.callback_handler.callbacks.reverse()  # ours comes last, as for report_to
    trainer.train()
    logged = mixing_logs(reporter)
    assert len(logged) == 3  # before the first step, and after 8 and 16 samples
    assert "achieved/target/x" in logged[1]


class ElsewhereHandler(CallbackHandler):
    """Calls the callbacks in a thread, from which no Trainer can be found."""

    def call_event(self, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().call_event, *args, **kwargs).result()


def test_a_trainer_that_is_not_found_is_reported_with_the_way_out(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a version of transformers that calls in another way; the way out needs no frames."""
    reporter = Reporter()
    trainer = parts.trainer()
    trainer.callback_handler.__class__ = ElsewhereHandler
    trainer.add_callback(reporter)
    trainer.train()
    assert "call callback.report_to(trainer.callback_handler.callbacks) before trainer.train()" in caplog.text
    assert not mixing_logs(reporter)
    assert trainer.state.log_history[0].keys() >= METRICS

    caplog.clear()
    trainer = parts.trainer()
    trainer.callback_handler.__class__ = ElsewhereHandler
    trainer.add_callback(reporter)
    parts.callback.report_to(trainer.callback_handler.callbacks)
    trainer.train()
    assert "was not found" not in caplog.text
    assert len(mixing_logs(reporter)) == 3


@pytest.mark.parametrize("which", ["the same", "another", "one of several"])
def test_a_sampler_as_evaluation_data_is_refused_when_the_trainer_is_built(parts: Parts, which: str) -> None:
    """The first evaluation takes the samples of the run, or never ends."""
    data = {"the same": "train", "another": parts.sampler(), "one of several": {"a": [], "b": parts.sampler()}}
    with pytest.raises(ConfigurationError, match=r"Evaluate on a fixed list: eval_dataset=\[dict\(row\)"):
        parts.trainer(eval_dataset=data[which], eval_strategy="steps", eval_steps=4)


def test_a_sampler_as_evaluation_data_is_refused_when_it_comes_later(parts: Parts) -> None:
    trainer = parts.trainer(callbacks=[], eval_dataset=parts.sampler(), eval_strategy="steps", eval_steps=4)
    trainer.add_callback(parts.callback)
    with pytest.raises(ConfigurationError, match="eval_dataset is an AgentWeightedSampler"):
        trainer.train()
    with pytest.raises(ConfigurationError, match="eval_dataset is an AgentWeightedSampler"):
        parts.trainer().evaluate(parts.sampler())


def test_the_remedy_for_evaluation_data_works(parts: Parts) -> None:
    rows = [dict(row) for row in itertools.islice(parts.sampler(), 20)]
    trainer = parts.trainer(eval_dataset=rows, eval_strategy="steps", eval_steps=4)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2


@pytest.mark.skipif(not STRATEGIES, reason="this version refuses group_by_length itself")
@pytest.mark.parametrize(("strategy", "warned"), [("group_by_length", True), ("random", False)])
def test_grouping_by_length_is_said_to_be_without_effect(
    parts: Parts, strategy: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    parts.trainer(train_sampling_strategy=strategy).train()
    assert ("'group_by_length' has no effect, because the sampler's plan fixes the order" in caplog.text) == warned


@pytest.mark.skipif(STRATEGIES, reason="this version has another setting")
def test_grouping_by_length_is_refused_by_older_versions(parts: Parts) -> None:
    with pytest.raises(ValueError, match="only available for `Dataset`"):
        parts.trainer(group_by_length=True)


@pytest.mark.parametrize(
    ("level", "ours"), [("error", logging.ERROR), ("debug", logging.DEBUG), ("passive", logging.WARNING)]
)
def test_the_log_level_of_the_trainer_is_ours(parts: Parts, level: str, ours: int) -> None:
    logging.getLogger("dmagent_loader").setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    parts.trainer(log_level=level)
    assert logging.getLogger("dmagent_loader.environment.core").getEffectiveLevel() == ours


class Terminal:
    """Standard error of a terminal, taken down."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("disabled", [True, False])
def test_disable_tqdm_hides_our_bars(parts: Parts, disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    parts.trainer(progress=True, disable_tqdm=disabled).train()
    assert ("environment:" in sys.stderr.written) == (not disabled)

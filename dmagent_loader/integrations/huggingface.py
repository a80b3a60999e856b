"""The Hugging Face Trainer: one callback that evaluates the model, re-weights the domains, and saves the run's state.

    Trainer(model, args, train_dataset=sampler, callbacks=[DataMixingCallback(sampler, environment)])

A stock Trainer reads an iterable dataset in one of three ways. The callback finds out which, and reports it to the
sampler:

- one process: the stream as it is;
- several processes, by default: rank 0 reads one whole stream and sends each rank its slice (`DataLoaderDispatcher`);
- several processes, ``accelerator_config={"dispatch_batches": False}``: every rank reads the whole stream and keeps its
  slice (`IterableDatasetShard`), and each row is read once by every rank.

In all three, accelerate fetches one batch more than is trained on. `DataMixingTrainerMixin` uses `MixingDataLoader`
instead: each rank reads only its share, and a new mix takes effect with the next step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dmagent_loader.data_loader import MixingDataLoader
from dmagent_loader.environment import Environment
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, StateError, require_extra
from dmagent_loader.integrations._calling_trainer import trainer_calling
from dmagent_loader.integrations._passes import ENDS_EARLY
from dmagent_loader.integrations._trainer_checks import (
    follow_log_level,
    refuse_as_evaluation_data,
    refuse_order_of_workers,
    refuse_rows_without_columns,
    refuse_second,
    warn_about_order,
)
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.sampler import AgentWeightedSampler, LoaderSettings

require_extra("transformers", "hf")
require_extra("accelerate", "hf")

from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard  # noqa: E402
from transformers import PrinterCallback, ProgressCallback, TrainerCallback  # noqa: E402
from transformers.trainer_callback import ExportableState  # noqa: E402
from transformers.trainer_utils import SaveStrategy  # noqa: E402

__all__ = ["DataMixingCallback", "DataMixingTrainerMixin", "last_whole_checkpoint"]

logger = logging.getLogger(__name__)


class DataMixingCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Evaluates the environment when a decision is due, and lets the sampler's policy choose the next mix.

    The base model is evaluated before the first step, and the model again after every ``sampler.samples_per_reweight``
    samples. The Trainer's checkpoints (``trainer_state.json``) contain the state, and ``resume_from_checkpoint``
    restores it. The callback switches off the Trainer's own skipping of batches, because the sampler itself resumes at
    the right sample. Training stops when the plan ends. ``auto_find_batch_size`` works: an attempt with a smaller batch
    continues after the samples that the last one trained on, with the decisions made so far.

    The Trainer's reporters and its ``log_history`` get the metrics: see `dmagent_loader.integrations.mixing.Report`.

    Args:
        sampler: Sampler that is the Trainer's `train_dataset`.
        environment: Question sets; None: no decisions, mixes change by `set_mix` only.
    """

    def __init__(self, sampler: AgentWeightedSampler, environment: Environment | None = None) -> None:
        self._mixing = Mixing(sampler, environment)
        self._samples_per_batch, self._samples_per_step, self._batches = 1, 1, 0
        self._attempt: list[dict[str, Any]] | None = None
        """Metrics logged since training began; None: it is over, or no attempt with a smaller batch can follow."""
        self._reporters: list[TrainerCallback] = []
        self._are_reporters_given = False
        self._random_state: torch.Tensor | None = None
        self._resuming = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Binds the sampler before the Trainer asks for its length, and switches off skipping of batches at resume."""
        if args.restore_callback_states_from_checkpoint:
            raise ConfigurationError(
                "restore_callback_states_from_checkpoint=True makes the Trainer build a new DataMixingCallback "
                "without its sampler: leave it False, this callback restores itself"
            )
        follow_log_level(args)
        refuse_as_evaluation_data(getattr(trainer_calling(self), "eval_dataset", None))
        args.ignore_data_skip = True
        self._mixing.follow_sampler()
        batch_size = args.train_batch_size
        if args.world_size > 1:
            batch_size, _ = _batch_sizes(args, batch_size)
        if _whole_steps(args):
            self.sampler.bind(
                LoaderSettings(
                    kind="whole" if args.world_size > 1 else "sharded",
                    batch_size=batch_size,
                    samples_per_step=_samples_per_step(args, batch_size),
                    by_trainer=True,
                )
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recognises the loader, restores a checkpoint's state, and evaluates the base model."""
        if state.is_hyper_param_search:
            raise ConfigurationError(
                "hyperparameter_search trains a new model in each trial, but a sampler is one run, so a trial would "
                "continue the mixes and the data of the one before: build sampler, callback and Trainer anew for each "
                "trial"
            )
        self._look_at_trainer()
        loader = kwargs["train_dataloader"]
        self._recognise(args, loader)
        refuse_rows_without_columns(self.sampler, loader.collate_fn)
        refuse_order_of_workers(args)
        warn_about_order(args)
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[-1] if saved else None
        if state.global_step > 0:
            self._restore(args, state, saved)
            self._resuming, self._attempt = True, None
        else:
            self._mixing.follow_sampler()
            if self._attempt is None:
                self._mixing.warn_if_used()
        self._refuse_without_samples(loader)
        # A checkpoint made without this callback has no entry for it, and the Trainer needs one when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._batches = 0
        # After an out-of-memory error, the Trainer begins again with a smaller batch and an empty log.
        state.log_history[:0] = self._attempt or []
        self._attempt = list(self._attempt or ()) if args.auto_find_batch_size else None
        self._mixing.begin(samples=self.consumed + (state.max_steps - state.global_step) * self._samples_per_step)
        self._maybe_reweight(args, state, control, kwargs["model"], kwargs.get("optimizer"))
        self._mixing.announce()
        self._warn_about_epochs(args, state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins a new pass after the last sample trained on: those prefetched by the last pass were not."""
        self._seek()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resumption, restores the random state from before the loader's iterator was made."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None
        self._resuming = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a batch whose gradients are accumulated: the last step of an epoch may have fewer than the others."""
        self._batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts consumed samples, decides when a decision is due, and stops training at the end of the plan."""
        self._mixing.consumed += (self._batches + 1) * self._samples_per_batch
        self._batches = 0
        if not self._stop_at_the_end(args, control):
            self._maybe_reweight(args, state, control, kwargs["model"], kwargs.get("optimizer"))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops training if the samples left make no whole step: a further pass would have none."""
        if not control.should_training_stop:
            self._seek()
            self._stop_at_the_end(args, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what is left of the data."""
        self._attempt = None
        self._mixing.end()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses an evaluation on a sampler that was passed to `Trainer.evaluate`."""
        refuse_as_evaluation_data(getattr(kwargs["eval_dataloader"], "dataset", None))

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoint. The Trainer asks for it before training begins, too."""
        if not self._batches:  # else the sampler may stand within a step
            self._mixing.follow_sampler()
        attributes = {**self._mixing.state_dict(), "samples_per_step": self._samples_per_step}
        return {"args": {}, "attributes": attributes}

    def report_to(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Sets the callbacks whose `on_log` receives the metrics, for example ``trainer.callback_handler.callbacks``.

        Without a call they are found at the start of training.
        """
        self._are_reporters_given = True
        self._set_reporters(callbacks)

    @property
    def sampler(self) -> AgentWeightedSampler:
        """The Trainer's `train_dataset`."""
        return self._mixing.sampler

    @property
    def environment(self) -> Environment | None:
        """Question sets; None: no decisions."""
        return self._mixing.environment

    @environment.setter
    def environment(self, environment: Environment | None) -> None:
        self._mixing.environment = environment

    @property
    def consumed(self) -> int:
        """Samples that training has consumed over all ranks since the run began."""
        return self._mixing.consumed

    def _seek(self) -> None:
        """Sets the sampler after the last batch, also if the epoch was stopped within a step: its gradients stay."""
        self.sampler.seek(self.consumed + self._batches * self._samples_per_batch)

    def _stop_at_the_end(self, args: Any, control: Any) -> bool:
        if not self._mixing.finished():
            return False
        control.should_training_stop = control.should_log = True
        if args.save_strategy == SaveStrategy.STEPS:
            control.should_save = True  # as the Trainer itself does at its last step
        return True

    def _look_at_trainer(self) -> None:
        """Finds the reporters, and checks a Trainer that was built before the callback was added."""
        trainer = trainer_calling(self)
        refuse_as_evaluation_data(getattr(trainer, "eval_dataset", None))
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        refuse_second(type(self).__name__, [entry for entry in callbacks if isinstance(entry, DataMixingCallback)])
        if self._are_reporters_given:
            return
        self._set_reporters(callbacks)  # a callback may be used by several Trainers, one after another
        if trainer is None:
            logger.warning(
                "the Trainer that calls DataMixingCallback was not found, so metrics of the mix are only in its "
                "log_history: call callback.report_to(trainer.callback_handler.callbacks) before trainer.train(), or "
                "use DataMixingTrainerMixin, which does so"
            )

    def _set_reporters(self, callbacks: Sequence[TrainerCallback]) -> None:
        self._reporters = [callback for callback in callbacks if callback is not self]

    def _maybe_reweight(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any) -> None:
        if not self._mixing.due():
            return
        report = self._mixing.reweight(
            lambda environment: environment.evaluate(model, progress=not args.disable_tqdm),
            measure=lambda environment, rows, settings: environment.influence(
                model, rows, optimizer=optimizer, **settings
            ),
        )
        entry = {**report.full, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(entry)
        if self._attempt is not None:
            self._attempt.append(entry)
        for reporter in self._reporters:
            console = isinstance(reporter, (ProgressCallback, PrinterCallback))
            logs = {name: f"{value:.4g}" for name, value in report.short.items()} if console else dict(report.full)
            reporter.on_log(args, state, control, logs=logs)

    def _recognise(self, args: Any, loader: Any) -> None:
        """Finds out how the Trainer reads the sampler, and reports it to the sampler."""
        sliced_by_rank = isinstance(loader.dataset, IterableDatasetShard)
        dataset = loader.dataset.dataset if sliced_by_rank else loader.dataset
        if dataset is not self.sampler:
            raise ConfigurationError(
                f"the Trainer's train_dataset is a {type(dataset).__name__}, not the sampler of this "
                "DataMixingCallback: pass the same sampler to both"
            )
        world, workers, loaded = args.world_size, loader.num_workers, loader.batch_size or 1
        dispatched = isinstance(loader, DataLoaderDispatcher)
        is_split = world > 1 and (dispatched or sliced_by_rank)
        block, batch_size = loaded, loaded
        ahead = (workers * (loader.prefetch_factor or 0)) * loaded
        if is_split:
            split = bool(loader.split_batches if dispatched else loader.dataset.split_batches)
            batch_size = loaded // world if split else loaded
            block = loaded if dispatched or split else loaded * world
            ahead = batch_size * world + workers * (loader.prefetch_factor or 0) * block
            if sliced_by_rank:
                logger.warning(
                    "dispatch_batches=False: each of the %d ranks reads and decodes every row, and discards %d of %d; "
                    "to read each row once, leave dispatch_batches at its default, or use DataMixingTrainerMixin",
                    world,
                    world - 1,
                    world,
                )
        else:
            bare = isinstance(loader, MixingDataLoader) or type(loader) is DataLoader
            ahead = (ahead + (0 if bare else loaded)) * world
        self._samples_per_batch = batch_size * world
        self._samples_per_step = self._samples_per_batch * args.gradient_accumulation_steps
        self.sampler.bind(
            LoaderSettings(
                kind="whole" if is_split else "sharded",
                batch_size=batch_size,
                samples_per_fetch=block,
                samples_per_step=_samples_per_step(args, batch_size),
                prefetch_factor=loader.prefetch_factor or 1,
                prefetched_samples=ahead if workers else 0,
                by_trainer=True,
            ),
            before_iteration=self._keep_random_state,
        )

    def _refuse_without_samples(self, loader: Any) -> None:
        """Refuses a run that has ended. Other loaders end a pass without a batch; this one fails obscurely."""
        if isinstance(loader, DataLoaderDispatcher) and self._mixing.finished():
            raise StateError(
                f"the run has ended: its data were used up after {self.consumed} samples, and none are left to train "
                "on. Load its last checkpoint as a model; start a new run with a new sampler and output_dir; or "
                f"continue this one with more data or exhausted='repeat': {HOW_TO_RESUME}"
            )

    def _keep_random_state(self) -> None:
        """Keeps the random state that the Trainer has restored.

        Making the loader's iterator draws a seed from it, so dropout would differ from an uninterrupted run.
        """
        if self._resuming:
            self._random_state = torch.get_rng_state()

    def _restore(self, args: Any, state: Any, saved: Any) -> None:
        if saved is None:
            logger.warning(
                "the checkpoint at step %d was made without DataMixingCallback: the plan begins at its first sample",
                state.global_step,
            )
        else:
            try:
                attributes = saved["attributes"]
                samples_per_step = int(attributes["samples_per_step"])
            except (KeyError, TypeError) as error:
                raise StateError(f"the checkpoint's state of DataMixingCallback cannot be read: {error!r}") from error
            self._mixing.load_state_dict(attributes)
            self._check_steps(args, state, samples_per_step)
        if not args.ignore_data_skip:
            args.ignore_data_skip = True
            logger.warning(
                "the callback was added after the Trainer was built: skipping of batches is switched off, but the "
                "random state of the checkpoint is not restored; pass the callback to Trainer(callbacks=[...])"
            )

    def _check_steps(self, args: Any, state: Any, samples_per_step: int) -> None:
        """Refuses a changed step size: the Trainer measures an epoch in new steps, but counts old steps as done."""
        end = self.sampler.end
        if end is None or args.max_steps > 0 or samples_per_step == self._samples_per_step:
            return
        needed = state.global_step + -(-(end - self.consumed) // self._samples_per_step)
        raise ConfigurationError(
            f"the checkpoint was made with {samples_per_step} samples in a step, but this run has "
            f"{self._samples_per_step}: with num_train_epochs the Trainer would stop at step {state.max_steps}, even "
            f"with data left; pass max_steps={needed}"
        )

    def _warn_about_epochs(self, args: Any, state: Any) -> None:
        """Warns if the epochs, which the Trainer measures under the initial mix, end before the data do."""
        end = self.sampler.end
        if end is None or args.max_steps > 0:
            return
        steps = state.global_step + -(-(end - self.consumed) // self._samples_per_step)
        if state.max_steps < ENDS_EARLY * steps:
            logger.warning(
                "num_train_epochs=%g plans %d steps, because the Trainer measures an epoch under the initial mix, but "
                "under the present mix the data last for %d steps: set max_steps=%d to use them up",
                args.num_train_epochs,
                state.max_steps,
                steps,
                steps,
            )


class DataMixingTrainerMixin:
    """Makes a Trainer read through `MixingDataLoader`, which fetches nothing beyond the present step without workers.

        class MyTrainer(DataMixingTrainerMixin, Trainer): ...

    Each rank reads only its share, and a new mix takes effect with the next step.
    """

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A `MixingDataLoader` for a sampler; the Trainer's own loader for any other dataset."""
        trainer: Any = self
        if not isinstance(trainer.train_dataset, AgentWeightedSampler):
            return super().get_train_dataloader()  # type: ignore[misc, no-any-return]
        args, workers = trainer.args, trainer.args.dataloader_num_workers
        # Attributes of the Trainer where it changes the arguments: `auto_find_batch_size` makes the batch smaller, and
        # adapters hide the columns that the base model takes.
        batch_size = trainer._train_batch_size
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, DataMixingCallback):
                callback.report_to(trainer.callback_handler.callbacks)
        return MixingDataLoader(
            trainer.train_dataset,
            batch_size,
            samples_per_step=_samples_per_step(args, batch_size),
            collate_fn=trainer._get_collator_with_removed_columns(trainer.data_collator, description="Training"),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            # torch refuses one without workers, with which it would have no effect.
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None) if workers else None,
            generator=torch.Generator().manual_seed(args.seed),
            by_trainer=True,
        )


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint, for ``resume_from_checkpoint`` after a crash.

    The Trainer writes ``trainer_state.json`` last; a folder without a readable one is incomplete.

    Args:
        output_dir: Output folder of the Trainer.

    Returns:
        Path of the checkpoint; None if there is none.
    """
    complete: list[tuple[int, Path]] = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        try:
            step = int(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        complete.append((step, folder))
    return str(max(complete)[1]) if complete else None


def _whole_steps(args: Any) -> bool:
    """Whether a step consists of several batches; a run then has to end with a whole step."""
    return bool(args.world_size > 1 or args.gradient_accumulation_steps > 1)


def _samples_per_step(args: Any, batch_size: int) -> int:
    """Samples of one rank in one step; the run is cut to whole steps.

    The number must be known before the Trainer asks for the length. The Trainer plans the last step of an epoch by it,
    and counts that step as whole even if the run has become longer since.
    """
    return batch_size * int(args.gradient_accumulation_steps) if _whole_steps(args) else 1


def _batch_sizes(args: Any, loaded: int) -> tuple[int, int]:
    """Samples of one rank, and of one batch of the loader, when accelerate splits a stream."""
    split = bool(getattr(args.accelerator_config, "split_batches", False))
    return (loaded // args.world_size if split else loaded), loaded

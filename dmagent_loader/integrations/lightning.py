"""Lightning's Trainer: one callback that evaluates the model, re-weights the domains, and saves the run's state.

    loader = DataLoader(sampler, batch_size=8)
    trainer = Trainer(max_epochs=-1, callbacks=[DataMixingCallback(sampler, environment)])
    trainer.fit(module, loader)

Lightning makes the loader's iterator, and may fetch a batch, before `on_train_start`. The base model is therefore
evaluated in `on_fit_start`. Lightning ends an epoch at the length that the loader had when the fit began, even if mixes
have changed since. The next epoch continues after the last sample trained on, until the data are used up.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dmagent_loader.environment import Environment, Evaluation, Influence
from dmagent_loader.environment.scoring import Model
from dmagent_loader.errors import ConfigurationError, StateError, require_extra
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.sampler import AgentWeightedSampler, LoaderSettings

require_extra("lightning.pytorch", "lightning")

from lightning.pytorch import Callback, LightningModule  # noqa: E402

__all__ = ["DataMixingCallback"]

logger = logging.getLogger(__name__)


class DataMixingCallback(Callback):  # type: ignore[misc]
    """Evaluates the environment when a decision is due, and lets the sampler's policy choose the next mix.

    The base model is evaluated before the first step, and the model again after every ``sampler.samples_per_reweight``
    samples, at the end of an optimizer step. Lightning's checkpoints contain the state, and ``fit(ckpt_path=...)``
    restores it. Training stops when the plan ends.

    The Trainer's loggers get the metrics: see `dmagent_loader.integrations.mixing.Report`.

    Args:
        sampler: Dataset of a DataLoader that the Trainer trains on, alone or beside others in a dict or list.
        environment: Question sets; None: no decisions, mixes change by `set_mix` only.
        model: Function from the LightningModule to a model that is called as ``model(input_ids, attention_mask=...)``
            and returns logits, for example ``lambda module: module.network``. None: the LightningModule itself.
    """

    def __init__(
        self,
        sampler: AgentWeightedSampler,
        environment: Environment | None = None,
        *,
        model: Callable[[Any], Model] | None = None,
    ) -> None:
        self.sampler, self.environment = sampler, environment
        self._model = model
        self._mixing = Mixing(sampler, environment)
        self._ranks: dict[str, int] = {}
        self._samples_per_batch = self._accumulated = 1
        self._step = self._peeked = 0
        self._loaded_step: int | None = None
        self._restored = self._used_up = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the loader's iterator is made: sets ranks and length, and drops samples prefetched by an earlier fit.

        The length stays fixed for the fit, because Lightning ends an epoch by it.
        """
        if stage != "fit":
            return
        self._check(pl_module)
        ranks = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
        if ranks is not None:
            self._ranks = {"rank": ranks["rank"], "world_size": ranks["num_replicas"]}
            self.sampler.bind(rank=ranks["rank"], world_size=ranks["num_replicas"])
        self._loaded_step, self._restored, self._used_up = None, False, False
        self._mixing.consumed = self.sampler.consumed
        if not trainer.ckpt_path:
            self._mixing.warn_if_used()
        self.sampler.seek(self.consumed)
        described = replace(self.sampler.loader, by_trainer=True)  # by its loader, if at all
        self.sampler.bind(described, counts_every_batch=True, keep_length=True)
        self._mixing.begin()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Evaluates the base model. A checkpoint, if any, has been restored, except for the Trainer's counters."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Recognises the loader. A strategy that restores late (FSDP, DeepSpeed) makes its first decision here."""
        loader = self._recognise(trainer)
        if not getattr(loader, "num_workers", 0) and not self.sampler.is_iterated:
            raise StateError(
                "the loader's iterator was made before the checkpoint's state was restored, so it would deliver other "
                "samples: do not use trainer.estimated_stepping_batches in configure_optimizers with this strategy, "
                "and run LearningRateFinder with a Trainer and a sampler of its own"
            )
        if trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer)
        self._step = trainer.global_step
        self._mixing.stop_at(self._limit(trainer))
        self._mixing.announce()
        self._stop_at_the_end(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Ends training when the data are used up and Lightning would continue; describes the loader of the epoch.

        Another callback may accumulate more batches from now on, and a reloaded loader may have another batch size.

        Raises:
            StopIteration: Always when the data are used up: this is how a hook ends Lightning's loop over epochs.
        """
        if self._used_up:
            logger.warning(
                "data are used up after %d samples: training ends at step %d, although min_epochs=%s and min_steps=%s "
                "ask for more",
                self.consumed,
                trainer.global_step,
                trainer.min_epochs,
                trainer.min_steps,
            )
            raise StopIteration
        self._recognise(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts consumed samples; after a whole optimizer step, decides if a decision is due, and stops at the end."""
        if self._used_up:
            return
        if trainer.accumulate_grad_batches != self._accumulated:
            self._recognise(trainer)
        self._mixing.consumed += self._samples_per_batch
        self.sampler.reweight_due(self.consumed)
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        self._stop_at_the_end(trainer)
        if not self._used_up:
            self._maybe_reweight(trainer, self._step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Begins the next epoch after the consumed samples: prefetched samples were not trained on."""
        self.sampler.seek(self.consumed)
        self._stop_at_the_end(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Says what is left of the data, and warns if it is left because the number of epochs was reached first."""
        self._mixing.end()
        end = self.sampler.end
        epochs_are_over = 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= trainer.current_epoch
        steps_are_over = 0 <= trainer.max_steps <= trainer.global_step
        whole_epochs = trainer.limit_train_batches == 1.0
        if end is None or end <= self.consumed or not epochs_are_over or steps_are_over or not whole_epochs:
            return
        logger.warning(
            "training ended after max_epochs=%d with %d samples left before the data are used up: Lightning ends an "
            "epoch at the length that the loader had under the first mix, and the mix has changed since. Pass "
            "max_epochs=-1 to train until the data are used up, or resume from the last checkpoint to use the rest",
            trainer.max_epochs,
            end - self.consumed,
        )

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints."""
        return self._mixing.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Resumes from the state in a checkpoint.

        Raises:
            StateError: The state cannot be read, or belongs to other shards or another seed.
        """
        # BatchSizeFinder restores the present state after its trials. It is not loaded again, because Lightning has
        # already made the loader's next iterator, which would be refused.
        is_new = self.sampler.frontier <= self.consumed + self._peeked * self.sampler.global_batch
        if not (is_new and state_dict == self._mixing.state_dict()):
            self._mixing.load_state_dict(state_dict)
        self._restored = True

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Reads the step, and corrects the counters of old versions, before Lightning restores them."""
        self._loaded_step = int(checkpoint["global_step"])
        self._peeked = 1 if math.isinf(trainer.num_training_batches) else 0
        if not hasattr(trainer.fit_loop.epoch_loop, "restarted_on_train_batch_end"):
            _count_last_batch(checkpoint)

    @property
    def consumed(self) -> int:
        """Samples that training has consumed over all ranks since the run began."""
        return self._mixing.consumed

    def _begin(self, trainer: Any) -> None:
        if trainer.ckpt_path and not self._restored:
            logger.warning(
                "the checkpoint %s was made without DataMixingCallback: the plan begins at its first sample",
                trainer.ckpt_path,
            )
        if self.sampler.loader.samples_per_fetch is not None:  # a MixingDataLoader has described itself
            self._samples_per_batch = self.sampler.loader.batch_size * self.sampler.world_size
            self._mixing.stop_at(self._limit(trainer))
        self._maybe_reweight(trainer, trainer.global_step if self._loaded_step is None else self._loaded_step)

    def _stop_at_the_end(self, trainer: Any) -> None:
        if not self._used_up and self._mixing.finished():
            self._used_up = trainer.should_stop = True

    def _maybe_reweight(self, trainer: Any, step: int) -> None:
        if not self._mixing.due():
            return
        report = self._mixing.reweight(
            lambda environment: self._evaluate(trainer, environment),
            measure=lambda environment, rows, settings: self._measure(trainer, environment, rows, settings),
        )
        for writer in trainer.loggers:
            writer.log_metrics(dict(report.full), step=step)

    def _evaluate(self, trainer: Any, environment: Evaluation) -> Mapping[str, float]:
        model = trainer.model if self._model is None else self._model(trainer.lightning_module)
        with trainer.precision_plugin.forward_context():
            return environment.evaluate(model, **self._ranks, progress=trainer.progress_bar_callback is not None)

    def _measure(
        self,
        trainer: Any,
        environment: Environment,
        rows: Mapping[str, Sequence[Any]],
        settings: Mapping[str, Any],
    ) -> Influence:
        model = trainer.model if self._model is None else self._model(trainer.lightning_module)
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        with trainer.precision_plugin.forward_context():
            return environment.influence(model, rows, optimizer=optimizer, **settings, **self._ranks)

    def _check(self, module: Any) -> None:
        """Refuses what cannot work, before anything is computed."""
        try:
            _ = self.sampler.policy
        except StateError as error:
            raise ConfigurationError(
                "this process has a pickled copy of the sampler, which cannot decide: strategies that spawn their "
                "processes (ddp_spawn) are not supported; use strategy='ddp', or start the program with torchrun"
            ) from error
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ConfigurationError(
                f"{type(module).__name__}.training_step takes dataloader_iter, so Lightning does not know how many "
                "batches a step reads, and consumed samples cannot be counted: make it take batch instead"
            )
        if self.environment is not None and self._model is None and type(module).forward is LightningModule.forward:
            raise ConfigurationError(
                f"{type(module).__name__} has no forward(input_ids, attention_mask), so the environment cannot score "
                "it: write one that returns logits, or pass DataMixingCallback(..., model=lambda module: "
                "module.network)"
            )

    def _recognise(self, trainer: Any) -> Any:
        """Finds the loader that reads the sampler among those of the Trainer, and describes it to the sampler."""
        loaders = list(_leaves(trainer.train_dataloader))
        readers = [leaf for leaf in loaders if leaf is self.sampler or getattr(leaf, "dataset", None) is self.sampler]
        if len(readers) != 1:
            shown = ", ".join(f"{type(x).__name__} of {type(getattr(x, 'dataset', x)).__name__}" for x in loaders)
            raise ConfigurationError(
                f"{len(readers) or 'none'} of the Trainer's {len(loaders)} training loaders ({shown}) read the sampler "
                "of this DataMixingCallback, but exactly one must: train on DataLoader(sampler, ...), with the same "
                "sampler"
            )
        loader = readers[0]
        if loader is not self.sampler and hasattr(loader, "load_state_dict"):
            raise ConfigurationError(
                f"the sampler is read by a {type(loader).__name__}, whose own state Lightning would restore after that "
                "of DataMixingCallback. That state counts the prefetched batch as trained on: use "
                "torch.utils.data.DataLoader"
            )
        if not getattr(loader, "in_order", True):
            raise ConfigurationError(
                "the DataLoader has in_order=False, so batches arrive in the order in which workers finish them, and "
                "the number of consumed samples no longer identifies the samples: leave in_order at True"
            )
        batch_size, workers = getattr(loader, "batch_size", None) or 1, getattr(loader, "num_workers", 0)
        factor = getattr(loader, "prefetch_factor", None) or 1
        world = self.sampler.world_size
        self._samples_per_batch, self._accumulated = batch_size * world, trainer.accumulate_grad_batches
        # Without a length, Lightning prefetches one batch to recognise the last one.
        ahead = workers * factor + (1 if math.isinf(trainer.num_training_batches) else 0)
        self.sampler.bind(
            LoaderSettings(
                batch_size=batch_size,
                samples_per_fetch=batch_size,
                samples_per_step=batch_size * trainer.accumulate_grad_batches,
                prefetch_factor=factor,
                prefetched_samples=ahead * self._samples_per_batch if workers else 0,
                by_trainer=True,
            )
        )
        return loader

    def _limit(self, trainer: Any) -> int | None:
        """Samples at which Lightning stops by its own limits; None: it has none."""
        bounds: list[int] = []
        accumulated = trainer.accumulate_grad_batches
        if trainer.max_steps is not None and trainer.max_steps >= 0:
            bounds.append((trainer.max_steps - trainer.global_step) * accumulated)
        if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(trainer.num_training_batches):
            bounds.append((trainer.max_epochs - trainer.current_epoch) * int(trainer.num_training_batches))
        if not bounds:
            return None
        return int(max(1, self.consumed + max(0, min(bounds)) * self._samples_per_batch))


def _leaves(loaders: Any) -> Iterator[Any]:
    """The loaders in a nested structure of lists and mappings, or the single loader itself."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for part in loaders:
            yield from _leaves(part)
    else:
        yield loaders


def _count_last_batch(checkpoint: dict[str, Any]) -> None:
    """Counts the batch at whose end a checkpoint was saved as done, as Lightning does from version 2.5.

    Older versions treat it as a batch still to be trained on. With gradient accumulation, the first step of a resumed
    run would then have one batch less. At the last batch of an epoch nothing is changed.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is not None and not progress["is_last_batch"]:
        for counts in (progress["total"], progress["current"]):
            counts["completed"] = counts["processed"]

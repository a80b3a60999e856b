"""NeMo's LLM recipes (`nemo.collections.llm`, MegatronStrategy): a data module and a callback.

    data = AgentWeightedDataModule(sampler, seq_length=4096, micro_batch_size=1, global_batch_size=256)
    trainer = nl.Trainer(..., callbacks=[DataMixingCallback(environment=environment)])
    llm.pretrain(model, data, trainer, ...)

NeMo builds its process groups inside `trainer.fit`. The data module then sets the data-parallel rank of the sampler:
tensor-, pipeline- and context-parallel peers get the same samples. NeMo and the sampler count consumed samples alike:
global steps times the global batch.

NeMo describes trainer and data module in the ``context`` folder of its checkpoints, and rebuilds them from there. The
description contains neither sampler nor environment: it stays small, and `io.load_context` works without the shards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from dmagent_loader.data_loader import MixingDataLoader
from dmagent_loader.environment import Environment, Evaluation
from dmagent_loader.errors import ConfigurationError, StateError, require_extra
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.sampler import AgentWeightedSampler, LoaderSettings
from dmagent_loader.transforms import ShiftedTokens

require_extra("nemo.collections.llm", "nemo")

import lightning.pytorch as pl  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches, update_num_microbatches  # noqa: E402
from nemo.lightning.io.mixin import IOMixin  # noqa: E402
from nemo.lightning.pytorch.plugins import MegatronDataSampler  # noqa: E402
from nemo.utils.import_utils import safe_import  # noqa: E402

from dmagent_loader.integrations.megatron import data_parallel_ranks, evaluate  # noqa: E402

__all__ = ["AgentWeightedDataModule", "DataMixingCallback"]

logger = logging.getLogger(__name__)

_, HAVE_TE = safe_import("transformer_engine")

_NEEDED = ("tokens", "labels", "loss_mask", "position_ids")


class AgentWeightedDataModule(pl.LightningDataModule, IOMixin):  # type: ignore[misc]
    """The data module of a NeMo LLM recipe, in place of `PreTrainingDataModule` or `MockDataModule`.

    A sampler without a transform gets `ShiftedTokens`. Rows of `seq_length` + 1 packed tokens are used in full; in rows
    of `seq_length` tokens, the loss ignores the last position. A custom transform must return ``tokens``, ``labels``,
    ``position_ids``, (T,) int64, and ``loss_mask``, (T,) float32. Each micro-batch of the loader has the tags
    ``__key__``, ``__domain__`` and ``__index__``. NeMo's own ``gpt_data_step`` empties them; a custom step
    (``GPTConfig.data_step_fn``) can read them.

    The run ends with the last whole global batch. For validation, override `val_dataloader` in a subclass.

    Args:
        sampler: Sampler to read. None: NeMo rebuilds the module from a checkpoint's context; it has no data then.
        seq_length: T, tokens that the model reads.
        micro_batch_size: Rows of one forward step of one data-parallel rank.
        global_batch_size: Rows of one optimizer step over all data-parallel ranks. NeMo's ramp-up of the batch size is
            not supported.
        tokenizer: NeMo tokenizer equal to that of the packed shards; `llm.pretrain` passes it to the model.
        num_workers: Torch data workers of each process. Without workers a new mix takes effect with the next step.
        prefetch_factor: Micro-batches that each worker prepares ahead; None: 2.
        pin_memory: See `torch.utils.data.DataLoader`.
        persistent_workers: See `torch.utils.data.DataLoader`.
        create_attention_mask: Whether to add the causal mask, (B, 1, T, T) bool, True at masked positions. It is always
            added without Transformer Engine, because NeMo's forward step then requires it.
        output_log: Whether to log ``consumed_samples`` and ``global_batch_size``, as NeMo does.

    Raises:
        ConfigurationError: The batch sizes do not fit.
    """

    def __init__(
        self,
        sampler: AgentWeightedSampler | None = None,
        *,
        seq_length: int = 2048,
        micro_batch_size: int = 4,
        global_batch_size: int = 8,
        tokenizer: Any = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = True,
        persistent_workers: bool = False,
        create_attention_mask: bool = False,
        output_log: bool = True,
    ) -> None:
        super().__init__()
        self._sampler = sampler
        self.seq_length, self.tokenizer = seq_length, tokenizer
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.pin_memory, self.persistent_workers = pin_memory, persistent_workers
        self.create_attention_mask = create_attention_mask or not HAVE_TE
        self.data_sampler = _ExternalDataSampler(
            self,
            seq_len=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=output_log,
        )
        self._begun = self._restored = False

    @property
    def sampler(self) -> AgentWeightedSampler:
        """Sampler to read.

        Raises:
            ConfigurationError: There is no sampler.
        """
        if self._sampler is None:
            raise ConfigurationError(
                "this AgentWeightedDataModule has no sampler, because it was built from the context of a checkpoint, "
                "which does not describe the shards: build a new one with AgentWeightedDataModule(sampler, ...)"
            )
        return self._sampler

    @property
    def consumed(self) -> int:
        """Samples that training has consumed over all ranks since the run began."""
        if not self._begun:
            return int(self.data_sampler.init_consumed_samples)
        return self.consumed_after(self.trainer.global_step)

    def consumed_after(self, global_step: int) -> int:
        """Samples consumed after `global_step` optimizer steps, as NeMo counts them."""
        return int(self.data_sampler.compute_consumed_samples(global_step - self.data_sampler.init_global_step))

    # Called by the trainer, in this order

    def setup(self, stage: str = "") -> None:
        """Binds the sampler to its data-parallel rank: NeMo's process groups exist by now."""
        sampler, ranks = self.sampler, data_parallel_ranks()
        data_ranks = ranks["world_size"]
        if self.global_batch_size % (self.micro_batch_size * data_ranks):
            raise ConfigurationError(
                f"a global batch of {self.global_batch_size} rows is not a multiple of {self.micro_batch_size} rows on "
                f"each of {data_ranks} data-parallel ranks: choose batch sizes that fit"
            )
        described = LoaderSettings(
            batch_size=self.micro_batch_size, samples_per_step=self.global_batch_size // data_ranks, by_trainer=True
        )
        transform = ShiftedTokens(length=self.seq_length) if sampler.transform is None else None
        sampler.bind(described, **ranks, transform=transform)

    def reconfigure_limit_batches(self) -> None:
        """Converts the trainer's limits from steps to micro-batches, the unit of Lightning."""
        for name in ("limit_train_batches", "limit_val_batches"):
            limit = getattr(self.trainer, name)
            if isinstance(limit, int):
                setattr(self.trainer, name, limit * get_num_microbatches())
        self.trainer.num_sanity_val_steps *= get_num_microbatches()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes after the consumed samples of the checkpoint. Numbers of ranks and workers may differ from then.

        Raises:
            StateError: The state cannot be read, or belongs to other shards or another seed.
        """
        try:
            consumed, sampler = int(state_dict["consumed_samples"]), json.loads(state_dict["sampler"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise StateError(f"the checkpoint's state of AgentWeightedDataModule cannot be read: {error!r}") from error
        self.sampler.load_state_dict(sampler)
        self.data_sampler.init_consumed_samples = self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)
        self._begun, self._restored = False, True
        logger.info(
            "the data resume at sample %d; ignore Lightning's warning that the loader is not resumable", consumed
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this data-parallel rank, from the first sample that was not trained on."""
        step = self.trainer.global_step
        if step and not (self._restored or self._begun):
            logger.warning(
                "the checkpoint at step %d was made without AgentWeightedDataModule: the plan begins at its first "
                "sample",
                step,
            )
        self.data_sampler.init_consumed_samples = self.consumed
        self.data_sampler.init_global_step = step
        self._begun = True
        return _Loader(
            self.sampler,
            self.micro_batch_size,
            samples_per_step=self.global_batch_size // self.sampler.world_size,
            collate_fn=_Collate(self.seq_length, self.create_attention_mask),
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            by_trainer=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """State for NeMo's checkpoints, the same on every rank. The last one, without the optimizer, has it too."""
        consumed = self.consumed
        return {
            "consumed_samples": consumed,
            # As text, because distributed checkpoints look for tensors in every list and dictionary.
            "sampler": json.dumps(self.sampler.state_dict(consumed=consumed)),
        }

    def io_transform_args(self, init_fn: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Settings for the context of NeMo's checkpoints: all but the sampler, which cannot be written there."""
        settings = super().io_transform_args(init_fn, *args, **kwargs)
        settings.pop("sampler", None)
        if not hasattr(kwargs.get("tokenizer"), "__io__"):
            settings.pop("tokenizer", None)  # with another kind of tokenizer, NeMo would fail to write the context
        return settings  # type: ignore[no-any-return]


class DataMixingCallback(pl.Callback, IOMixin):  # type: ignore[misc]
    """Evaluates the environment when a decision is due, and lets the sampler's policy choose the next mix.

    The base model is evaluated before the first step, by Megatron's own parallel forward, and the model again after
    every ``sampler.samples_per_reweight`` samples, between two optimizer steps. The data module's part of the
    checkpoint contains the sampler's state. The trainer's loggers get the metrics: see
    `dmagent_loader.integrations.mixing.Report`.

    Args:
        sampler: Sampler of the data module, to be checked against it. None: any sampler of the data module.
        environment: Question sets; None: no decisions, mixes change by `set_mix` only.
    """

    def __init__(self, sampler: AgentWeightedSampler | None = None, environment: Environment | None = None) -> None:
        super().__init__()
        self.sampler, self.environment = sampler, environment
        self._mixing: Mixing | None = None

    @property
    def consumed(self) -> int:
        """Samples that training has consumed over all ranks since the run began."""
        return 0 if self._mixing is None else self._mixing.consumed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the data module's sampler.

        Raises:
            ConfigurationError: The data module is of another type, or has another sampler.
        """
        data = trainer.datamodule
        if stage != "fit":
            return
        if not isinstance(data, AgentWeightedDataModule):
            raise ConfigurationError(
                f"the trainer's data module is a {type(data).__name__}, whose samples cannot be re-weighted: pass an "
                "AgentWeightedDataModule to trainer.fit() or llm.pretrain(data=...)"
            )
        if self.sampler is not None and self.sampler is not data.sampler:
            raise ConfigurationError(
                "AgentWeightedDataModule and DataMixingCallback have two different samplers, so decisions would not "
                "reach the data: pass the same sampler to both, or none to the callback"
            )
        self._mixing = Mixing(data.sampler, self.environment)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the base model, before the loader starts its workers. A checkpoint is restored only later."""
        if trainer.ckpt_path is None:
            self._begin(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins after a checkpoint was restored; the loader exists by now."""
        if trainer.ckpt_path is not None:
            self._begin(trainer)
        assert self._mixing is not None
        self._mixing.announce()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Decides, if a decision is due, after an optimizer step and before NeMo writes the checkpoint of the step."""
        self._maybe_reweight(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what is left of the data."""
        if self._mixing is not None:
            self._mixing.end()

    def state_dict(self) -> dict[str, Any]:
        """State for NeMo's checkpoints."""
        return {"environment": None if self.environment is None else self.environment.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns if feedback before and after the checkpoint cannot be compared."""
        if self._mixing is not None:
            self._mixing.compare_environment(state_dict["environment"])

    def io_transform_args(self, init_fn: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No settings for the context of NeMo's checkpoints: sampler and environment cannot be written there."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DataMixingCallback:
        """The callback itself: NeMo copies a trainer's arguments to describe them, but a run has only one sampler."""
        return self

    def _begin(self, trainer: pl.Trainer) -> None:
        assert self._mixing is not None
        data = trainer.datamodule
        self._mixing.begin(samples=trainer.max_steps * data.global_batch_size if trainer.max_steps > 0 else None)
        self._maybe_reweight(trainer)

    def _maybe_reweight(self, trainer: pl.Trainer) -> None:
        assert self._mixing is not None
        data = trainer.datamodule
        self._mixing.consumed = data.consumed
        if self._mixing.finished() or not self._mixing.due():
            return
        report = self._mixing.reweight(lambda environment: _feedback(environment, trainer, data.seq_length))
        for trainer_logger in trainer.loggers:
            trainer_logger.log_metrics(dict(report.full), step=trainer.global_step)


class _ExternalDataSampler(MegatronDataSampler):  # type: ignore[misc]
    """NeMo's bookkeeping of consumed samples and micro-batches, for a loader that is already split.

    Args:
        data: Data module that it belongs to.
    """

    def __init__(self, data: AgentWeightedDataModule, **settings: Any) -> None:
        super().__init__(dataloader_type="single", **settings)
        self._data = data

    def transform_dataloader(self, dataloader: DataLoader[Any], consumed_samples: int = 0) -> DataLoader[Any]:
        """The loader of the sampler unchanged; other loaders, for validation, with NeMo's sampler."""
        if isinstance(dataloader, _Loader):
            return dataloader
        return super().transform_dataloader(dataloader, consumed_samples)  # type: ignore[no-any-return]

    def on_megatron_step_end(self, step: Any) -> None:
        """Reports consumed samples to the sampler, and stops training if no whole global batch is left."""
        super().on_megatron_step_end(step)
        if not step.trainer.training:
            return
        consumed = self._data.consumed_after(step.trainer.global_step + 1)
        self._data.sampler.reweight_due(consumed)
        if self._data.sampler.finished(consumed):
            step.trainer.should_stop = True


class _Loader(MixingDataLoader):
    """A loader without a length.

    The length of the sampler follows from the mixes so far. Lightning would end or restart an epoch at the length that
    it saw first.
    """

    def __len__(self) -> int:
        raise TypeError("the number of micro-batches is unknown, because it depends on future mixes")


class _Collate:
    """Collates samples to a micro-batch; picklable for data workers.

    Args:
        length: T, tokens of a row.
        attention_mask: Whether to add a causal mask.
    """

    def __init__(self, length: int, attention_mask: bool) -> None:
        self._length, self._attention_mask = length, attention_mask

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        missing = [name for name in _NEEDED if name not in samples[0]]
        if missing:
            raise ConfigurationError(
                f"the sampler's transform returns {sorted(samples[0])}, but NeMo's GPT step needs {missing} too: leave "
                "transform out for packed shards, or end yours with dmagent_loader.transforms.ShiftedTokens"
            )
        batch: dict[str, Any] = default_collate(list(samples))
        if self._attention_mask and "attention_mask" not in batch:
            visible = torch.ones(self._length, self._length, dtype=torch.bool).tril()
            batch["attention_mask"] = ~visible.expand(len(samples), 1, -1, -1)
        return batch


def _feedback(environment: Evaluation, trainer: pl.Trainer, max_length: int) -> dict[str, float]:
    """The feedback of the trainer's model, by Megatron's parallel forward; all ranks call it together."""
    parallel = trainer.strategy.megatron_parallel
    if getattr(parallel.ddp_config, "overlap_param_gather", False):
        parallel.force_param_sync()  # the updated weights may not have arrived yet
    return evaluate(environment, [chunk.module for chunk in parallel], max_length=max_length)

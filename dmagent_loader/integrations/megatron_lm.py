"""Megatron-LM's ``pretrain()``: hooks that make it train on the sampler and evaluate the model.

    hooks = PretrainHooks(build, base_feedback="runs/first/base.json", validation=batches)
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        hooks.datasets_provider,
        ...,
        non_loss_data_func=hooks.non_loss_data_func,
    )

Up to Megatron-LM 0.17, ``pretrain()`` takes no configuration, and parses the arguments itself:

    pretrain(
        hooks.datasets_provider, ..., extra_args_provider=add_arguments, non_loss_data_func=hooks.non_loss_data_func
    )

Run it with ``--dataloader-type external --dataloader-save FOLDER --eval-interval N --eval-iters 1``. N is the number of
steps between two decisions, because ``pretrain()`` gives access to its model in evaluations only.

The first evaluation comes after N steps. To measure the base model before them, run the same command once with
``--skip-train``. This writes the file `base_feedback`, and the run then begins with it. The file has no losses by
domain: policies that need those of the base model (`DynamicBatchLoading`, `Velocitune`) take those after the first N
steps in their place, with a warning.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmagent_loader import _distributed as distributed
from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ConfigurationError, StateError, require_extra
from dmagent_loader.integrations.megatron import MegatronMixing, evaluate

__all__ = ["PretrainHooks", "SavableIterator", "add_arguments"]

logger = logging.getLogger(__name__)


class SavableIterator(Iterator[dict[str, Any]]):
    """The external data iterator, with the methods by which Megatron-LM and Megatron-Bridge save and restore it.

    Megatron-LM calls `save_state`; `PretrainHooks` restores. Megatron-Bridge, since 0.6, calls both for the training
    set of ``dataloader_type="external"``; without `restore_state` it would silently restart the data.

    Args:
        mixing: Mixing of this process.
    """

    def __init__(self, mixing: MegatronMixing) -> None:
        self._mixing = mixing

    def __next__(self) -> dict[str, Any]:
        return next(self._mixing.data_iterator)

    def save_state(self) -> dict[str, str]:
        """State that the trainer writes to ``train_dataloader_dprank*.pt``, one file for each data-parallel rank."""
        iterator = self._mixing.data_iterator
        return self._mixing.state_dict(consumed=iterator.begin + iterator.given)

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from a saved state, before the first micro-batch. All ranks call it together.

        Args:
            state: Return value of `save_state`, of any rank.

        Raises:
            StateError: The state cannot be read, belongs to other shards or another seed, or is loaded too late.
        """
        self._mixing.load_state_dict(state)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The ``extra_args_provider``: Megatron-LM reads ``--dataloader-save``, but leaves its definition to users."""
    group = parser.add_argument_group("data mixing")
    group.add_argument("--dataloader-save", help="folder for the state of the data; preferably that of --save")
    return parser


class PretrainHooks:
    """Two of the functions that ``pretrain()`` takes.

    Args:
        build: Function that makes the sampler and the environment; called on every process after Megatron-LM has built
            the model and loaded its checkpoint.
        base_feedback: File with the feedback of the base model; written by a run with ``--skip-train``.
        validation: Endless micro-batches for the validation loss that Megatron-LM computes before each evaluation.

    Attributes:
        mixing: Return value of `build`; None before it was called.
    """

    def __init__(
        self, build: Callable[[], MegatronMixing], *, base_feedback: str | Path, validation: Iterator[dict[str, Any]]
    ) -> None:
        self.mixing: MegatronMixing | None = None
        self._build, self._base, self._validation = build, Path(base_feedback), validation
        self.datasets_provider = self._provider()

    def non_loss_data_func(self, model: Sequence[nn.Module]) -> None:
        """Called by Megatron-LM in each evaluation, on every process: evaluates, decides, and bounds the run.

        Raises:
            ConfigurationError: The run has no environment to evaluate.
        """
        args, mixing = _args(), self.mixing
        if mixing is None or mixing.environment is None:
            raise ConfigurationError(
                "there is nothing to evaluate: pass hooks.datasets_provider to pretrain(), and environment= to "
                "MegatronMixing"
            )
        if args.skip_train:
            self._write_base(evaluate(mixing.environment, model, max_length=mixing.max_length))
            return
        from megatron.training.global_vars import get_tensorboard_writer

        consumed = int(args.consumed_train_samples)
        mixing.writer = get_tensorboard_writer()
        mixing.step_end(model, iteration=consumed // mixing.global_batch_size, consumed=consumed)
        self._bound(args, mixing)

    def _provider(self) -> Callable[[Any], tuple[Any, Any, Any]]:
        def datasets_provider(num_samples: Any) -> tuple[Any, Any, Any]:
            """Training and validation iterators; arguments for the built-in data sets have no effect."""
            args = _args()
            if args.dataloader_type != "external":
                raise ConfigurationError(
                    f"--dataloader-type is {args.dataloader_type}: the sampler needs --dataloader-type external"
                )
            # The checkpoint is loaded by now: its random states must not advance with the weights of an agent.
            with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
                self.mixing = mixing = self._build()
            mixing.train_iters = args.train_iters
            _check_arguments(args, mixing)
            if args.eval_interval:
                mixing.sampler.bind(decision_step=args.eval_interval * args.global_batch_size)
            iterator = SavableIterator(mixing)
            if args.iteration > 0:
                iterator.restore_state(_saved(args))
            if not args.skip_train:
                mixing.begin(None, base_feedback=self._read_base() if mixing.consumed == 0 else None)
                self._bound(args, mixing)
            return iterator, self._validation, None

        datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron-LM then calls it on every rank
        return datasets_provider

    def _bound(self, args: Any, mixing: MegatronMixing) -> None:
        """Makes Megatron-LM stop after the last whole global batch, if the data end before the next decision."""
        if mixing.sampler.end is None:
            return
        last = mixing.sampler.end // mixing.global_batch_size
        done = mixing.consumed // mixing.global_batch_size
        if last < args.train_iters and last <= done + (args.eval_interval or args.train_iters):
            logger.warning(
                "the data end after %d of %d iterations: train_iters is now %d", last, args.train_iters, last
            )
            args.train_iters = last

    def _write_base(self, feedback: dict[str, float]) -> None:
        assert self.mixing is not None
        assert self.mixing.environment is not None
        if distributed.get_rank() == 0:
            text = json.dumps({"feedback": feedback, "environment": self.mixing.environment.fingerprint})
            self._base.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._base, f"{text}\n".encode())
            logger.info("the base model's feedback is in %s", self._base)
        distributed.barrier("writing the base model's feedback")

    def _read_base(self) -> dict[str, float] | None:
        assert self.mixing is not None
        if self.mixing.environment is None:
            return None
        if not self._base.exists():
            logger.warning(
                "there is no %s: the first decision is made at the first evaluation, and takes its model for the base "
                "model; to measure the base model, run the same command once with --skip-train",
                self._base,
            )
            return None
        try:
            saved = json.loads(self._base.read_text(encoding="utf-8"))
            feedback = {str(field): float(value) for field, value in saved["feedback"].items()}
            questions = saved["environment"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{self._base} cannot be read: {error!r}; measure again with --skip-train") from error
        if questions != self.mixing.environment.fingerprint:
            raise StateError(
                f"{self._base} was measured on other questions or settings: measure again with --skip-train"
            )
        return feedback


def _check_arguments(args: Any, mixing: MegatronMixing) -> None:
    """Checks that Megatron-LM evaluates when a decision is due, and takes the batches that `mixing` counts.

    Raises:
        ConfigurationError: The arguments of Megatron-LM do not fit the sampler's settings.
    """
    for option, ours, theirs in (
        ("micro_batch_size", mixing.micro_batch_size, args.micro_batch_size),
        ("global_batch_size", mixing.global_batch_size, args.global_batch_size),
    ):
        if ours != theirs:
            raise ConfigurationError(
                f"MegatronMixing has {option}={ours}, but --{option.replace('_', '-')} is {theirs}: samples would be "
                "counted wrongly; pass the same number to both"
            )
    for option in ("rampup_batch_size", "step_batch_size_schedule"):
        if getattr(args, option, None):
            raise ConfigurationError(
                f"--{option.replace('_', '-')} changes the global batch size during the run, which the sampler does "
                "not support: leave it out"
            )
    if mixing.environment is None or mixing.sampler.policy is None:
        return
    if not args.eval_interval or not (args.eval_iters or getattr(args, "full_validation", False)):
        raise ConfigurationError(
            f"--eval-interval is {args.eval_interval} and --eval-iters is {args.eval_iters}, so pretrain() evaluates "
            "nothing and no decision would be made: pass the steps between two decisions as --eval-interval, and "
            "--eval-iters 1"
        )
    asked, interval = mixing.sampler.samples_per_reweight, args.eval_interval * args.global_batch_size
    if asked is not None and asked % interval:
        steps, rest = divmod(asked, args.global_batch_size)
        fitting = f"samples_per_reweight={interval}" + ("" if rest else f", or --eval-interval {steps}")
        raise ConfigurationError(
            f"samples_per_reweight is {asked}, but --eval-interval {args.eval_interval} evaluates every {interval} "
            f"samples ({args.global_batch_size} a step), and decisions are made in evaluations only: pass {fitting}"
        )


def _saved(args: Any) -> dict[str, Any]:
    """State of `SavableIterator.save_state` at the iteration of the loaded checkpoint, from the file of any rank.

    Raises:
        StateError: There is no such state, or it cannot be read.
    """
    folder = Path(args.dataloader_save or ".") / f"iter_{args.iteration:07d}"
    files = sorted(folder.rglob("train_dataloader_dprank*.pt")) if args.dataloader_save else []
    if not files:
        raise StateError(
            f"the checkpoint of iteration {args.iteration} has no state of the data in {folder}: pass the "
            "--dataloader-save of the run that wrote it, or start a new run with --finetune"
        )
    try:
        saved = torch.load(files[0], weights_only=True)["dataloader_state_dict"]
    except Exception as error:
        raise StateError(f"{files[0]} cannot be read: {error!r}; load an older checkpoint") from error
    return dict(saved)


def _args() -> Any:
    """Megatron-LM's arguments.

    Raises:
        MissingExtraError: megatron-core is not installed.
        ConfigurationError: There is no ``megatron.training``.
    """
    require_extra("megatron.core", "megatron")
    try:
        from megatron.training import get_args
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"megatron.training cannot be imported ({error}); the megatron-core package has it since 0.17: install "
            "'megatron-core[training]>=0.17' on Python 3.12, or put a checkout of Megatron-LM on PYTHONPATH"
        ) from error
    return get_args()

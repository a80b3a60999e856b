"""Settings of a Hugging Face Trainer that would not do what they say with a sampler, and those that we follow too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.sampler import AgentWeightedSampler

logger = logging.getLogger(__name__)

_PACKAGE = __name__.split(".")[0]


def follow_log_level(args: Any) -> None:
    """Sets this package's log level to the Trainer's, ``log_level`` or ``log_level_replica``, unless it is passive."""
    level = args.log_level if args.should_log else args.log_level_replica
    if level != "passive":
        logging.getLogger(_PACKAGE).setLevel(args.get_process_log_level())


def warn_about_order(args: Any) -> None:
    """Warns of a setting for the order of samples, which the Trainer ignores: the plan of the sampler fixes it."""
    name = "train_sampling_strategy"
    strategy = getattr(args, name, "random")
    if strategy == "random":
        return
    logger.warning(
        "%s=%r has no effect, because the sampler's plan fixes the order of samples: leave it out; rows that `dmagent "
        "shard --tokenizer` packed all have the same length",
        name,
        strategy,
    )


def refuse_order_of_workers(args: Any) -> None:
    """Refuses batches in the order in which data workers finish them.

    Raises:
        ConfigurationError: The Trainer asks for them.
    """
    if not getattr(args, "dataloader_in_order", True):
        raise ConfigurationError(
            "dataloader_in_order=False delivers batches in the order in which data workers finish them, and the number "
            "of consumed samples no longer identifies the samples: leave it at True"
        )


def refuse_second(name: str, callbacks: Sequence[Any]) -> None:
    """Refuses a second callback of this package, or the same one twice: each step would be counted twice.

    Args:
        name: Name of the class.
        callbacks: Its objects among the callbacks of the Trainer.

    Raises:
        ConfigurationError: There are several.
    """
    if len(callbacks) > 1:
        raise ConfigurationError(
            f"the Trainer has {len(callbacks)} callbacks of {name}, so each step would be counted more than once: pass "
            f"one to Trainer(callbacks=[...]) or to add_callback(), once; trainer.remove_callback({name}) removes one"
        )


def refuse_as_evaluation_data(data: Any) -> None:
    """Refuses a sampler as evaluation data: the same sampler as in training, or another.

    Args:
        data: A dataset, datasets by name, or None.

    Raises:
        ConfigurationError: A sampler is among them.
    """
    for dataset in data.values() if isinstance(data, Mapping) else [data]:
        # The Trainer of several processes may have wrapped it.
        if any(isinstance(entry, AgentWeightedSampler) for entry in (dataset, getattr(dataset, "dataset", None))):
            raise ConfigurationError(
                "eval_dataset is an AgentWeightedSampler, which delivers each sample once: the first evaluation would "
                "take the samples of the run, or never end, and the next would find none. Evaluate on a fixed list: "
                "eval_dataset=[dict(row) for row in itertools.islice(held_out, 200)], with held_out a sampler over "
                "shards that are not trained on"
            )


def refuse_rows_without_columns(sampler: AgentWeightedSampler, collate: Any) -> None:
    """Refuses rows of which the Trainer would remove all columns: its own error would be obscure.

    Args:
        sampler: Sampler of the run.
        collate: Collate function of the Trainer's loader; one that removes columns knows those that the model takes.

    Raises:
        ConfigurationError: The model takes none of the columns.
    """
    taken = getattr(collate, "signature_columns", None)
    if taken is None:
        return
    try:
        row = sampler.peek()
    except Exception:
        if sampler.transform is None:
            raise
        return  # it may be meant for data workers; if it fails there, too, its own error says more
    columns = sorted(name for name in row if not name.startswith("__"))
    if not set(columns).isdisjoint(taken):
        return
    remedy = (
        "pass transform= to the sampler (transforms.packed_tokens for packed rows, transforms.TokenizeText for text), "
        "or set remove_unused_columns=False and a data_collator of your own"
        if sampler.transform is None
        else "let its forward() name them; compile a model by TrainingArguments(torch_compile=True), not before; or "
        "set remove_unused_columns=False and a data_collator that returns the columns that the model takes"
    )
    raise ConfigurationError(
        f"the rows have {columns}, but the model takes none of these, and the Trainer would remove them all: {remedy}"
    )

"""Settings of a Hugging Face Trainer that would not do what they say with a sampler, and those that we follow too."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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

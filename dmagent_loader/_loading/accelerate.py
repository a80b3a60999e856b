"""accelerate splits an iterable dataset among its processes; a sampler, which each process reads its share of, must not
be split again."""

from __future__ import annotations

import logging
import sys

from dmagent_loader._loading.feed import Feed
from dmagent_loader.errors import ConfigurationError

logger = logging.getLogger(__name__)


def refuse_splitting(feed: Feed) -> None:
    """Called when a loader announces a pass by ``set_epoch``, which only accelerate's loaders do.

    Raises:
        ConfigurationError: accelerate is about to split the stream among several processes.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.is_initialized() or feed.loader.by_trainer:
        return
    if feed.world_size > 1:
        raise ConfigurationError(
            f"accelerate splits an iterable dataset among its {feed.world_size} processes by itself, so that this "
            "sampler must not: add DataMixingCallback(sampler) to the Trainer's callbacks, or give each process a "
            "MixingDataLoader that was not prepared by accelerate"
        )
    if feed.cursor.stream is not None:
        logger.warning(
            "accelerate fetches a batch more than it gives: a new pass leaves it out, unless sampler.seek(consumed) is "
            "called before"
        )

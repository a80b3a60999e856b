"""Protection against accelerate, which splits an iterable dataset among its processes.

Each process already reads only its share of a sampler, so a second split would lose samples.
"""

from __future__ import annotations

import logging
import sys

from dmagent_loader._loading.feed import Feed
from dmagent_loader.errors import ConfigurationError

logger = logging.getLogger(__name__)


def refuse_splitting(feed: Feed) -> None:
    """Refuses a pass of a loader that would split the sampler again.

    A loader announces a pass by calling ``set_epoch``, which only the loaders of accelerate do.

    Raises:
        ConfigurationError: accelerate is about to split the stream among several processes.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.is_initialized() or feed.loader.by_trainer:
        return
    if feed.world_size > 1:
        raise ConfigurationError(
            f"accelerate splits an iterable dataset among its {feed.world_size} processes, and this sampler is already "
            "split, so samples would be lost: add DataMixingCallback(sampler) to the Trainer's callbacks, or use "
            "in each process a MixingDataLoader that was not prepared by accelerate"
        )
    if feed.cursor.stream is not None:
        logger.warning(
            "accelerate fetches one batch more than it delivers, and a new pass skips that batch: call "
            "sampler.seek(consumed) before each new pass"
        )

"""The one place that looks at stack frames: a stock Trainer gives a callback no way to its reporters.

`Trainer.log` is out of a callback's reach, and a callback added by a user is called after the reporters. So metrics of
a decision could not reach TensorBoard, W&B and the rest through the Trainer's own writers. `DataMixingTrainerMixin`
hands its callback handler over and needs no frames.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def reporters_of_caller(own: Any) -> list[Any]:
    """The callbacks beside `own` in the Trainer's callback handler that is calling it.

    Args:
        own: The callback that is being called.

    Returns:
        Empty, with a warning, where no handler is found.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        callbacks = getattr(handler, "callbacks", None)
        if isinstance(callbacks, list) and any(callback is own for callback in callbacks):
            return [callback for callback in callbacks if callback is not own]
        frame = frame.f_back  # type: ignore[assignment]
    logger.warning(
        "the Trainer's reporters were not found, so metrics of the mix are only in its log_history: use "
        "DataMixingTrainerMixin, which hands them over"
    )
    return []

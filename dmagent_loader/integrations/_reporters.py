"""The reporters of a stock Trainer, found by inspecting stack frames: the only place that does so.

A callback cannot call `Trainer.log`, and a callback added by a user is called after the reporters. Without this module,
metrics of a decision could not reach TensorBoard, W&B and other writers of the Trainer. `DataMixingTrainerMixin` passes
its callback handler on and needs no frames.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def reporters_of_caller(called: Any) -> list[Any]:
    """The other callbacks in the callback handler that is calling one.

    Args:
        called: The callback that is being called.

    Returns:
        The other callbacks; empty, with a warning, if no handler is found.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        callbacks = getattr(handler, "callbacks", None)
        if isinstance(callbacks, list) and any(callback is called for callback in callbacks):
            return [callback for callback in callbacks if callback is not called]
        frame = frame.f_back  # type: ignore[assignment]
    logger.warning(
        "the Trainer's reporters were not found, so metrics of the mix are only in its log_history: use "
        "DataMixingTrainerMixin, which passes them on"
    )
    return []

"""The stock Trainer that calls a callback, found by inspecting stack frames: the only place that does so.

A callback is given neither the Trainer nor its callback handler. But it cannot call `Trainer.log`, and a callback added
by a user is called after the reporters, so metrics of a decision could not reach TensorBoard, W&B and other writers.
`DataMixingTrainerMixin` passes its callback handler on and needs no frames.
"""

from __future__ import annotations

import sys
from typing import Any


def trainer_calling(callback: Any) -> Any | None:
    """The Trainer whose callback handler calls a callback; None: there is none among the callers.

    Args:
        callback: The callback that is being called.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        callbacks = getattr(getattr(caller, "callback_handler", None), "callbacks", None)
        if isinstance(callbacks, list) and any(entry is callback for entry in callbacks):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None

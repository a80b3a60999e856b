"""Calls with a time limit, in a thread that is abandoned if the limit is exceeded."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

from dmagent_loader.errors import PolicyError


class LimitedCaller:
    """Calls functions one after another in one thread, with a time limit for each.

    A thread cannot be stopped. A late call continues in the background and its result is dropped. No other call is made
    until it ends, because two calls at once could corrupt the policy's state. The thread is reused, because torch would
    start its own threads again for each new one, and ends with this object.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._late: _Call | None = None

    def call(self, function: Callable[[], object], seconds: float) -> object:
        """Returns the result of a function.

        Args:
            function: Called in the thread.
            seconds: Time limit.

        Raises:
            PolicyError: The function exceeds the limit, or an earlier one still runs.
            BaseException: Any error of the function.
        """
        if self._thread is None or not self._thread.is_alive():
            self._start()  # the first call, or the first call after a fork
        if self._late is not None and not self._late.done.is_set():
            raise PolicyError("it is still busy with an earlier step, whose answer came too late")
        self._late = None
        call = _Call(function)
        self._calls.put(call)
        try:
            in_time = call.done.wait(seconds)
        except BaseException:
            self._late = call
            raise
        if not in_time:
            self._late = call
            raise PolicyError(f"it gave no answer within {seconds:g} s")
        value, error = call.value, call.error
        del call
        if error is None:
            return value
        try:
            raise error
        finally:
            del error  # its traceback would keep it alive, and with it everything that the function has allocated

    def _start(self) -> None:
        self._late = None
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name="dmagent-policy", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)


class _Call:
    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.value: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        try:
            call.value = call.function()
        except BaseException as error:  # raised again in the waiting caller
            call.error = error
        call.done.set()
        del call  # its result or error may be large

"""Asking a policy in a thread of its own, so that one that takes too long can be left behind."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

from dmagent_loader.errors import PolicyError


class LimitedCaller:
    """Calls functions one after the other in one thread, and waits for each only so long.

    A thread cannot be stopped. A late call goes on in the background, its answer is dropped, and until it ends no other
    call is made: two at once could spoil the policy's own state. The thread ends with the caller. It is kept between
    calls, because each new thread would make torch start its own threads again.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._late: _Call | None = None

    def call(self, function: Callable[[], object], seconds: float) -> object:
        """What a function returns.

        Raises:
            PolicyError: It is late, or an earlier one still runs.
            BaseException: Whatever the function raises.
        """
        if self._thread is None or not self._thread.is_alive():
            self._start()  # the first call, or the first one after a fork
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
            del error  # else it would be held by its own traceback, and with it all that the function has allocated

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
        except BaseException as error:  # passed on to the waiting caller
            call.error = error
        call.done.set()
        del call  # an answer, or what an error holds on to, may be large

"""Progress of the demo's phases: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

_COLUMNS = 79
_PLAIN_SECONDS = 15.0
"""Smallest interval between two lines away from a terminal."""


class Phase:
    """One phase of the demo; use it in a ``with`` statement.

    Args:
        name: Name of at most 24 characters, to leave room for bar and note.
        total: Number of units; None: unknown.
        stream: Stream to write to; None: standard output.

    Example:
        >>> with Phase("reading", total=2) as phase:
        ...     phase.update(2)
        ...     phase.note("2 files")
        reading                  ...
        reading                  2 files  (0 s)
    """

    def __init__(self, name: str, *, total: int | None = None, stream: TextIO | None = None) -> None:
        self._name, self._total = name, total
        self._stream = sys.stdout if stream is None else stream
        self._done, self._note = 0, ""
        self._bar: Any = None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Phase:
        self._started = self._last = time.monotonic()
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._total,
                file=self._stream,
                ncols=_COLUMNS,
                leave=False,
                bar_format=f"{self._name:<25}{{percentage:3.0f}}% |{{bar}}| {{elapsed}} {{postfix}}"
                if self._total
                else f"{self._name:<25}{{n_fmt}}  {{elapsed}} {{postfix}}",
            )
        else:
            self._write(f"{self._name:<25}...")
        return self

    def update(self, units: int = 1) -> None:
        """Counts finished units."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_SECONDS:
            self._last = now
            done = f"{100 * self._done // self._total:3d}%" if self._total else f"{self._done}"
            self._write(f"{self._name:<25}{done}  {self._note}")

    def note(self, text: str) -> None:
        """Shows a short text behind the bar; the last text stays on the line of the phase."""
        self._note = text
        if self._bar is not None:
            # `postfix_str` bypasses the ", " that tqdm puts before other postfixes; the format above has a blank.
            self._bar.set_postfix_str(text, refresh=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            self._write(f"{self._name:<25}{self._note}  ({time.monotonic() - self._started:.0f} s)")

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

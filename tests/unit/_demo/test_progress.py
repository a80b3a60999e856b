"""Progress on a terminal and away from one."""

from __future__ import annotations

import io

import pytest

from dmagent_loader._demo import progress
from dmagent_loader._demo.progress import Phase


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_away_from_a_terminal_a_phase_has_a_plain_line_at_its_beginning_and_its_end() -> None:
    """A file with nothing in it for half a minute looks like a demo that hangs."""
    stream = io.StringIO()
    with Phase("reading", total=3, stream=stream) as phase:
        assert stream.getvalue() == "reading                  ...\n"
        for i in range(3):
            phase.update()
            phase.note(f"file {i}")
    assert stream.getvalue() == "reading                  ...\nreading                  file 2  (0 s)\n"


@pytest.mark.parametrize(("total", "shown"), [(4, "50%"), (None, "2")])
def test_a_long_phase_has_a_line_now_and_then(total: int | None, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    with Phase("reading", total=total, stream=stream) as phase:
        phase.note("shard 7")
        phase.update(2)
    assert [line.split() for line in stream.getvalue().splitlines()[1:-1]] == [["reading", shown, "shard", "7"]]


def test_on_a_terminal_no_line_is_wider_than_80_columns() -> None:
    stream = _Terminal()
    with Phase("base model, source only", total=400, stream=stream) as phase:
        for _ in range(400):
            phase.update()
            phase.note("general -5.03 code -5.29, target 100%")
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert any("|" in line for line in lines), "a bar was shown"
    assert max(map(len, lines)) < 80
    assert stream.getvalue().endswith("base model, source only  general -5.03 code -5.29, target 100%  (0 s)\n")


def test_a_phase_that_fails_does_not_look_finished() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Phase("dividing", stream=stream):
        raise ZeroDivisionError
    assert stream.getvalue() == "dividing                 ...\n"

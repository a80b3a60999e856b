"""How `make test` deals tests to processes (tests/conftest.py)."""

from __future__ import annotations

import pytest


def test_a_file_is_tested_by_one_process(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 with pytest-xdist 3.8 forgets groups without a word: each process makes the fixtures of each file."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("pytest runs without --dist loadgroup")
    assert request.node.nodeid.endswith("@tests/unit/test_dealing.py")

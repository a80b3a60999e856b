"""How tests are dealt to processes, and their temporary folder.

`--conformance-table FILE`: which integration passed what, as Markdown.
"""

from __future__ import annotations

import gc
import re
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TEST = re.compile(
    r"tests/trainers/conformance/.*::test_(?P<promise>\w+)\[(?P<integration>.*?)(?:-\d processes.*)?\](@.*)?$"
)
MEGATRON = re.compile(r"/trainers/(.*/)?test_megatron\w*\.py$|/trainers/megatron_lm/")
"""Tests that `make test-megatron` runs, with a newer version; of the others, `make test` has one run of the conformance
suite."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", type=Path, help="file for the table of integrations and promises")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one process tests with ``pytest -n``: a file, for its fixtures; an integration of the conformance suite."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        integration = parameters.get("integration")
        group = f"{item.path.relative_to(item.config.rootpath)}{getattr(integration, 'name', '')}"
        item.add_marker(pytest.mark.xdist_group(group))
        is_variant = getattr(integration, "variant", False)
        is_first_setting = getattr(parameters.get("setting"), "for_variants", False)
        if is_variant and not is_first_setting:
            item.add_marker(pytest.mark.slow)
        is_megatron = MEGATRON.search(item.path.as_posix()) or getattr(integration, "name", "").startswith("Megatron")
        if is_megatron and (is_variant or not is_first_setting):
            item.add_marker(pytest.mark.megatron)


def pytest_configure() -> None:
    """Ctrl-C is tested, and shells start background jobs with its signal ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Blocks of remote shards neither come from the machine's default folder nor stay there; also in subprocesses.

    The path is short, because sockets of subprocesses lie there, too.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folder stays where it is
    folder = tempfile.mkdtemp(prefix="dmagent-")
    Path(folder).chmod(0o1777)  # some tests act as another user
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _search_for_garbage_of_this_file_alone() -> None:
    """A search of all that the test files have imported takes a second, and the Trainer makes one for each attempt."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = config.getoption("--conformance-table")
    if path is None:
        return
    outcomes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            found = TEST.search(report.nodeid)
            if found is None:
                continue
            reason = report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else outcome
            outcomes[found["promise"].replace("_", " ")][found["integration"]].append(reason)
    names = list(dict.fromkeys(name for row in outcomes.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for promise, row in outcomes.items():
        cells = []
        for name in names:
            results = row.get(name, [])
            failed = sum(result in ("failed", "error") for result in results)
            passed = results.count("passed")
            reasons = sorted(set(results) - {"passed", "failed", "error"})
            if failed:
                cells.append(f"{failed} of {len(results)} fail")
            else:
                cells.append(f"{passed} pass" if passed else "; ".join(reasons))
        lines.append(f"| {promise} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

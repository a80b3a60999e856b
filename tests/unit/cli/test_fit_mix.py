"""``dmagent fit-mix``: from a table of proxy runs to a file with a mix that a run takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.cli import main
from dmagent_loader.mixture.simplex import validate_mix

DOMAINS = ["source/web", "target/math"]


def rows(runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs whose first loss falls with the share of math, and whose second rises."""
    mixes = np.random.default_rng(seed).dirichlet([1.0, 1.0], runs)
    return mixes, np.stack([2 + np.exp(-mixes[:, 1]), 1 + np.exp(mixes[:, 1] - 1)], axis=1)


def write(path: Path, header: list[str], values: np.ndarray) -> str:
    lines = [",".join(header), *(",".join(f"{value:.9f}" for value in row) for row in values)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> str:
    header = [*(f"mix/{name}" for name in DOMAINS), "loss/math", "loss/general"]
    return write(tmp_path / "proxies.csv", header, np.hstack(rows(60, 0)))


def found(printed: str, name: str) -> float:
    match = re.search(rf"^  {name} +(-?[\d.]+)$", printed, re.MULTILINE)
    assert match is not None, printed
    return float(match[1])


@pytest.mark.parametrize(
    ("method", "least"),
    [
        (["--regressor", "linear"], 0.95),
        (["--regressor", "log-linear"], 0.95),
        ([], 0.75),
        (["--method", "olmix"], 0.95),
    ],
)  # trees have at least 20 runs in a leaf, and 48 to learn from
def test_ranking_cost_and_mix(
    method: list[str], least: float, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mix.json"
    arguments = [table, *method, "--metric", "math", "--run-tokens", "1000", "--parameters", "10"]
    assert main(["fit-mix", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "60 proxy runs, 2 domains, 2 metrics" in printed
    assert "5-fold cross-validation" in printed
    for name in ("math", "general", "objective"):
        assert found(printed, name) > least
    assert "cost of the proxies: 6e+04 tokens, 3.6e+06 FLOPs" in printed
    mix = validate_mix(json.loads(output.read_text()), DOMAINS)
    assert mix[1] > 0.8


def test_two_files_a_test_set_and_a_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prior forbids what has no rows, although the proxies had it."""
    paths = []
    for name, (mixes, losses) in {"a": rows(30, 0), "b": rows(25, 1)}.items():
        paths.append(write(tmp_path / f"{name}m.csv", DOMAINS, mixes))
        paths.append(write(tmp_path / f"{name}l.csv", ["math", "general"], losses))
    (tmp_path / "prior.json").write_text(json.dumps({"source/web": 300}))
    output = tmp_path / "mix.json"
    options = ["--regressor", "linear", "--prior", str(tmp_path / "prior.json"), "--output", str(output)]
    assert main(["fit-mix", *paths[:2], "--test", *paths[2:], *options]) == 0
    assert "on 25 runs, test runs:" in capsys.readouterr().out
    assert json.loads(output.read_text()) == {"source/web": 1.0, "target/math": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--metric", "maths"], "metrics is {'maths': 1.0}"),
        (["--prior", "nowhere.json"], "the prior 'nowhere.json' cannot be read"),
        (["--method", "olmix", "--kl", "0"], "kl is 0.0"),
        (["--test", "a", "b", "c"], "one file or two"),
        (["--output", "no/such/folder/mix.json"], "cannot be written"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    changes: list[str], message: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mix.json"
    assert main(["fit-mix", table, "--regressor", "linear", "--output", str(output), *changes]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_too_few_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = [*(f"mix/{name}" for name in DOMAINS), "loss/math", "loss/general"]
    path = write(tmp_path / "few.csv", header, np.hstack(rows(6, 0)))
    assert main(["fit-mix", path, "--output", str(tmp_path / "mix.json")]) == 2
    assert "6 proxy runs are too few" in capsys.readouterr().err

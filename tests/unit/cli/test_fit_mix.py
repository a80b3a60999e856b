"""``dmagent fit-mix``: from a table of proxy runs to a file with a mix that a run takes."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dmagent_loader.cli import main
from dmagent_loader.cli.fit_mix import DEFAULT_KL, REGRESSORS
from dmagent_loader.mixture.simplex import validate_mix
from dmagent_loader.policies import Olmix
from dmagent_loader.policies.baselines.regmix import Regressor

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
    assert "60 proxy runs, 2 domains, 2 metrics\n" in printed
    assert "5-fold cross-validation" in printed
    for name in ("math", "general", "objective"):
        assert found(printed, name) > least
    assert len({len(line) for line in re.findall(r"^  .*  [01]\.\d{3}$", printed, re.MULTILINE)}) == 1, "aligned"
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
        (["--metric", "maths"], "--metric maths is not in the table: choose from math, general"),
        (["--prior", "nowhere.json"], "the prior 'nowhere.json' cannot be read"),
        (["--kl", "0"], "--kl is 0"),
        (["--test", "a", "b", "c"], "--test is one file or two, but there are 3: a, b, c"),
        (["--seed", "-1"], "--seed is -1"),
        (["--run-tokens", "-5"], "--run-tokens is -5"),
        (["--parameters", "-2"], "--parameters is -2"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    changes: list[str], message: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mix.json"
    arguments = ["fit-mix", table, "--method", "olmix", "--output", str(output), *changes]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out, "faults of the options are found before the fit"
    assert not output.exists()


@pytest.mark.parametrize(
    ("prior", "message"),
    [("[1]", "is a JSON list"), ('{"source/wev": 1}', "source/wev"), ('{"source/web": -1}', "does not fit the table")],
)
def test_a_wrong_prior_is_named_by_its_file(
    prior: str, message: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prior.json"
    file.write_text(prior)
    assert main(["fit-mix", table, "--prior", str(file), "--output", str(tmp_path / "mix.json")]) == 2
    shown = capsys.readouterr()
    assert str(file) in shown.err
    assert message in shown.err
    assert not shown.out


@pytest.mark.parametrize(("name", "fault"), [("no/such/mix.json", "there is no folder"), (".", "it is a folder")])
def test_an_output_that_cannot_be_written_is_refused_before_the_fit(
    name: str, fault: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit-mix", table, "--regressor", "linear", "--output", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert fault in shown.err
    assert not shown.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "runs", "least"),
    [([], 49, 50), ([], 6, 50), (["--regressor", "linear"], 9, 10), (["--method", "olmix"], 9, 10)],
)
@pytest.mark.parametrize("has_test", [False, True])
def test_too_few_runs_are_refused(
    method: list[str], runs: int, least: int, has_test: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a test table, all runs are fitted to, so trees need no more than 40."""
    if has_test and not method:
        runs, least = min(runs, 39), 40
    header = [*(f"mix/{name}" for name in DOMAINS), "loss/math", "loss/general"]
    path = write(tmp_path / "few.csv", header, np.hstack(rows(runs, 0)))
    test = ["--test", path] if has_test else []
    assert main(["fit-mix", path, *method, *test, "--output", str(tmp_path / "mix.json")]) == 2
    assert f"{runs} proxy runs are too few for this fit: give at least {least}" in capsys.readouterr().err
    assert not (tmp_path / "mix.json").exists()


def test_runs_of_one_mix_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = [*(f"mix/{name}" for name in DOMAINS), "loss/math"]
    values = np.column_stack([np.full((60, 2), 0.5), np.linspace(1, 2, 60)])
    path = write(tmp_path / "same.csv", header, values)
    assert main(["fit-mix", path, "--regressor", "linear", "--output", str(tmp_path / "mix.json")]) == 2
    assert "all 60 proxy runs have the same mix" in capsys.readouterr().err


def test_a_fit_that_ranks_nothing_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test runs have the losses of the table with the opposite sign."""
    header = [*(f"mix/{name}" for name in DOMAINS), "loss/math", "loss/general"]
    mixes, losses = rows(30, 0)
    table = write(tmp_path / "train.csv", header, np.hstack([mixes, losses]))
    options = ["--regressor", "linear", "--metric", "math", "--output", str(tmp_path / "mix.json")]
    assert main(["fit-mix", table, "--test", table, *options]) == 0
    assert not capsys.readouterr().err
    contrary = write(tmp_path / "test.csv", header, np.hstack([mixes, 5 - losses]))
    assert main(["fit-mix", table, "--test", contrary, *options]) == 0
    assert "no better than the prior as far as they show" in capsys.readouterr().err
    single = write(tmp_path / "one.csv", header, np.hstack([mixes, losses])[:1])
    assert main(["fit-mix", table, "--test", single, *options]) == 0
    shown = capsys.readouterr()
    assert "correlation nan of the objective" in shown.err
    assert "on 1 run, test runs" in shown.out


def test_a_test_table_may_have_its_columns_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixes, losses = rows(30, 0)
    header = [*(f"mix/{name}" for name in DOMAINS), "loss/math", "loss/general"]
    train = write(tmp_path / "train.csv", header, np.hstack([mixes, losses]))
    turned = write(tmp_path / "test.csv", [*reversed(header[2:]), *header[:2]], np.hstack([losses[:, ::-1], mixes]))
    options = ["--regressor", "log-linear", "--output", str(tmp_path / "mix.json")]
    assert main(["fit-mix", train, "--test", turned, *options]) == 0
    printed = capsys.readouterr().out
    assert found(printed, "math") > 0.95
    assert found(printed, "general") > 0.95


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (["--regressor", "linear", "--kl", "0.2"], "--kl has no effect without --method olmix"),
        (["--method", "olmix", "--regressor", "linear"], "--regressor has no effect without --method regmix"),
    ],
)
def test_an_option_of_the_other_method_is_warned_of(
    options: list[str], warning: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit-mix", table, "--test", table, *options, "--output", str(tmp_path / "mix.json")]) == 0
    assert warning in capsys.readouterr().err


def test_the_choices_and_the_default_are_those_of_the_classes() -> None:
    """The command repeats them, because importing the classes loads torch."""
    assert get_args(Regressor) == REGRESSORS
    assert inspect.signature(Olmix).parameters["kl"].default == DEFAULT_KL


def test_the_regressors_without_a_package_need_no_scipy(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("scipy", "lightgbm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    options = ["--regressor", "log-linear", "--output", str(tmp_path / "mix.json")]
    assert main(["fit-mix", table, *options]) == 0
    assert found(capsys.readouterr().out, "math") > 0.95
    assert main(["fit-mix", table, "--method", "olmix", "--output", str(tmp_path / "olmix.json")]) == 2
    assert "dmagent-loader[baselines]" in capsys.readouterr().err

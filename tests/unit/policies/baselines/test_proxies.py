"""Tables of proxy runs: read as they were written, and refused where they are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.policies import ProxyTable, rank_correlation

ONE = "step,mix/source/web,mix/target/math,loss/mmlu,loss/math\n9,0.75,0.25,3.0,2.5\n9,0.5,0.5,3.2,2.0\n"


def table(**changes: object) -> ProxyTable:
    values: dict[str, object] = {
        "domains": ("web", "math"),
        "metrics": ("mmlu", "math"),
        "mixes": np.array([[0.75, 0.25], [0.5, 0.5]]),
        "losses": np.array([[3.0, 2.5], [3.2, 2.0]]),
        **changes,
    }
    return ProxyTable(**values)  # type: ignore[arg-type]


def test_one_file_has_the_columns_of_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(ONE)
    read = ProxyTable.from_csv(tmp_path / "t.csv", run_tokens=1000, parameters=50)
    assert (read.domains, read.metrics) == (("source/web", "target/math"), ("mmlu", "math"))
    assert read.mixes.tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert read.losses.tolist() == [[3.0, 2.5], [3.2, 2.0]]
    assert (len(read), read.tokens, read.flops) == (2, 2000, 6.0 * 50 * 2000)


def test_two_files_are_matched_by_index_and_rounded_mixes_are_divided_by_their_sum(tmp_path: Path) -> None:
    """Catches rows matched by position: the second file is in another order."""
    (tmp_path / "m.csv").write_text("index,web,math\n7,0.333,0.666\n8,0.5,0.5\n")
    (tmp_path / "l.csv").write_text("index,loss\n8,2.0\n7,3.0\n")
    read = ProxyTable.from_csv(tmp_path / "m.csv", tmp_path / "l.csv")
    assert read.losses[:, 0].tolist() == [3.0, 2.0]
    assert read.mixes[0] == pytest.approx([1 / 3, 2 / 3])
    assert read.tokens is None
    assert read.flops is None


def test_prefixes_are_no_part_of_the_names_in_two_files_either(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("step,mix/web,mix/math\n9,0.25,0.75\n")
    (tmp_path / "l.csv").write_text("loss/mmlu\n2.0\n")
    read = ProxyTable.from_csv(tmp_path / "m.csv", tmp_path / "l.csv")
    assert (read.domains, read.metrics) == (("web", "math"), ("mmlu",))
    assert read.mixes.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize(
    ("mixes", "losses", "message"),
    [
        ("web,math\n1,0\n", None, "it needs mix/<domain>"),
        ("web,math\n1\n", "loss\n1\n", r"line 2 of '.*m\.csv' has 1 values, but the header has 2 columns"),
        ("web,math\n", "loss\n1\n", r"m\.csv' has no rows"),
        ("web,web\n1,0\n", "loss\n1\n", r"m\.csv' has the column 'web' twice"),
        ("web;math\n1;0\n", "loss\n1\n", r"m\.csv' is separated by semicolons: save it with commas"),
        (",math\n1,0\n", "loss\n1\n", "'' cannot name a domain"),
        ("web,math\n1,0\n\n1,x\n", "loss\n1\n2\n", r"column 'math' is 'x' in line 4 of '.*m\.csv'"),
        ("web,math\n1,0\n0.5,0.4\n", "loss\n1\n2\n", r"line 3 of '.*m\.csv' sum to 0\.9.*every domain"),
        ("web,math\n75,25\n", "loss\n1\n", r"line 2 of '.*m\.csv' sum to 100.*divide percentages by 100"),
        ("web,math\n1.5,-0.5\n", "loss\n1\n", "domain 'math' is -0.5 in line 2 of .*at least 0"),
        ("web,math\nnan,1\n", "loss\n1\n", "domain 'web' is nan in line 2"),
        ("web,math\n1,0\n1,0\n", "loss\n1\nnan\n", r"metric 'loss' is nan in line 3 of '.*l\.csv'"),
        ("index,web,math\n1,1,0\n", "loss\n1\n", r"m\.csv' has the column 'index', but .*l\.csv' has not"),
        ("web,math\n1,0\n", "index,loss\n1,1\n", r"l\.csv' has the column 'index', but .*m\.csv' has not"),
        ("web,math\n1,0\n", "loss\n1\n2\n", "a row of losses for each run"),
        ("index,web,math\n1,1,0\n", "index,loss\n2,1\n", "do not name the same runs"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, mixes: str, losses: str | None, message: str) -> None:
    (tmp_path / "m.csv").write_text(mixes)
    (tmp_path / "l.csv").write_text(losses or "")
    with pytest.raises(ConfigurationError, match=message):
        ProxyTable.from_csv(tmp_path / "m.csv", None if losses is None else tmp_path / "l.csv")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.csv"):
        ProxyTable.from_csv(tmp_path / "nowhere.csv")


def test_names_that_do_not_fit_the_arrays_are_refused() -> None:
    for changes, message in (
        ({"domains": ("a", "b", "c")}, r"2 columns for the domains \[\'a\', \'b\', \'c\'\]"),
        ({"metrics": ("a",)}, r"2 columns for the metrics \[\'a\'\]"),
        ({"domains": ("a", "a")}, "'a' cannot name a domain"),
        ({"metrics": ("a", "")}, "'' cannot name a metric"),
        ({"mixes": [[1.0], [0.5, 0.5]]}, "mixes is .* must be an array of numbers"),
        ({"mixes": np.array([[0.75, 0.25], [0.9, 0.5]])}, "proxy run 2 of 2 sum to 1.4"),
        ({"run_tokens": -5}, "run_tokens is -5"),
        ({"parameters": 0.5}, "parameters is 0.5"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            table(**changes)


def test_the_order_of_the_domains_follows_the_run() -> None:
    turned = table().ordered(("math", "web"))
    assert turned.domains == ("math", "web")
    assert turned.mixes.tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert table().ordered(("web", "math"), ("math", "mmlu")).losses.tolist() == [[2.5, 3.0], [2.0, 3.2]]
    with pytest.raises(DomainError, match="holds for its own domains only"):
        table().ordered(("math", "code"))
    with pytest.raises(ConfigurationError, match="give the same losses for both"):
        table().ordered(("web", "math"), ("math",))


def test_a_subset_keeps_the_runs_asked_for() -> None:
    assert table().subset([1]).losses.tolist() == [[3.2, 2.0]]


def test_metrics_are_weighted() -> None:
    assert table().metric_weights(None).tolist() == [0.5, 0.5]
    assert table().metric_weights({"math": 3.0, "mmlu": 1.0}).tolist() == [0.25, 0.75]
    assert table().metric_weights({"math": 2.0}).tolist() == [0.0, 1.0]
    for wrong in ({"meth": 1.0}, {"math": -1.0}, {"math": "much"}, {"math": float("nan")}, {}):
        with pytest.raises(ConfigurationError, match="metrics is"):
            table().metric_weights(wrong)


def test_rank_correlation_is_that_of_scipy_with_ties_too() -> None:
    rng = np.random.default_rng(0)
    predicted, measured = rng.integers(0, 9, (40, 2)).astype(float), rng.normal(size=(40, 2))
    expected = [stats.spearmanr(predicted[:, k], measured[:, k]).statistic for k in range(2)]
    assert rank_correlation(predicted, measured) == pytest.approx(expected)
    assert np.isnan(rank_correlation(np.ones((5, 1)), measured[:5, :1])).all()

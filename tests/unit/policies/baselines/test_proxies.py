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


@pytest.mark.parametrize(
    ("mixes", "losses", "message"),
    [
        ("web,math\n1,0\n", None, "it needs mix/<domain>"),
        ("web,math\n1\n", "loss\n1\n", "row 2 has another number of columns"),
        ("web,math\n", "loss\n1\n", "it has no rows"),
        ("web,web\n1,0\n", "loss\n1\n", "a name twice"),
        ("web,math\n1,x\n", "loss\n1\n", "not a number"),
        ("web,math\n0.5,0.4\n", "loss\n1\n", "sum to 0.9"),
        ("web,math\n1.5,-0.5\n", "loss\n1\n", "at least 0"),
        ("web,math\n1,0\n", "loss\nnan\n", "not all finite"),
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
    with pytest.raises(ConfigurationError, match="2 columns of weights for 3 domains"):
        table(domains=("a", "b", "c"))


def test_the_order_of_the_domains_follows_the_run() -> None:
    turned = table().ordered(("math", "web"))
    assert turned.domains == ("math", "web")
    assert turned.mixes.tolist() == [[0.25, 0.75], [0.5, 0.5]]
    with pytest.raises(DomainError, match="holds for its own domains only"):
        table().ordered(("math", "code"))


def test_a_subset_keeps_the_runs_asked_for() -> None:
    assert table().subset([1]).losses.tolist() == [[3.2, 2.0]]


def test_metrics_are_weighted() -> None:
    assert table().metric_weights(None).tolist() == [0.5, 0.5]
    assert table().metric_weights({"math": 3.0, "mmlu": 1.0}).tolist() == [0.25, 0.75]
    assert table().metric_weights({"math": 2.0}).tolist() == [0.0, 1.0]
    for wrong in ({"meth": 1.0}, {"math": -1.0}, {}):
        with pytest.raises(ConfigurationError, match="metrics is"):
            table().metric_weights(wrong)


def test_rank_correlation_is_that_of_scipy_with_ties_too() -> None:
    rng = np.random.default_rng(0)
    predicted, measured = rng.integers(0, 9, (40, 2)).astype(float), rng.normal(size=(40, 2))
    expected = [stats.spearmanr(predicted[:, k], measured[:, k]).statistic for k in range(2)]
    assert rank_correlation(predicted, measured) == pytest.approx(expected)
    assert np.isnan(rank_correlation(np.ones((5, 1)), measured[:5, :1])).all()

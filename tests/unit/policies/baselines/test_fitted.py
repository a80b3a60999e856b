"""RegMix and Olmix: a hand-computed mix each, and the properties that a fit must have."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, DomainError, MissingExtraError, PolicyError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.policies import (
    LENGTH,
    CombinedPolicy,
    LogLinearLaw,
    Olmix,
    ProxyTable,
    RegMix,
    Regression,
    StaticPolicy,
    rank_correlation,
)
from dmagent_loader.policies.guard import project_to_bounds

Start = Callable[..., History]
HALF = np.array([0.5, 0.5])


def made(losses: Callable[[np.ndarray], np.ndarray], runs: int = 60, seed: int = 0, **more: Any) -> ProxyTable:
    """Proxies of two domains, in the other order than the run's, with losses that are a function of the math share."""
    mixes = np.random.default_rng(seed).dirichlet([1.0, 1.0], runs)
    columns = losses(mixes[:, 0])
    return ProxyTable(
        domains=("target/math", "source/web"),
        metrics=tuple(f"m{k}" for k in range(columns.shape[1])),
        mixes=mixes,
        losses=columns,
        **more,
    )


def exponential(share: np.ndarray) -> np.ndarray:
    return (2.0 + np.exp(-share))[:, None]


def length(rows: tuple[int, int], limit: int | None, *, ends: bool = False) -> RunLength:
    """Math repeats its rows, or ends the run."""
    return RunLength(
        rows=np.array(rows), repeats=np.array([True, not ends]), limit=limit, ending=((1,),) if ends else ()
    )


# RegMix


@pytest.mark.parametrize("regressor", ["lightgbm", "linear", "log-linear"])
def test_regmix_finds_the_better_end_in_the_run_s_order_of_domains(
    regressor: Any, two: DomainSpace, start: Start
) -> None:
    policy = RegMix(two, HALF, table=made(exponential, run_tokens=1000), regressor=regressor, candidates=2000)
    mix = policy.propose(start())
    assert mix[1] > 0.85, "math is the second domain of the run and the first of the table"
    assert mix.sum() == pytest.approx(1.0)
    assert policy.proxy_tokens == 60_000


def test_the_linear_regression_by_hand(two: DomainSpace) -> None:
    """Losses 3.0, 2.9 and 2.5 at math shares 0, 0.5 and 1: slope -0.5, mean 2.8, so 2.8 + 0.25 = 3.05 at share 0."""
    table = ProxyTable(
        domains=two.names,
        metrics=("loss",),
        mixes=np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]),
        losses=np.array([[3.0], [2.9], [2.5]]),
    )
    found = Regression(table, "linear").predict(np.array([[1.0, 0.0], [0.7, 0.3]]))
    assert found[:, 0] == pytest.approx([3.05, 2.9])


def test_boosted_trees_see_an_optimum_inside_which_no_line_can(two: DomainSpace) -> None:
    table = made(lambda share: ((share - 0.3) ** 2)[:, None], runs=300)
    mix = RegMix(two, HALF, table=table, candidates=5000, concentration=2.0).mix
    assert mix[1] == pytest.approx(0.3, abs=0.05)
    line = RegMix(two, HALF, table=table, candidates=5000, concentration=2.0, regressor="linear").mix
    assert line[1] < 0.1


def test_metrics_decide_what_is_best(two: DomainSpace) -> None:
    table = made(lambda share: np.stack([3 - share, 2 + share], axis=1))
    mixes = [
        RegMix(two, HALF, table=table, regressor="linear", metrics={name: 1.0}, candidates=500, best=5).mix[1]
        for name in ("m0", "m1")
    ]
    assert mixes[0] > 0.95
    assert mixes[1] < 0.05


def test_a_domain_without_rows_gets_no_weight(two: DomainSpace) -> None:
    policy = RegMix(two, np.array([1.0, 0.0]), table=made(exponential), regressor="linear", candidates=50, best=5)
    assert policy.mix.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("method", [RegMix, Olmix])
def test_a_table_of_other_domains_is_refused(method: Any) -> None:
    other = DomainSpace.from_names(["source/web", "target/code"])
    with pytest.raises(DomainError, match="target/code"):
        method(other, HALF, table=made(exponential))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regressor": "forest"}, "choose one of"),
        ({"candidates": 0}, "candidates is 0"),
        ({"best": 0}, "best is 0"),
        ({"best": 128, "candidates": 128}, "best=128 of candidates=128 would average all"),
        ({"concentration": 0}, "concentration is 0"),
        ({"metrics": {"m7": 1}}, "metrics is"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_of_regmix_are_refused(settings: dict[str, Any], message: str, two: DomainSpace) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RegMix(two, HALF, table=made(exponential), **{"regressor": "linear", **settings})


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        ("lightgbm", lambda two: RegMix(two, HALF, table=made(exponential))),
        ("scipy", lambda two: Olmix(two, HALF, table=made(exponential))),
    ],
)
def test_the_error_of_a_missing_package_names_the_extra(
    missing: str, use: Any, two: DomainSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"dmagent-loader\[baselines\]"):
        use(two)
    assert RegMix(two, HALF, table=made(exponential), regressor="linear", candidates=900).mix.sum() == pytest.approx(1)


@pytest.mark.parametrize("method", [partial(RegMix, regressor="linear"), Olmix], ids=["regmix", "olmix"])
def test_a_domain_that_no_proxy_had_is_refused_by_name(method: Any) -> None:
    """Olmix gave it nearly all weight: its slope stayed 0, and those of the others took up the constant."""
    space = DomainSpace.from_names(["source/web", "target/math", "target/code"])
    two_of_three = made(exponential)
    table = ProxyTable(
        domains=("target/math", "source/web", "target/code"),
        metrics=("m0",),
        mixes=np.hstack([two_of_three.mixes, np.zeros((60, 1))]),
        losses=two_of_three.losses,
    )
    with pytest.raises(ConfigurationError, match=r"no proxy was trained on \['target/code'\]"):
        method(space, np.full(3, 1 / 3), table=table)
    policy = method(space, np.array([0.5, 0.5, 0.0]), table=table)
    mix = policy.solve() if isinstance(policy, Olmix) else policy.mix
    assert mix[2] == 0


def test_a_domain_that_the_proxies_say_nothing_of_has_the_mean_slope() -> None:
    """A held-out fold of proxies may lack it."""
    mixes = np.array([[1 - share, share, 0.0] for share in np.linspace(0.1, 0.9, 20)])
    losses = 2.0 + np.exp(0.5 - mixes[:, 1:2])
    law = LogLinearLaw(ProxyTable(domains=("a", "b", "c"), metrics=("loss",), mixes=mixes, losses=losses))
    low, high = sorted(law.slopes[0, :2])
    assert low < law.slopes[0, 2] < high


@pytest.mark.parametrize("fit", [partial(Regression, regressor="linear"), LogLinearLaw], ids=["linear", "law"])
def test_runs_of_one_mix_are_refused(fit: Any) -> None:
    table = ProxyTable(
        domains=("a", "b"), metrics=("loss",), mixes=np.full((50, 2), 0.5), losses=np.arange(1.0, 51.0)[:, None]
    )
    with pytest.raises(ConfigurationError, match="all 50 proxy runs have the same mix"):
        fit(table)


def test_trees_that_cannot_be_split_are_refused(two: DomainSpace) -> None:
    """With 39 runs and 20 in a leaf, LightGBM predicts the mean, and the mix would be one of chance."""
    with pytest.raises(ConfigurationError, match="39 proxy runs cannot be split with 20 in a leaf"):
        RegMix(two, HALF, table=made(exponential, runs=39))
    assert np.ptp(Regression(made(exponential, runs=60)).predict(np.eye(2))) > 0


def test_predictions_that_are_all_equal_have_no_best_mix(two: DomainSpace) -> None:
    with pytest.raises(ConfigurationError, match="predicts a loss of 2 for all 300 candidates"):
        RegMix(two, HALF, table=made(lambda share: np.full((len(share), 1), 2.0)), candidates=300)


# Olmix


def test_the_optimum_of_olmix_by_hand(two: DomainSpace, start: Start) -> None:
    """L = 2 + exp(-x) at math share x, prior one half, kl 0.1: the derivative -exp(-x) + 0.1 log(x / (1 - x)) is 0.

    At x = 0.9772 the logarithm is 3.7580 and 10 exp(-x) is 3.7637; at 0.9774, 3.7670 and 3.7629. So x is 0.9773.
    """
    policy = Olmix(two, HALF, table=made(exponential, run_tokens=10), kl=0.1)
    assert policy.propose(start())[1] == pytest.approx(0.9773, abs=2e-4)
    assert policy.proxy_tokens == 600


def test_a_larger_kl_keeps_closer_to_the_prior(two: DomainSpace) -> None:
    mixes = [Olmix(two, np.array([0.7, 0.3]), table=made(exponential), kl=kl).solve()[1] for kl in (0.05, 0.5, 50.0)]
    assert mixes[0] > mixes[1] > mixes[2]
    assert mixes[2] == pytest.approx(0.3, abs=0.01)


def test_the_cap_on_repetition_holds_once_the_length_is_known(two: DomainSpace, start: Start) -> None:
    """4 passes over 70 rows are 280 of 400 samples: math gets 0.7 at most. With 30 more rows, all it wants."""
    policy = Olmix(two, HALF, table=made(exponential))
    assert policy.propose(start())[1] > 0.9
    for decision, (rows, expected) in enumerate([((100, 70), 0.7), ((100, 100), 0.9773)]):
        assert policy.needed(decision) == {LENGTH}
        policy.inform(LENGTH, length(rows, 400))
        assert policy.needed(decision) == frozenset()
        assert policy.propose(start())[1] == pytest.approx(expected, abs=2e-4)
    policy.inform(LENGTH, length((100, 70), None))
    assert policy.propose(start())[1] > 0.9, "a run without end has no cap"


def test_a_cap_that_no_mix_can_keep_is_left_out_with_a_warning(
    two: DomainSpace, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Olmix(two, HALF, table=made(exponential))
    policy.needed(0)
    policy.inform(LENGTH, length((10, 10), 400))
    with caplog.at_level(logging.WARNING):
        assert policy.propose(start())[1] == pytest.approx(0.9773, abs=2e-4)
        policy.propose(start())
    assert caplog.text.count("has no cap on repetition: no mix was found") == 1
    assert "over the 20 rows of the domains in a run of 400 samples" in caplog.text


@pytest.mark.parametrize("prior", [0.99, 0.9, 0.7])
def test_the_cap_holds_in_a_run_whose_length_follows_from_the_mix(
    prior: float, two: DomainSpace, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """100 rows of math end the run after 100 / x samples, of which the web's part makes (1 - x) / x passes: 4 at
    x = 0.2. The losses ask for less math than that. A second solution with the ceilings of the first made 140 passes:
    the first mix has a long run and tight ceilings, the next one the contrary."""
    table = made(lambda share: (2.0 + np.exp(3 * share - 3))[:, None])
    policy = Olmix(two, np.array([prior, 1 - prior]), table=table)
    policy.needed(0)
    policy.inform(LENGTH, length((100, 100), None, ends=True))
    assert policy.propose(start())[1] == pytest.approx(0.2, abs=1e-3)
    assert policy.unlimited(start())[1] < 0.15
    assert not caplog.records


def test_a_mix_that_keeps_to_the_cap_by_itself_stays(two: DomainSpace, start: Start) -> None:
    policy = Olmix(two, HALF, table=made(exponential))
    policy.needed(0)
    policy.inform(LENGTH, length((100, 100), None, ends=True))
    assert policy.propose(start()).tolist() == policy.unlimited(start()).tolist()


def test_a_mix_is_solved_for_once_for_each_length(
    two: DomainSpace, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, solved = Olmix(two, HALF, table=made(exponential)), []
    solve = policy.solve
    monkeypatch.setattr(policy, "solve", lambda *ceilings: (solved.append(ceilings), solve(*ceilings))[1])
    for decision in range(5):
        policy.needed(decision)
        policy.inform(LENGTH, length((100, 70), 400))
        policy.propose(start())
    assert len(solved) == 2, "without and with the cap"


def test_in_a_combination_the_cap_holds_for_the_combined_mix(start: Start) -> None:
    """Olmix alone wants little of the source, so its cap would not bind there; 0.6 of 1,000 samples with all of it on
    one domain of 50 rows would be 12 passes."""
    space = DomainSpace.from_names(["source/a", "source/b", "target/c"])
    mixes = np.random.default_rng(0).dirichlet(np.ones(3), 60)
    losses = (2 + np.exp(mixes @ [1.0, 3.0, -2.0]))[:, None]
    table = ProxyTable(domains=space.names, metrics=("loss",), mixes=mixes, losses=losses)
    policy = CombinedPolicy(StaticPolicy([0.3, 0.3, 0.4]), Olmix(space, np.full(3, 1 / 3), table=table, kl=0.01), space)
    assert policy.needed(0) == {LENGTH}
    rows = np.array([50, 1000, 1000])
    policy.inform(LENGTH, RunLength(rows=rows, repeats=np.array([True] * 3), limit=1000, ending=()))
    assert policy.propose(start(space)) == pytest.approx([0.2, 0.4, 0.4], abs=1e-6)


def test_the_solution_for_many_domains_satisfies_the_conditions_of_an_optimum() -> None:
    """Where no bound is met, the derivatives of the Lagrangian are equal; at the cap, they ask for more."""
    rng = np.random.default_rng(1)
    space = DomainSpace.from_names([f"source/{n}" for n in range(40)])
    mixes = rng.dirichlet(np.ones(40), 200)
    slopes = rng.normal(0, 2.0, (40, 3))
    table = ProxyTable(domains=space.names, metrics=tuple("abc"), mixes=mixes, losses=1 + np.exp(mixes @ slopes))
    prior, high = rng.dirichlet(np.ones(40)), np.full(40, 0.08)
    policy = Olmix(space, prior, table=table, kl=0.05)
    mix = policy.solve(high)
    weights = np.full(3, 1 / 3)
    derivative = policy.law.gradient(mix, weights) + 0.05 * np.log(mix / prior)
    free = mix < 0.0799
    assert free.any()
    assert not free.all()
    assert np.ptp(derivative[free]) < 1e-5
    assert derivative[~free].max() < derivative[free].min() + 1e-5
    drawn = rng.dirichlet(50 * mix + 1e-3, 200)
    feasible = [project_to_bounds(other, np.zeros(40), high) for other in drawn]
    assert all(policy.objective(other) >= policy.objective(mix) for other in feasible)
    assert not any(np.allclose(other, mix, atol=1e-3) for other in feasible)


def test_the_law_recovers_what_it_was_made_from_and_shrugs_off_outliers() -> None:
    """Three of 60 runs are off by a nat: squared errors would move the law by hundredths."""
    clean = made(exponential)
    losses = clean.losses.copy()
    losses[:3] += 1.0
    table = ProxyTable(domains=clean.domains, metrics=clean.metrics, mixes=clean.mixes, losses=losses)
    shares = np.linspace(0, 1, 11)
    predicted = LogLinearLaw(table).predict(np.stack([shares, 1 - shares], axis=1))
    assert np.abs(predicted[:, 0] - 2 - np.exp(-shares)).max() < 0.01


def test_the_law_ranks_held_out_runs_of_another_seed() -> None:
    def noisy(share: np.ndarray) -> np.ndarray:
        return np.stack([2 + np.exp(-share), 1 + np.exp(share - 1)], axis=1)

    law, test = LogLinearLaw(made(noisy)), made(noisy, seed=1)
    assert rank_correlation(law.predict(test.mixes), test.losses) == pytest.approx([1.0, 1.0])


def test_what_olmix_cannot_use_is_refused(two: DomainSpace) -> None:
    with pytest.raises(ConfigurationError, match="positive losses"):
        Olmix(two, HALF, table=made(lambda share: (share - 0.5)[:, None]))
    for settings, message in (({"kl": 0}, "kl is 0"), ({"most_passes": -1}, "most_passes is -1")):
        with pytest.raises(ConfigurationError, match=message):
            Olmix(two, HALF, table=made(exponential), **settings)
    with pytest.raises(PolicyError, match="length of the run"):
        Olmix(two, HALF, table=made(exponential)).inform("questions", {})

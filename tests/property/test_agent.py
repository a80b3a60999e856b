"""Laws of the agent on any history, and of the guard on any proposal and any feasible bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.mixture.history import STANDARDIZATIONS, FeedbackStatistics, History
from dmagent_loader.mixture.simplex import FloatArray, kl_divergence, total_variation
from dmagent_loader.policies import Guard, GuardConfig
from dmagent_loader.policies.guard import project_to_bounds

torch.manual_seed(0)
AGENT = MixingAgent(
    AgentConfig(
        d_model=32,
        num_heads=2,
        d_ff=64,
        domains=("a", "b", "c"),
        statistics=FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=10),
    )
)
unit = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))


@st.composite
def mixes(draw: st.DrawFn, size: int) -> FloatArray:
    raw = draw(hnp.arrays(np.float64, size, elements=unit))
    assume(raw.sum() > 1e-3)
    return np.asarray(raw / raw.sum())


@st.composite
def bounds(draw: st.DrawFn, size: int) -> tuple[FloatArray, FloatArray]:
    """Feasible bounds: around some mix, so that at least that one fits."""
    inside = draw(mixes(size))
    low = inside * draw(hnp.arrays(np.float64, size, elements=unit))
    high = inside + (1.0 - inside) * draw(hnp.arrays(np.float64, size, elements=unit))
    return low, high


@given(size=st.integers(1, 12), data=st.data())
@settings(max_examples=300)
def test_the_projection_is_a_mix_within_the_bounds(size: int, data: st.DataObject) -> None:
    """Clipping and then dividing by the sum leaves the bounds."""
    mix = data.draw(mixes(size))
    low, high = data.draw(bounds(size))
    result = project_to_bounds(mix, low, high)
    assert result.sum() == pytest.approx(1.0, abs=1e-12)
    assert (result >= low - 1e-9).all()
    assert (result <= high + 1e-9).all()


@given(size=st.integers(1, 12), data=st.data())
def test_a_mix_within_the_bounds_is_left_alone_and_a_projection_too(size: int, data: st.DataObject) -> None:
    mix = data.draw(mixes(size))
    low, high = data.draw(bounds(size))
    once = project_to_bounds(mix, low, high)
    np.testing.assert_allclose(project_to_bounds(once, low, high), once, atol=1e-9)
    np.testing.assert_array_equal(project_to_bounds(mix, np.zeros(size), np.ones(size)), mix)


@given(size=st.integers(2, 8), data=st.data())
def test_no_other_mix_within_the_bounds_is_closer(size: int, data: st.DataObject) -> None:
    """Among mixes that fit, the projection has the least KL(w || mix)."""
    mix = 0.99 * data.draw(mixes(size)) + 0.01 / size
    low, high = data.draw(bounds(size))
    other = project_to_bounds(data.draw(mixes(size)), low, high)
    assert kl_divergence(project_to_bounds(mix, low, high), mix) <= kl_divergence(other, mix) + 1e-7


@given(size=st.integers(2, 8), data=st.data(), limit=st.floats(0.01, 1.0))
def test_a_checked_mix_is_never_further_than_allowed_and_never_leaves_the_bounds(
    size: int, data: st.DataObject, limit: float
) -> None:
    low, high = data.draw(bounds(size))
    names = [f"target/{i}" for i in range(size)]
    config = GuardConfig(
        floor=dict(zip(names, low, strict=True)), ceiling=dict(zip(names, high, strict=True)), max_change=limit
    )
    previous = project_to_bounds(data.draw(mixes(size)), low, high)
    mix, _ = Guard(config, names).check(data.draw(mixes(size)), previous)
    assert float(total_variation(mix, previous)) <= limit + 1e-12
    assert mix.sum() == pytest.approx(1.0, abs=1e-12)
    assert (mix >= low - 1e-9).all()
    assert (mix <= high + 1e-9).all()


@given(
    steps=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 1000),
    mode=st.sampled_from(STANDARDIZATIONS),
)
@settings(deadline=None)
def test_every_history_gets_a_mix(steps: int, scale: float, seed: int, mode: str) -> None:
    """Also feedback that never moves, and feedback a thousand training spreads away."""
    rng = np.random.default_rng(seed)
    history = History(
        domains=("a", "b", "c"),
        fields=("general", "math"),
        mixes=rng.dirichlet(np.full(3, 0.1), steps),
        feedback=-5.0 + scale * rng.normal(size=(steps, 2)),
    )
    mix = AGENT.propose(history, standardization=mode)  # type: ignore[arg-type]
    assert mix.min() >= 0
    assert mix.sum() == pytest.approx(1.0, abs=1e-12)


@given(length=st.integers(1, 10), padding=st.integers(0, 10), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_left_padding_never_matters(length: int, padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1, length, 5, generator=generator)
    padded = torch.cat([torch.randn(1, padding, 5, generator=generator) * 1e3, inputs], dim=1)
    mask = torch.arange(length + padding)[None] >= padding
    with torch.no_grad():
        torch.testing.assert_close(AGENT(padded, mask)[:, padding:], AGENT(inputs), atol=1e-6, rtol=0)

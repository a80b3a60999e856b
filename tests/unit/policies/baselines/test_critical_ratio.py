"""The critical ratio, from laws that are recovered from losses that follow them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.policies import CriticalRatio, MixtureLaw

SHARES, TOKENS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0), (1e6, 2e6, 4e6, 8e6)
GRID = np.array([(r, n) for r in SHARES for n in TOKENS])


def source_loss(share: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(2 + 0.05 * share / np.sqrt(tokens / 8e6) + 0.1 / (share + 0.1))


@pytest.fixture(scope="module")
def law() -> MixtureLaw:
    return MixtureLaw(GRID[:, 0].tolist(), GRID[:, 1].tolist(), source_loss(GRID[:, 0], GRID[:, 1]).tolist())


def test_the_law_recovers_losses_at_shares_and_tokens_that_it_has_not_seen(law: MixtureLaw) -> None:
    assert law.worst < 2e-3
    for share in (0.2, 0.6, 0.8):
        assert law.loss(share, 8e6) == pytest.approx(source_loss(np.array(share), np.array(8e6)), abs=3e-3)
        assert law.loss(share, 16e6) == pytest.approx(source_loss(np.array(share), np.array(16e6)), abs=6e-3)


def test_the_critical_share_by_hand(law: MixtureLaw, start: Callable[..., History]) -> None:
    """At 8e6 tokens, 2 + 0.05 r + 0.1 / (r + 0.1) = 2.2 at a source share of r = 0.466: 0.0233 + 0.1767. So 0.534."""
    space = DomainSpace.from_names(["source/a", "source/b", "target/c"])
    policy = CriticalRatio(space, np.array([0.1, 0.3, 0.6]), source=law, tokens=8e6, limit=2.2, proxy_tokens=48)
    assert policy.share == pytest.approx(0.534, abs=0.01)
    expected = [0.25 * (1 - policy.share), 0.75 * (1 - policy.share), policy.share]
    assert policy.propose(start(space)) == pytest.approx(expected)
    assert policy.proxy_tokens == 48


def test_a_limit_that_no_share_keeps_gives_the_least_loss_and_a_wide_one_all_the_target(
    law: MixtureLaw, two: DomainSpace, caplog: pytest.LogCaptureFixture
) -> None:
    half = np.array([0.5, 0.5])
    assert CriticalRatio(two, half, source=law, tokens=8e6, limit=9.0).share == 1.0
    assert not caplog.records
    assert CriticalRatio(two, half, source=law, tokens=8e6, limit=1.0).share < 0.05
    least = float(law.loss(1 - np.linspace(0, 1, 1001), 8e6).min())
    assert "cannot keep to limit=1: the least loss on the source field" in caplog.text
    assert f"after 8e+06 tokens is {least:.4f} nats" in caplog.text


def test_with_a_law_of_the_target_a_share_beyond_its_optimum_is_not_taken(law: MixtureLaw, two: DomainSpace) -> None:
    """The target loss is least at a share of 0.5: 1 + (r - 0.5)^2 has no such law, 1 + 0.4 r + 0.16 / (r + 0.1) has:
    its derivative 0.4 - 0.16 / (r + 0.1)^2 is 0 at r = 0.532."""
    losses = 1 + 0.4 * GRID[:, 0] + 0.16 / (GRID[:, 0] + 0.1)
    target = MixtureLaw(GRID[:, 0].tolist(), GRID[:, 1].tolist(), losses.tolist())
    policy = CriticalRatio(two, np.array([0.5, 0.5]), source=law, tokens=8e6, limit=9.0, target=target)
    assert policy.share == pytest.approx(0.532, abs=0.03)


def test_what_is_no_law_or_no_two_fields_is_refused(law: MixtureLaw) -> None:
    for shares, losses in (([0.1, 0.5], [2.0, 2.1]), ([0.1, 0.5, 1.5], [2.0] * 3), ([0.1, 0.5, 0.9], [2.0, 2.0, -1.0])):
        with pytest.raises(ConfigurationError, match="at least 3 shares"):
            MixtureLaw(shares, [1e6] * len(shares), losses)
    for tokens, losses, message in (
        ([1e6, np.inf, 2e6], [2.0] * 3, "the number of tokens of measurement 2 of 3 is inf"),
        ([1e6] * 3, [2.0, 2.0, np.inf], "the loss of measurement 3 of 3 is inf"),
        ([1e6] * 3, [np.nan, 2.0, 2.0], "the loss of measurement 1 of 3 is nan"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            MixtureLaw([0.1, 0.5, 0.9], tokens, losses)
    with pytest.raises(ConfigurationError, match="7 measurements cannot determine the 7 parameters"):
        MixtureLaw([0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0], [1e6] * 7, [2.5, 2.4, 2.3, 2.3, 2.2, 2.2, 2.2])
    with pytest.raises(ConfigurationError, match="proxy_tokens is -1"):
        CriticalRatio(
            DomainSpace.from_names(["source/a", "target/b"]),
            np.array([0.5, 0.5]),
            source=law,
            tokens=1e6,
            limit=2.0,
            proxy_tokens=-1,
        )
    space = DomainSpace.from_names(["source/a", "source/b"])
    with pytest.raises(DomainError, match="two fields"):
        CriticalRatio(space, np.array([0.5, 0.5]), source=law, tokens=1e6, limit=2.0)
    with pytest.raises(ConfigurationError, match="tokens is 0"):
        CriticalRatio(
            DomainSpace.from_names(["source/a", "target/b"]), np.array([0.5, 0.5]), source=law, tokens=0, limit=2
        )

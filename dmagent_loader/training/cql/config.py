"""Settings of Conservative Q-Learning (paper, C.4), which state its losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmagent_loader.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class CQLConfig:
    r"""Settings of Conservative Q-Learning on the simplex.

    The critics Q_i minimise Eq. 5, here in units of the sigmoid q_i of Eq. 7, where Q_i = low + span * q_i:

    .. math::

        \tfrac{1}{2}\, E_D\left[(q_i(s_t, a_t) - y_t)^2\right]
        + \alpha \left(E_{s_t \sim D,\, a \sim \mu(s_t)}[q_i(s_t, a)] - E_D[q_i(s_t, a_t)]\right)

    D are the recorded steps, mu is half uniform and half around the actor's mix (`algorithm.draw_proposals`), and the
    target y_t is G_t on the scale of q_i. V is the lowest value of the target networks for the actor pi:

    .. math::

        G_t = r_t + \gamma\left((1 - \lambda)\, V(s_{t+1}) + \lambda\, G_{t+1}\right), \qquad
        V(s) = \min_i \bar Q_i(s, \pi(s))

    The actor maximises the lowest logit u_i of the critics, minus w times the squared distance to the recorded mix:

    .. math::

        E_D\left[\min_i u_i(s_t, \pi(s_t)) - w \lVert \pi(s_t) - a_t \rVert^2\right]

    The paper gives none of the values below.

    Args:
        updates: Number of updates of the critics, a multiple of `log_every`.
        warmup_updates: Updates before the actor starts to move, in which the critics improve on their random weights
            (extension).
        batch_size: Fragments of an update.
        window: Steps at the end of a fragment that are trained on; the state is always the whole prefix before them.
        discount: gamma.
        trace: lambda; 0 is the one-step target of Eq. 5, see `algorithm.bellman_targets`.
        alpha: Weight of the conservative term, independent of the scale of the rewards. Calibrate it: in the artificial
            world of ``tests/integration/test_cql.py`` (mean of 3 seeds, 400 updates) the gain is 1.36 with 0.001, 0.72
            with 0.005 and 0.19 with 0.02.
        num_proposals: Actions drawn from mu for each state.
        proposal_sharpness: Concentration of the proposals around the actor's mix, see `algorithm.draw_proposals`.
        num_critics: Number of critics; 1 is the paper's, 2 are twins (extension).
        bc_weight: w (extension).
        polyak: Share of the critics' weights that the target networks take over at each update.
        actor_learning_rate: Learning rate of the actor's Adam.
        critic_learning_rate: Learning rate of the critics' Adam.
        range_margin: Margin around the recorded returns in the range of values, see `rewards.value_range`.
        log_every: Updates per row of the training curve.
        seed: Seed of critics, fragments and proposals.

    Raises:
        ConfigurationError: A value is outside its range, or two values do not fit each other.
    """

    updates: int = 1200
    warmup_updates: int = 200
    batch_size: int = 8
    window: int = 16
    discount: float = 0.99
    trace: float = 0.0
    alpha: float = 0.001
    num_proposals: int = 2
    proposal_sharpness: float = 200.0
    num_critics: int = 2
    bc_weight: float = 0.0
    polyak: float = 0.005
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4
    range_margin: float = 0.25
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "window", "num_proposals", "num_critics", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("discount", "trace", "polyak"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("alpha", "proposal_sharpness", "bc_weight", "range_margin", "warmup_updates"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("actor_learning_rate", "critic_learning_rate"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.updates % self.log_every:
            raise ConfigurationError(
                f"{self.updates} updates are not a multiple of log_every {self.log_every}: the last ones would be left "
                "out; choose numbers that fit"
            )
        if self.warmup_updates >= self.updates:
            raise ConfigurationError(
                f"warmup_updates {self.warmup_updates} leaves nothing of {self.updates} updates for the actor: lower it"
            )

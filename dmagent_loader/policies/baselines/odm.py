"""Online data mixing (ODM), arXiv 2312.02406, Algorithm 1: a bandit in the manner of EXP3."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.baselines.losses import LossPolicy


class OnlineDataMixing(LossPolicy):
    """A bandit whose arms are the domains and whose rewards are their losses. It needs no settings from the user.

    In round t = 1, 2, ..., with D domains and the exploration rate e_t:

        e_t    = min(1 / D, sqrt(log D / (D t)))
        w_d    = (1 - D e_t) exp(e_{t-1} R_d) / sum exp(e_{t-1} R) + e_t        e_0 = 1 / D, R = 0
        R_d   <- alpha R_d + (1 - alpha) loss_d / w_d

    Algorithm 1. The first mix is thus the uniform one. In the paper, a round is a training step, and only the domains
    of its batch are rewarded. Here the loss of every domain is measured, and a decision stands for
    `rounds_per_decision` rounds with these losses. With a single round, the exploration rate would stay at 1 / D, the
    uniform mix, for D log D decisions (205 with 52 domains). As e_t falls, the exploitation e_{t-1} R does, too: late
    in a long run, the mix approaches the uniform one again. Alpha is that of the authors' code
    (github.com/alon-albalak/online-data-mixing), which departs from Algorithm 1 otherwise: it averages exp(loss), not
    loss / w.

    Args:
        space: Domains of the run.
        natural: (D,), natural share of each domain; it has no effect.
        alpha: Weight of past rewards.
        rounds_per_decision: Rounds that a decision stands for.
        name: See `policies.base.Policy`.

    Raises:
        ConfigurationError: A setting is invalid.
    """

    always_answers = True

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        alpha: float = 0.9,
        rounds_per_decision: int = 100,
        name: str = "odm",
    ) -> None:
        super().__init__(space, natural, initial=dict.fromkeys(space.names, 1 / len(space)), name=name)
        if not is_finite_number(alpha) or not 0 <= alpha < 1:
            raise ConfigurationError(f"alpha is {shown(alpha)}; it must be at least 0 and less than 1")
        self._rounds_per_decision = whole_number("rounds_per_decision", rounds_per_decision, least=1)
        self._alpha = alpha
        self._rewards = np.zeros(len(space))

    def updated(self, losses: FloatArray) -> FloatArray:
        """See `LossPolicy.updated`."""
        mix, done = self.mix, self.updates * self._rounds_per_decision
        for number in range(done + 1, done + self._rounds_per_decision + 1):
            self._rewards = self._alpha * self._rewards + (1 - self._alpha) * losses / mix
            scores = self._exploration(number) * self._rewards
            rate = self._exploration(number + 1)
            exploited = np.exp(scores - scores.max())
            mix = (1 - len(losses) * rate) * exploited / exploited.sum() + rate
        return mix

    def _exploration(self, round_number: int) -> float:
        """e_t."""
        count = len(self.space)
        return min(1 / count, float(np.sqrt(np.log(count) / (count * round_number))))

    def _begin(self) -> None:
        super()._begin()
        self._rewards = np.zeros(len(self.space))

    def _learnt(self) -> dict[str, FloatArray | None]:
        return {**super()._learnt(), "rewards": self._rewards}

    def _restore(self, learnt: Mapping[str, FloatArray | None]) -> None:
        super()._restore(learnt)
        if learnt["rewards"] is not None:
            self._rewards = learnt["rewards"]

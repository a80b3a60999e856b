"""What the network of `dmagent-plus` sees: one token for each domain and one for the run, at one decision.

Time is compressed: instead of the tokens of all earlier decisions, a token holds cumulative and moving averages over
them (`Memory`). The measurements behind this choice found that the order of mixes is worth at most 0.12 standard
deviations of feedback, so attention over time would have nothing to find. A token never depends on later decisions.

All values of a domain are *intensive*: they do not change if the domain is split into equal parts. Sizes enter only as
weights of the attention (`network`). Names do not enter at all.

Shapes: ... any batch shape, D domains, F fields of the data, R = 2 roles (keep, acquire), T steps so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmagent_loader.mixture.simplex import FloatArray

DOMAIN_FEATURES = (
    "tilt of the influence policy",
    "influence on keep",
    "influence on acquire",
    "error on keep",
    "error on acquire",
    "is target",
    "field's influence on keep",
    "field's influence on acquire",
    "age of the measurement",
    "passes so far",
    "passes at the end",
    "rows left",
    "exposure against the influence policy",
    "topic of the questions",
)
"""Features of a domain token, in order."""

RUN_FEATURES = (
    "keep: last feedback",
    "keep: averaged",
    "keep: slope",
    "acquire: last feedback",
    "acquire: averaged",
    "acquire: slope",
    "progress",
    "progress is known",
    "learning rate",
    "learning rate is known",
    "balance",
    "target share so far",
    "influence is measured",
    "reliability on keep",
    "reliability on acquire",
    "topics are known",
)
"""Features of the run's token, in order; the first six against the base model."""

KEEP, ACQUIRE = 0, 1
GAIN_UNITS = (0.05, 0.25)
"""Changes of feedback, in nats, up to which the features of the two roles are nearly linear."""
DEFAULT_HORIZON = 5.0
"""Decisions that the moving averages reach back if the length of the run is unknown."""
HORIZON = 0.06
"""The same as a part of the run, if its length is known; at least two decisions."""
AGE_UNIT = 80.0
"""Decisions that count as an age of 1 if the length of the run is unknown."""
_SMALL = 1e-12


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run before a decision, apart from its history.

    Args:
        prior: (..., D), mix of the influence policy, sums to 1.
        natural: (..., D), natural share of each domain; 0 for padding.
        fields: (..., F, D), 1 where a domain belongs to a field of the data, else 0.
        acquires: (..., F), 1 for the target field, else 0.
        influence: (..., R, D), shrunken influence on each role, in standard deviations; their sum is the influence
            policy's score if there are two question fields.
        error: (..., R, D), standard error of the influence over its standard deviation among the domains of the field.
        across: (..., R, F), mean influence of a field of the data on each role, against the mean over all fields, in
            standard deviations over all domains.
        reliability: (..., R), share of the variance of the influence that is not noise, mean over fields of the data.
        measured: (...), 1 if influence was measured.
        topics: (..., D), log ratio of the share that the topics of the questions suggest to the natural share.
        topics_known: (...), 1 if topics are known.
    """

    prior: FloatArray
    natural: FloatArray
    fields: FloatArray
    acquires: FloatArray
    influence: FloatArray
    error: FloatArray
    across: FloatArray
    reliability: FloatArray
    measured: FloatArray
    topics: FloatArray
    topics_known: FloatArray


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is known at one decision.

    Args:
        exposure: (..., D), mean of the mixes so far; zeros before the first.
        gains: (..., 3, R), last feedback, moving average and slope, in nats against the base model.
        progress: (...), part of the run that is done, 0 if unknown.
        progress_known: (...), 1 if the length of the run is known.
        age: (...), part of the run since the influence was measured; in units of `AGE_UNIT` if its length is unknown.
        passes: (..., D), passes made over the rows of each domain; 0 if unknown.
        final_passes: (..., D), passes at the end of the run with the influence policy's mix; 0 if unknown.
        rows_left: (..., D), part of the rows of a domain that is left, 1 if they repeat or the number is unknown.
        learning_rate: (...), of the next steps, as a part of its maximum.
        learning_rate_known: (...), 1 if it is known.
        balance: (...), weight of the field to acquire in the objective, in (0, 1).
    """

    exposure: FloatArray
    gains: FloatArray
    progress: FloatArray
    progress_known: FloatArray
    age: FloatArray
    passes: FloatArray
    final_passes: FloatArray
    rows_left: FloatArray
    learning_rate: FloatArray
    learning_rate_known: FloatArray
    balance: FloatArray


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Compressed history: all that the tokens keep of earlier decisions. Constant in size, updated at each decision.

    Args:
        exposure: (..., D), mean of the mixes so far; zeros before the first.
        fast: (..., R), exponential moving average of the gains.
        slow: (..., R), the same over three times as many decisions.
        last: (..., R), gains after the latest step.
        steps: Steps so far.
    """

    exposure: FloatArray
    fast: FloatArray
    slow: FloatArray
    last: FloatArray
    steps: int

    @classmethod
    def empty(cls, batch: tuple[int, ...], domains: int) -> Memory:
        """The memory before the first step of a run."""
        zeros = np.zeros((*batch, 2))
        return cls(exposure=np.zeros((*batch, domains)), fast=zeros, slow=zeros, last=zeros, steps=0)

    def after(self, mix: FloatArray, gains: FloatArray, horizon: FloatArray | float) -> Memory:
        """The memory after one more step.

        Args:
            mix: (..., D), mix that was trained on.
            gains: (..., R), feedback against the base model.
            horizon: (...), decisions that the moving averages reach back.
        """
        rate = (1.0 / np.maximum(horizon, 1.0))[..., None]
        steps = self.steps + 1
        return Memory(
            exposure=self.exposure + (mix - self.exposure) / steps,
            fast=self.fast + rate * (gains - self.fast),
            slow=self.slow + rate / 3 * (gains - self.slow),
            last=gains,
            steps=steps,
        )

    @classmethod
    def of(cls, mixes: FloatArray, gains: FloatArray, horizon: float) -> Memory:
        """The memory after all steps of one run, in closed form.

        Args:
            mixes: (T, D).
            gains: (T, R).
            horizon: Decisions that the moving averages reach back.
        """
        steps = len(mixes)
        if steps == 0:
            return cls.empty((), mixes.shape[1])
        rate = 1.0 / max(horizon, 1.0)
        ages = np.arange(steps - 1, -1, -1)
        fast, slow = ((r * (1 - r) ** ages) @ gains for r in (rate, rate / 3))
        return cls(exposure=mixes.mean(axis=0), fast=fast, slow=slow, last=gains[-1], steps=steps)

    def gains(self) -> FloatArray:
        """`Moment.gains`: (..., 3, R)."""
        return np.stack([self.last, self.fast, self.fast - self.slow], axis=-2)


def horizon_of(decisions: float | None) -> float:
    """Decisions that moving averages reach back, from the number of decisions of the run; None: unknown."""
    return DEFAULT_HORIZON if decisions is None else max(2.0, HORIZON * decisions)


def log_odds(balance: FloatArray) -> FloatArray:
    """Log odds of a balance, limited to ±4."""
    inside = np.clip(balance, 0.018, 0.982)
    return np.asarray(np.log(inside / (1 - inside)))


def tokens(facts: Facts, moment: Moment) -> tuple[FloatArray, FloatArray]:
    """The tokens of the domains, (..., D, features), and of the run, (..., features); all values are of order 1."""
    members = facts.fields
    prior_within, natural_within = (
        shares / np.maximum(at_domains(members, of_fields(members, shares)), _SMALL)
        for shares in (facts.prior, facts.natural)
    )
    has_rows = facts.natural > 0
    tilt = np.where(has_rows & (facts.prior > 0), _log_ratio(prior_within, natural_within), 0.0)
    started = (moment.exposure.sum(axis=-1) > 0)[..., None]
    exposed = np.where(started & (facts.prior > 0), _log_ratio(moment.exposure, facts.prior), 0.0)
    by_domain = np.ones_like(facts.prior)
    target = at_domains(members, facts.acquires)
    across = facts.across @ members
    domain_tokens = np.stack(
        [
            np.clip(tilt / 2, -2, 2),
            np.clip(facts.influence[..., KEEP, :], -3, 3),
            np.clip(facts.influence[..., ACQUIRE, :], -3, 3),
            np.clip(facts.error[..., KEEP, :], 0, 2),
            np.clip(facts.error[..., ACQUIRE, :], 0, 2),
            target,
            np.clip(across[..., KEEP, :], -3, 3),
            np.clip(across[..., ACQUIRE, :], -3, 3),
            by_domain * np.clip(moment.age, 0, 2)[..., None],
            np.log1p(np.clip(moment.passes, 0, 50)),
            np.log1p(np.clip(moment.final_passes, 0, 50)),
            moment.rows_left,
            np.clip(exposed, -2, 2),
            np.clip(facts.topics, -3, 3),
        ],
        axis=-1,
    )
    run_tokens = np.stack(
        [
            *(
                np.arcsinh(moment.gains[..., kind, role] / GAIN_UNITS[role])
                for role in (KEEP, ACQUIRE)
                for kind in range(3)
            ),
            moment.progress,
            moment.progress_known,
            moment.learning_rate - 1.0,
            moment.learning_rate_known,
            log_odds(moment.balance) / 2,
            (target * moment.exposure).sum(axis=-1),
            facts.measured,
            facts.reliability[..., KEEP],
            facts.reliability[..., ACQUIRE],
            facts.topics_known,
        ],
        axis=-1,
    )
    return domain_tokens * has_rows[..., None], run_tokens


def of_fields(members: FloatArray, by_domain: FloatArray) -> FloatArray:
    """Sums over the domains of each field, from `Facts.fields`: (..., D) -> (..., F)."""
    return np.asarray((members @ by_domain[..., None])[..., 0])


def at_domains(members: FloatArray, by_field: FloatArray) -> FloatArray:
    """The value of its field at each domain, from `Facts.fields`: (..., F) -> (..., D)."""
    return np.asarray((by_field[..., None, :] @ members)[..., 0, :])


def _log_ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    return np.asarray(np.log(np.maximum(above, _SMALL)) - np.log(np.maximum(below, _SMALL)))

"""The network of `dmagent-plus`: corrections to the influence policy's mix.

    h_d = tanh(W_x x_d + W_g g + b)                          for each domain d, from its token x_d and the run's token g
    c_f = attention of learned queries over the domains of field f, each weighted by its natural share
    c   = sum over f of P_f c_f                              P_f: weight of the field in the influence policy's mix p
    r_d = 2 tanh((w_r tanh(A_h h_d + A_f c_f(d) + A_c c + b_r) + w_x x_d) / 2)
    s_f = 2 tanh(w_s tanh(B_f c_f + B_c c + B_g g + b_s) / 2) + k log(balance / (1 - balance)) for the target field
    weight_d = p_d exp(r_d) / mean over the field's p of exp(r) * exp(s_f) / mean over P of exp(s)

The weights are shared by all domains. The output weights w are 0 before training, so the untrained network returns p
itself, bit for bit, at a balance of 0.5. Reordering the domains reorders the mix. Splitting a domain into parts with
its token leaves r_d and all other weights as they are, because the attention weighs domains by their natural share.

Shapes: ... any batch shape, D domains, F fields of the data, X and G features of the tokens, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dmagent_loader.agent.plus.observation import (
    DOMAIN_FEATURES,
    RUN_FEATURES,
    Facts,
    Moment,
    at_domains,
    log_odds,
    of_fields,
    tokens,
)
from dmagent_loader.mixture.simplex import FloatArray

WIDTH = 12
QUERIES = 3
"""Attention heads; each averages its part of the width."""
LIMIT = 2.0
"""Largest correction of a log weight."""
BALANCE_SLOPE = 0.5
"""k before training: effect of the balance's log odds on the log odds of the target field."""


def shapes(width: int = WIDTH, queries: int = QUERIES) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    x, g, h = len(DOMAIN_FEATURES), len(RUN_FEATURES), width
    return {
        "token.domain": (x, h),
        "token.run": (g, h),
        "token.bias": (h,),
        "attention.query": (h, queries),
        "domain.own": (h, h),
        "domain.field": (h, h),
        "domain.all": (h, h),
        "domain.bias": (h,),
        "domain.output": (h,),
        "domain.skip": (x,),
        "share.field": (h, h),
        "share.all": (h, h),
        "share.run": (g, h),
        "share.bias": (h,),
        "share.output": (h,),
        "share.balance": (),
    }


_ZERO_AT_FIRST = ("domain.output", "domain.skip", "share.output", "token.bias", "domain.bias", "share.bias")


@dataclass(frozen=True)
class PlusNetwork:
    """Weights of the network, by the names of `shapes`."""

    weights: Mapping[str, FloatArray]

    @classmethod
    def untrained(cls, seed: int = 0, *, width: int = WIDTH, queries: int = QUERIES) -> PlusNetwork:
        """A network that returns the influence policy's mix."""
        rng = np.random.default_rng(seed)
        weights: dict[str, FloatArray] = {}
        for name, shape in shapes(width, queries).items():
            scale = 0.0 if name in _ZERO_AT_FIRST else 1.0 / np.sqrt(max(1, shape[0] if shape else 1))
            weights[name] = scale * rng.normal(size=shape)
        weights["share.balance"] = np.array(BALANCE_SLOPE)
        return cls(weights)

    def in_float32(self) -> PlusNetwork:
        """The same network in single precision, for training."""
        return PlusNetwork({name: value.astype(np.float32) for name, value in self.weights.items()})

    @property
    def width(self) -> int:
        """H."""
        return int(self.weights["token.bias"].shape[0])

    @property
    def queries(self) -> int:
        """Number of attention heads."""
        return int(self.weights["attention.query"].shape[1])

    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(value.size for value in self.weights.values())

    def vector(self) -> FloatArray:
        """All weights as one vector, in the order of `shapes`."""
        return np.concatenate([np.ravel(self.weights[name]) for name in shapes(self.width, self.queries)])

    def with_vector(self, vector: FloatArray) -> PlusNetwork:
        """A network of the same shape with other weights."""
        weights, start = {}, 0
        for name, shape in shapes(self.width, self.queries).items():
            size = int(np.prod(shape))
            weights[name] = np.asarray(vector[start : start + size], dtype=np.float64).reshape(shape)
            start += size
        return PlusNetwork(weights)

    def corrections(self, facts: Facts, moment: Moment) -> tuple[FloatArray, FloatArray]:
        """Corrections r of the domains, (..., D), and s of the fields, (..., F), to log weights."""
        w = self.weights
        x, g = tokens(facts, moment)
        hidden = np.tanh(x @ w["token.domain"] + (g @ w["token.run"] + w["token.bias"])[..., None, :])
        by_field = self._attention(hidden, facts)
        mass = of_fields(facts.fields, facts.prior)
        overall = (mass[..., None, :] @ by_field)[..., 0, :]
        of_domain = np.swapaxes(facts.fields, -1, -2) @ (by_field @ w["domain.field"])
        common = (overall @ w["domain.all"] + w["domain.bias"])[..., None, :]
        second = np.tanh(hidden @ w["domain.own"] + of_domain + common)
        domain = _limited(second @ w["domain.output"] + x @ w["domain.skip"])
        run = (overall @ w["share.all"] + g @ w["share.run"] + w["share.bias"])[..., None, :]
        share = _limited(np.tanh(by_field @ w["share.field"] + run) @ w["share.output"])
        odds = float(w["share.balance"]) * log_odds(moment.balance)
        return domain, share + facts.acquires * odds[..., None]

    def mix(self, facts: Facts, moment: Moment) -> FloatArray:
        """The corrected mix: (..., D), sums to the sum of `facts.prior`."""
        domain, share = self.corrections(facts, moment)
        return corrected(facts, domain, share)

    def _attention(self, hidden: FloatArray, facts: Facts) -> FloatArray:
        """c of the module docstring: (..., F, H)."""
        # Hidden values lie in [-1, 1], so the scores are bounded and need no shift before exp.
        raised = np.exp(hidden @ self.weights["attention.query"]) * facts.natural[..., None]
        per_head = self.width // self.queries
        summed = facts.fields @ (hidden * np.repeat(raised, per_head, axis=-1))
        total = np.repeat(facts.fields @ raised, per_head, axis=-1)
        return np.asarray(np.divide(summed, total, out=np.zeros_like(summed), where=total > 0))


def corrected(facts: Facts, domain: FloatArray, share: FloatArray) -> FloatArray:
    """The influence policy's mix with its log weights corrected inside and between fields; zeros leave it bit for bit.

    Args:
        facts: Facts with the mix.
        domain: (..., D), correction of each domain.
        share: (..., F), correction of each field of the data.
    """
    raised = facts.prior * np.exp(domain)
    before, after = of_fields(facts.fields, facts.prior), of_fields(facts.fields, raised)
    within = np.divide(before, after, out=np.ones_like(before), where=after > 0)
    factor = np.exp(share)
    between = factor * (before.sum(axis=-1, keepdims=True) / (before * factor).sum(axis=-1, keepdims=True))
    return raised * at_domains(facts.fields, within * between)


def _limited(correction: FloatArray) -> FloatArray:
    return np.asarray(LIMIT * np.tanh(correction / LIMIT))

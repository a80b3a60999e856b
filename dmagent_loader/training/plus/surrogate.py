"""An analytic, vectorised surrogate of continual pre-training runs, on which `dmagent-plus` is trained.

For each field k (keep, acquire) of a run with delivered weights w over the domains:

    S_k(w) = a_k log(kappa_k + sum over d of w_d v_kd) + c_k                  level that a mix leads to
             - harm_k (weight of noise) - overfit_k sum over d of w_d max(passes_d - 1.5, 0)
    G_k <- G_k + (1 - exp(-r_k lr)) (S_k(w) - G_k)                            gain over the base model
    feedback_k = moving average of G_k + noise

v_kd = exp(b_k z_kd + delta_k [d is target]) is the value of domain d: z_kd is the standardised gain of a real proxy
that was trained on the domain alone. The logarithm gives diminishing returns; delta_keep < 0 is the cost of forgetting,
which grows with the distance of the fields. Rows read again are worth exp(-(passes - 1) / R) of fresh ones, and many
passes over a large share of the mix do harm in both fields (0.02 to 0.25 nats in recorded runs of the tasks of
`training.tasks`). `fitting` calibrates b, delta, kappa, a, c and the rate r on recorded runs.

The agent sees measured influence, drawn together with the true values from real measurements, and not the values.

Shapes: B tasks of a batch, D domains (padded), F = 2 fields of the data, K = R = 2 roles (keep, acquire).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from dmagent_loader.agent.plus.observation import AGE_UNIT, Facts, Memory, Moment, at_domains, horizon_of, of_fields
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.passes import MOST_PASSES

Decide = Callable[[Facts, Moment], FloatArray]
"""A policy on a batch of surrogate tasks: facts and moment -> mixes, (B, D)."""

RANGE_SHARES = (0.0, 0.3, 1.0)
"""Target shares of the natural mixes that show what is attainable in a task."""
LEAST_RANGE = 0.02
"""Smallest attainable range of a field, in nats."""
HARMLESS_PASSES = 1.5
LAG = 5 / 80
"""Part of a run that the averaged weights, which feedback reads, reach back."""


@dataclass(frozen=True, kw_only=True)
class SurrogateTasks:
    """B tasks with the same number of decisions.

    Args:
        decisions: Number of decisions.
        facts: What a policy sees of the data and the measurement.
        value: (B, K, D), v of the module docstring at the start; 0 for padding.
        late_value: (B, K, D), v at the end; values move from one to the other.
        kappa: (K,).
        scale: (B, K), a.
        offset: (B, K), c.
        rate: (B, K), r of one decision at the full learning rate.
        passes: (B, D), passes over a domain if the whole run were trained on it.
        repeats: (B, D), 1 if rows are read again; else the weight of a used-up domain goes to the rest of its field.
        repetition: (B,), R.
        noise: (B, D), 1 for the domain whose text turns to noise.
        onset: (B,), part of the run after which it does.
        harm: (B, K), loss of level per weight of noise, in nats.
        overfit: (B, K), loss of level per weight and pass beyond `HARMLESS_PASSES`, in nats.
        feedback_noise: (B, K), standard deviation of feedback, in nats.
        learning_rate: (B, T), as a part of its maximum.
        learning_rate_known: (B,), 1 if the policy knows it.
        progress_known: (B,), 1 if the policy knows the length of the run and of the data.
        balance: (B,), weight of the field to acquire in the reward.
        kinds: B names of perturbations.
    """

    decisions: int
    facts: Facts
    value: FloatArray
    late_value: FloatArray
    kappa: FloatArray
    scale: FloatArray
    offset: FloatArray
    rate: FloatArray
    passes: FloatArray
    repeats: FloatArray
    repetition: FloatArray
    noise: FloatArray
    onset: FloatArray
    harm: FloatArray
    overfit: FloatArray
    feedback_noise: FloatArray
    learning_rate: FloatArray
    learning_rate_known: FloatArray
    progress_known: FloatArray
    balance: FloatArray
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.balance)

    def natural_at(self, share: float) -> FloatArray:
        """The natural mixes with a share of the target field: (B, D)."""
        masses = np.array([1 - share, share])
        factor = masses / np.maximum(of_fields(self.facts.fields, self.facts.natural), 1e-12)
        return np.asarray(self.facts.natural * at_domains(self.facts.fields, factor))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What became of a policy.

    Args:
        gains: (B, K), final gains, in nats.
        mixes: (B, T, D), mixes that the policy asked for.
        feedback: (B, T, K), against the base model.
    """

    gains: FloatArray
    mixes: FloatArray
    feedback: FloatArray


def rollout(tasks: SurrogateTasks, decide: Decide, seed: int) -> Rollout:
    """Runs a policy on all tasks.

    Args:
        tasks: The tasks.
        decide: The policy.
        seed: Seed of the noise of feedback: two policies with the same seed meet the same noise.
    """
    rng = np.random.default_rng(seed)
    batch, domains, total = len(tasks), tasks.facts.prior.shape[-1], tasks.decisions
    dtype = tasks.value.dtype
    noises = rng.normal(size=(total, batch, 2)).astype(dtype) * tasks.feedback_noise
    level, averaged = np.zeros((batch, 2), dtype), np.zeros((batch, 2), dtype)
    used = np.zeros((batch, domains), dtype)
    known = tasks.progress_known
    horizon = np.where(known > 0, horizon_of(total), horizon_of(None)).astype(dtype)
    memory = Memory(exposure=used, fast=level, slow=level, last=level, steps=0)
    lag = 1 - np.exp(-1 / max(LAG * total, 0.3))
    mixes, feedback = np.zeros((batch, total, domains), dtype), np.zeros((batch, total, 2), dtype)
    for step in range(total):
        progress = step / total
        mix = limited(tasks, decide(tasks.facts, _moment(tasks, memory, used, progress)))
        weights = _delivered(tasks, mix, used)
        level = level + (1 - np.exp(-tasks.rate * tasks.learning_rate[:, step, None])) * (
            _levels(tasks, weights, used, progress) - level
        )
        used = used + weights * tasks.passes / total
        averaged = averaged + lag * (level - averaged)
        feedback[:, step], mixes[:, step] = averaged + noises[step], mix
        memory = memory.after(mix, feedback[:, step], horizon)
    return Rollout(gains=level, mixes=mixes, feedback=feedback)


def static(mix: FloatArray) -> Decide:
    """The policy that always asks for one mix of each task: (B, D)."""
    return lambda facts, moment: mix


def ranges(tasks: SurrogateTasks) -> FloatArray:
    """Attainable range of each field, (B, K): largest minus smallest gain of three natural mixes.

    Without perturbation and with enough rows, as in `training.tasks`.
    """
    easy = replace(
        tasks,
        passes=0.01 * tasks.passes / np.maximum(tasks.passes.max(axis=-1, keepdims=True), 1e-6),
        repeats=np.ones_like(tasks.repeats),
        noise=np.zeros_like(tasks.noise),
    )
    gains = [rollout(easy, static(tasks.natural_at(share)), 0).gains for share in RANGE_SHARES]
    return np.asarray(np.maximum(np.max(gains, axis=0) - np.min(gains, axis=0), LEAST_RANGE))


def rewards(tasks: SurrogateTasks, gains: FloatArray, attainable: FloatArray) -> FloatArray:
    """Balanced gains as shares of what is attainable: (B,)."""
    shares = gains / attainable
    return np.asarray((1 - tasks.balance) * shares[:, 0] + tasks.balance * shares[:, 1])


def limited(tasks: SurrogateTasks, mix: FloatArray) -> FloatArray:
    """The mixes with at most `MOST_PASSES` over a repeating domain, where the length of the run is known: (B, D)."""
    applies = (tasks.progress_known[:, None] > 0) & (tasks.repeats > 0)
    ceilings = np.where(applies, MOST_PASSES / np.maximum(tasks.passes, 1e-9), 1e6)
    over = (mix > ceilings).any(axis=-1)
    if not over.any():
        return mix
    members, ceiling = tasks.facts.fields[over], ceilings[over]
    share = of_fields(members, mix[over])
    found = mix[over]
    for _ in range(5):
        clipped = np.minimum(found, ceiling)
        free = np.where(clipped < ceiling, np.maximum(clipped, 1e-9), 0.0)
        missing = share - of_fields(members, clipped)
        found = clipped + free * at_domains(members, missing / np.maximum(of_fields(members, free), 1e-12))
    # A field whose rows do not suffice for its share gets the natural mix.
    rows = np.where(tasks.facts.natural[over] > 0, 1 / np.maximum(tasks.passes[over], 1e-9), 0.0)
    natural = rows * at_domains(members, share / np.maximum(of_fields(members, rows), 1e-12))
    too_small = at_domains(members, (of_fields(members, ceiling) <= share).astype(mix.dtype)) > 0
    result = mix.copy()
    result[over] = np.where(too_small, natural, found)
    return np.asarray(result / result.sum(axis=-1, keepdims=True))


def _moment(tasks: SurrogateTasks, memory: Memory, used: FloatArray, progress: float) -> Moment:
    known = tasks.progress_known
    final = tasks.passes * tasks.facts.prior
    lr = tasks.learning_rate[:, memory.steps]
    return Moment(
        exposure=memory.exposure,
        gains=memory.gains(),
        progress=progress * known,
        progress_known=known,
        age=np.where(known > 0, progress, memory.steps / AGE_UNIT).astype(known.dtype),
        passes=used * known[:, None],
        final_passes=final * known[:, None],
        rows_left=np.where((tasks.repeats > 0) | (known[:, None] == 0), 1.0, np.clip(1 - used, 0, 1)),
        learning_rate=np.where(tasks.learning_rate_known > 0, lr, 1.0),
        learning_rate_known=tasks.learning_rate_known,
        balance=tasks.balance,
    )


def _delivered(tasks: SurrogateTasks, mix: FloatArray, used: FloatArray) -> FloatArray:
    """The mix that is trained on: the weight of used-up domains goes to the rest of their field."""
    gone = (tasks.repeats == 0) & (used >= 1)
    if not gone.any():
        return mix
    members = tasks.facts.fields
    rest = np.where(gone, 0.0, mix + 1e-9 * tasks.facts.natural)
    return rest * at_domains(members, of_fields(members, mix) / np.maximum(of_fields(members, rest), 1e-12))


def _levels(tasks: SurrogateTasks, weights: FloatArray, used: FloatArray, progress: float) -> FloatArray:
    """S of the module docstring for the delivered weights: (B, K)."""
    fresh = np.exp(-np.maximum(used - 1, 0) / tasks.repetition[:, None])
    spoiled = tasks.noise * (progress >= tasks.onset)[:, None]
    value = (1 - progress) * tasks.value + progress * tasks.late_value
    found = (value @ (weights * fresh * (1 - spoiled))[..., None])[..., 0]
    harm = tasks.harm * (weights * spoiled).sum(axis=-1, keepdims=True)
    again = (weights * np.maximum(used - HARMLESS_PASSES, 0)).sum(axis=-1, keepdims=True)
    return np.asarray(tasks.scale * np.log(tasks.kappa + found) + tasks.offset - harm - tasks.overfit * again)


def joined(parts: list[SurrogateTasks]) -> SurrogateTasks:
    """Tasks of the same number of decisions in one batch, in float32, their domains padded."""
    width = max(part.facts.prior.shape[-1] for part in parts)
    by_domain = {"prior", "natural", "fields", "influence", "error", "topics", "value", "late_value", "passes"}
    by_domain |= {"repeats", "noise"}

    def stacked(values: list[FloatArray], name: str) -> FloatArray:
        if name in by_domain:
            values = [np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - v.shape[-1])]) for v in values]
        return np.concatenate(values).astype(np.float32)

    facts = {e.name: stacked([getattr(p.facts, e.name) for p in parts], e.name) for e in fields(Facts)}
    rest = {
        e.name: stacked([getattr(p, e.name) for p in parts], e.name)
        for e in fields(SurrogateTasks)
        if e.name not in ("decisions", "facts", "kappa", "kinds")
    }
    kinds = tuple(kind for part in parts for kind in part.kinds)
    kappa: FloatArray = np.asarray(parts[0].kappa, dtype=np.float32)
    return SurrogateTasks(decisions=parts[0].decisions, facts=Facts(**facts), kinds=kinds, kappa=kappa, **rest)

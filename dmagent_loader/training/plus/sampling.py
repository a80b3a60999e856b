"""Random surrogate tasks: domains, pools, perturbations and schedules around real measurements.

Each task takes the true values and a measurement of one recorded environment, and rearranges the domains: as they are,
merged into a few, or cut into up to 200. Constants of `fitting.Fit` vary around their fitted values.

Shapes: D domains, K = 2 roles (keep, acquire), S draws, G groups of questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.agent.plus.observation import Facts
from dmagent_loader.mixture.domains import FIELDS, NUM_TOPICS, SOURCE, DomainSpace
from dmagent_loader.mixture.influence import Influence, grouped, scores_from
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.policies.influence import standardised, tilted
from dmagent_loader.policies.plus import influence_facts
from dmagent_loader.policies.question_topics import DEFAULT_TARGET_SHARE
from dmagent_loader.training.plus.calibration import Calibration
from dmagent_loader.training.plus.fitting import Fit, standardised_truth, values
from dmagent_loader.training.plus.surrogate import SurrogateTasks, joined

QUESTION_FIELDS = ("keep", "acquire")
STEPS_OF_RECORD = 80
"""Steps of the runs that the rate was fitted on."""
KINDS = ("none", "noise", "runs_out", "stale_probe", "noisy_questions", "bad_base")
KIND_SHARES = (0.4, 0.16, 0.12, 0.14, 0.1, 0.08)
MOST_DOMAINS = 200
PARTS_DIFFER = 0.4
"""Standard deviation of the value of a domain's part around the whole, in those among domains."""
NATURAL_PART = 0.1
"""Part of the natural mix in the mix that follows the topics of the questions, as in `QuestionTopics`."""


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """What tasks are drawn from.

    Args:
        calibration: Real measurements.
        constants: Fitted constants of the surrogate.
        rate: (K,), relaxation per step of the record.
        environments: Numbers of the environments to draw.
    """

    calibration: Calibration
    constants: Fit
    rate: FloatArray
    environments: Sequence[int]

    def batch(self, count: int, decisions: int, seed: int, *, kinds: Sequence[str] = KINDS) -> SurrogateTasks:
        """Random tasks of one number of decisions.

        Args:
            count: Number of tasks.
            decisions: Number of decisions.
            seed: Seed.
            kinds: Perturbations to draw from.
        """
        rng = np.random.default_rng([seed, decisions])
        shares = np.array([KIND_SHARES[KINDS.index(kind)] for kind in kinds])
        drawn = rng.choice(kinds, size=count, p=shares / shares.sum())
        return joined([self._task(rng, decisions, str(kind)) for kind in drawn])

    def _task(self, rng: np.random.Generator, decisions: int, kind: str) -> SurrogateTasks:
        record, constants = self.calibration, self.constants
        environment = int(rng.choice(self.environments))
        draw = int(rng.integers(record.values.shape[1]))
        present = np.flatnonzero(~np.isnan(record.truth[environment, 0]))
        z = standardised_truth(record)[environment]
        # Domains, their true values and their measurement
        weights = record.natural[environment, present]
        arrange = _arrangement(rng, present >= NUM_TOPICS, weights)
        natural = arrange.parts @ weights
        within = arrange.parts * weights / np.maximum(natural[:, None], 1e-12)
        sharpness = constants.sharpness * rng.lognormal(0, 0.25, 2)
        target_offset = np.array([constants.target_offset[0] + rng.normal(0, 0.7), 0.0])
        start = np.stack([values(z[k], sharpness[k], target_offset[k])[present] for k in (0, 1)])
        moved = rng.uniform(0.5, 1.0, (2, 1))
        late_z = moved * z + np.sqrt(1 - moved**2) * rng.normal(size=z.shape)
        late = np.stack([values(late_z[k], sharpness[k], target_offset[k])[present] for k in (0, 1)])
        jitter = arrange.differ * rng.normal(0, PARTS_DIFFER, (2, len(natural)))
        value, late_value = (v @ within.T * np.exp(sharpness[:, None] * jitter) for v in (start, late))
        found = _measurement(rng, record, environment, draw, present, within, arrange, jitter, kind)
        # Natural shares: half in each field, with some spread around those of the record
        natural = natural * rng.lognormal(0, rng.choice([0.0, 0.5]), len(natural))
        for members in (arrange.is_target, ~arrange.is_target):
            natural[members] *= 0.5 / natural[members].sum()
        topics = arrange.parts @ record.topics[environment, present]
        knows_topics = arrange.is_canonical and rng.random() < 0.6
        noise = np.zeros(len(natural))
        onset = 1.0
        space = _space(arrange.is_target)
        influence = influence_of(space, found.values, found.errors, found.groups)
        prior, base = _prior(space, natural, influence, topics if knows_topics else None)
        if kind == "noise":
            onset = float(rng.choice([0.0, 0.25, 0.35, 0.5]))
            likely = np.where(arrange.is_target, 0.0, prior)
            noise[rng.choice(len(natural), p=likely / likely.sum())] = 1.0
            if onset == 0:
                spoiled = noise > 0
                worst = found.values[:, ~arrange.is_target].min(axis=1) - rng.random(2) * found.values.std(axis=1)
                found.values[:, spoiled] = worst[:, None]
                found.groups[..., spoiled] = worst[:, None, None]
                influence = influence_of(space, found.values, found.errors, found.groups)
                prior, base = _prior(space, natural, influence, topics if knows_topics else None)
        facts = influence_facts(influence, space, natural, QUESTION_FIELDS, ([0], 1))
        # The run
        length = float(rng.uniform(0.5, 2.0))
        gain_share = 1 - np.exp(-STEPS_OF_RECORD * self.rate)
        scale = constants.scale[environment] / gain_share * rng.lognormal(0, 0.3, 2)
        offset = constants.offset[environment] / gain_share + scale * rng.normal(0, 0.15, 2)
        rate = self.rate * rng.lognormal(0, 0.2, 2) * STEPS_OF_RECORD * length / decisions
        if kind == "bad_base":
            offset = offset + scale * rng.uniform(0.5, 2.5, 2)
            rate = rate * rng.uniform(1.0, 2.0)
        feedback_noise = np.array([0.12, 0.06]) * scale * rng.lognormal(0, 0.3, 2)
        if kind == "noisy_questions":
            feedback_noise = feedback_noise * 4
        passes, repeats = _pools(rng, natural, arrange.is_target, kind)
        members = np.stack([~arrange.is_target, arrange.is_target]).astype(float)
        ratio = np.zeros(len(natural))
        if knows_topics:
            ratio = np.log(np.maximum(base, 1e-9) / natural)
        schedule, schedule_known = _schedule(rng, decisions)
        return SurrogateTasks(
            decisions=decisions,
            facts=Facts(
                prior=prior[None],
                natural=natural[None],
                fields=members[None],
                acquires=np.array([[0.0, 1.0]]),
                measured=np.ones(1),
                topics=ratio[None],
                topics_known=np.array([float(knows_topics)]),
                **{name: entry[None] for name, entry in facts.items()},
            ),
            value=value[None],
            late_value=late_value[None],
            kappa=constants.kappa,
            scale=scale[None],
            offset=offset[None],
            rate=rate[None],
            passes=passes[None],
            repeats=repeats[None],
            repetition=rng.lognormal(np.log(8), 0.5, 1),
            noise=noise[None],
            onset=np.array([onset]),
            harm=(scale * rng.uniform(0, 2, 2))[None],
            overfit=(rng.lognormal(np.log(0.05), 0.9) * rng.uniform(0.5, 1.5, 2))[None],
            feedback_noise=feedback_noise[None],
            learning_rate=schedule[None],
            learning_rate_known=np.array([float(schedule_known)]),
            progress_known=np.array([float(rng.random() < 0.85)]),
            balance=np.array([0.5 if rng.random() < 0.4 else rng.uniform(0.15, 0.85)]),
            kinds=(kind,),
        )


@dataclass(frozen=True, kw_only=True)
class _Arrangement:
    """Domains of a task as parts of those of the record.

    Args:
        parts: (D, domains of the record), share of each recorded domain in each domain; columns sum to 1.
        is_target: (D,).
        differ: (D,), 1 for a part of a recorded domain, 0 for a whole one or a union.
        is_canonical: Whether nothing was rearranged.
    """

    parts: FloatArray
    is_target: np.ndarray
    differ: FloatArray
    is_canonical: bool


def _arrangement(rng: np.random.Generator, is_target: np.ndarray, weights: FloatArray) -> _Arrangement:
    kind = rng.choice(["canonical", "merged", "split"], p=[0.4, 0.4, 0.2])
    count = len(is_target)
    if kind == "canonical":
        return _Arrangement(parts=np.eye(count), is_target=is_target, differ=np.zeros(count), is_canonical=True)
    rows, targets = [], []
    cuts = int(rng.integers(2, 5))
    for of_target in (False, True):
        members = np.flatnonzero(is_target == of_target)
        if kind == "merged":
            groups = int(min(len(members), np.exp(rng.uniform(0, np.log(20)))))
            owner = rng.permutation(
                np.concatenate([np.arange(groups), rng.integers(groups, size=len(members) - groups)])
            )
            blocks = [np.isin(np.arange(count), members[owner == group]).astype(float) for group in range(groups)]
        else:
            blocks = [
                share * (np.arange(count) == member)
                for member in members
                for share in rng.dirichlet(np.full(cuts, 3.0))
            ]
        rows += blocks
        targets += [of_target] * len(blocks)
    parts = np.array(rows)
    differ = np.full(len(rows), float(kind == "split"))
    return _Arrangement(parts=parts, is_target=np.array(targets), differ=differ, is_canonical=False)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    values: FloatArray
    errors: FloatArray
    groups: FloatArray


def _measurement(
    rng: np.random.Generator,
    record: Calibration,
    environment: int,
    draw: int,
    present: IntArray,
    within: FloatArray,
    arrange: _Arrangement,
    jitter: FloatArray,
    kind: str,
) -> _Measured:
    """A recorded measurement on the rearranged domains, with the faults of a perturbation."""
    at = (environment, draw)
    measured = record.values[at][:, present] @ within.T
    groups = record.groups[at][:, :, present] @ within.T
    over_questions = (groups.var(axis=1, ddof=1) / groups.shape[1]).mean(axis=-1, keepdims=True)
    single = np.maximum(record.errors[at][:, present] ** 2 - over_questions, 0.0) @ within.T
    # As many rows are read in all for few domains; every part of a cut domain gets the rows of a whole one.
    rows = np.minimum(1.0, len(within) / within.shape[1])
    noise = np.sqrt(single * rows)
    spread = record.values[at][:, present].std(axis=1, keepdims=True)
    change = arrange.differ * (spread * jitter + noise * rng.normal(size=noise.shape))
    if kind == "stale_probe":
        other = rng.permutation(measured.shape[1])
        kept = rng.uniform(0.3, 0.8)
        same = arrange.is_target[other] == arrange.is_target
        change = change + np.where(same, (1 - kept) * (measured[:, other] - measured), 0.0)
    if kind == "noisy_questions":
        extra = np.sqrt(groups.shape[1]) * groups.std(axis=1) * rng.normal(size=measured.shape)
        change = change + extra
        noise = np.sqrt(noise**2 + extra.var(axis=1, keepdims=True))
    values_ = measured + change
    return _Measured(values=values_, errors=np.sqrt(noise**2 + over_questions), groups=groups + change[:, None, :])


def _space(is_target: np.ndarray) -> DomainSpace:
    names = [f"{FIELDS[int(target)]}/{number}" for number, target in enumerate(is_target)]
    return DomainSpace.from_names(names)


def influence_of(space: DomainSpace, values: FloatArray, errors: FloatArray, groups: FloatArray) -> Influence:
    """A measurement on `QUESTION_FIELDS`.

    Args:
        space: Domains.
        values: (K, D).
        errors: (K, D), standard errors.
        groups: (K, G, D), influence on each group of questions.
    """
    return Influence(
        scores=scores_from(QUESTION_FIELDS, space.names, values, errors),
        way="gradient",
        by_questions=grouped(QUESTION_FIELDS, groups),
    )


def _prior(
    space: DomainSpace, natural: FloatArray, influence: Influence, topics: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Mix of the influence policy, and its base with the natural weight of each field: (D,) each."""
    mix, base = np.zeros(len(natural)), np.zeros(len(natural))
    for name in space.fields:
        members = list(space.members(name))
        shares = natural[members] / natural[members].sum()
        if topics is not None:
            followed = (1 - NATURAL_PART) * topics[members] + NATURAL_PART * natural[members]
            shares = followed / followed.sum()
        base[members] = shares * natural[members].sum()
        z = standardised(influence, [space.names[i] for i in members], np.ones(2))
        mass = 1 - DEFAULT_TARGET_SHARE if name == SOURCE else DEFAULT_TARGET_SHARE
        temperature = 0.5 if topics is None else 1.0
        mix[members] = mass * tilted(shares, z, temperature=temperature, most_boost=12.0)
    return mix / mix.sum(), base


def _pools(
    rng: np.random.Generator, natural: FloatArray, is_target: np.ndarray, kind: str
) -> tuple[FloatArray, FloatArray]:
    """Passes over each domain if the whole run were trained on it, and whether its rows repeat: (D,) each."""
    passes, repeats = np.zeros(len(natural)), np.ones(len(natural))
    for members, share, made in (
        (~is_target, 0.7, rng.uniform(0.02, 0.4)),
        (is_target, 0.3, rng.choice([0.02, 0.05, 0.1, 0.5, 2.0, 3.0, 4.0, 6.0, 8.0])),
    ):
        passes[members] = made / share / (natural[members] / natural[members].sum())
    if kind == "runs_out" and is_target.sum() > 1:
        largest = int(np.argmax(np.where(is_target, natural, -1.0)))
        passes[largest], repeats[largest] = 10.0, 0.0
    return passes, repeats


def _schedule(rng: np.random.Generator, decisions: int) -> tuple[FloatArray, bool]:
    """Learning rate of each step as a part of its maximum, and whether the policy knows it."""
    progress = (np.arange(decisions) + 0.5) / decisions
    kind = rng.choice(["constant", "linear", "cosine", "rewarm"])
    if kind == "linear":
        rates = 1 - 0.95 * progress
    elif kind == "cosine":
        rates = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress))
    elif kind == "rewarm":
        rates = np.minimum(1.0, progress / 0.1) * (1 - 0.9 * progress)
    else:
        rates = np.ones(decisions)
    return rates, bool(rng.random() < 0.3)

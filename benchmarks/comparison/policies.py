"""The policies that are compared, by name; baselines and ablations are policies as well."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from dmagent_loader.mixture.domains import FIELDS
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import Policy
from dmagent_loader.policies.choice import make_policy
from dmagent_loader.training.tasks.simulator import Start
from dmagent_loader.training.tasks.spec import TaskSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskContext:
    """What a policy is made from.

    Attributes:
        spec: The task; a policy may use its balance, nothing else.
        start: What is known before the first decision.
        stream: Number of the repetition.
        recorded: Function from the name of a policy and a stream to the mixes that it asked for there, (T, D).
        proxies: As many whole runs of the task with random constant mixes as the entry asks for: the mixes, (N, D), and
            the feedback at their ends, (N, K), in nats; None: it asks for none.
        ranges: (K,), attainable ranges, in nats.
    """

    spec: TaskSpec
    start: Start
    stream: int
    recorded: Callable[[str, int], FloatArray]
    proxies: tuple[FloatArray, FloatArray] | None
    ranges: FloatArray


Factory: TypeAlias = Callable[[TaskContext], FloatArray | Policy]
"""Makes a mix for all steps, (D,), a path, (T, D), or a policy."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A policy of the comparison.

    Args:
        make: Its factory.
        reads_feedback: Whether its mixes depend on feedback; if not, feedback is read at a few steps only.
        is_shuffled: Whether it receives influence permuted over the domains of each field (an ablation).
        is_frozen: Whether it is shown the first feedback at every step (an ablation).
        after: Policy whose recorded mixes it needs, on both streams of a pair.
        turn: Policies of a lower turn are run first, on all tasks.
        proxies: Runs with random constant mixes that it is fitted on.
    """

    make: Factory
    reads_feedback: bool = False
    is_shuffled: bool = False
    is_frozen: bool = False
    after: str | None = None
    turn: int = 0
    proxies: int = 0


def natural(share: float, context: TaskContext) -> FloatArray:
    """The natural mix with a share of the target field."""
    return context.start.at(share)


def uniform(context: TaskContext) -> FloatArray:
    """All domains of a field alike, 30% target."""
    return replace(context.start, natural=(context.start.natural > 0).astype(np.float64)).at(0.3)


def random_mix(rng: np.random.Generator, start: Start, least: float, most: float) -> FloatArray:
    """A constant mix: a target share between two bounds, and random weights around the natural ones."""
    around = start.at(float(rng.uniform(least, most)))
    mix = np.where(start.natural > 0, rng.dirichlet(len(around) ** 0.5 * around + 1e-3), 0.0)
    return np.asarray(mix / mix.sum(), dtype=np.float64)


def named(name: str, context: TaskContext) -> Policy:
    """A policy as `AgentWeightedSampler(policy=name)` makes it."""
    policy = make_policy(None, name, context.start.space, context.start.natural)
    assert policy is not None
    return policy


def agent(name: str, context: TaskContext, topics: str | None = None) -> Policy:
    """An agent as `AgentWeightedSampler(agent=name)` makes it."""
    policy = make_policy(name, None, context.start.space, context.start.natural, topics=topics)
    assert policy is not None
    return policy


def held(name: str, context: TaskContext) -> FloatArray:
    """The mean of the mixes of a policy on the same stream, held static."""
    mean = context.recorded(name, context.stream).mean(axis=0)
    return np.asarray(mean / mean.sum(), dtype=np.float64)


def reordered(name: str, order: str, context: TaskContext) -> FloatArray:
    """The mixes of a policy on the same stream, ``"reversed"`` or ``"shuffled"`` over the steps."""
    path = context.recorded(name, context.stream)
    if order == "reversed":
        return path[::-1]
    return np.asarray(np.random.default_rng([context.stream, 78]).permutation(path), dtype=np.float64)


def replayed(name: str, context: TaskContext) -> FloatArray:
    """The path of a policy on the other stream of the pair, whatever happens on this one."""
    return context.recorded(name, context.stream ^ 1)


def shuffled(influence: Influence, seed: int) -> Influence:
    """The same scores with their errors, permuted over the domains of each field of the data.

    Counts of rows and copies stay: they are of the data, not of the model.
    """
    domains = list(influence.domains)
    rng = np.random.default_rng([seed, 77])
    places = list(range(len(domains)))
    for field in FIELDS:
        members = [i for i, domain in enumerate(domains) if domain.startswith(f"{field}/")]
        for place, taken in zip(members, rng.permutation(members), strict=True):
            places[place] = int(taken)
    values, errors = influence.values()[:, places], influence.errors()[:, places]
    return Influence(
        scores=scores_from(influence.fields, domains, values, errors),
        way="shuffled",
        by_questions={
            name: np.array(by_group)[:, places].tolist() for name, by_group in influence.by_questions.items()
        },
        rows=influence.rows,
        copies=influence.copies,
        tokens=influence.tokens,
    )


def with_ablations(name: str, entry: Entry, *, influence: bool = True) -> dict[str, Entry]:
    """A policy and what shows where its gain comes from."""
    found = {name: entry}
    if influence:
        found[f"{name}, influence shuffled"] = replace(entry, is_shuffled=True, turn=entry.turn + entry.reads_feedback)
    if entry.reads_feedback:
        found[f"{name}, feedback frozen"] = replace(entry, is_frozen=True, turn=entry.turn + 1)
        found[f"{name}, replayed"] = Entry(make=functools.partial(replayed, name), after=name, turn=entry.turn + 1)
        found[f"{name}, mean static"] = Entry(make=functools.partial(held, name), after=name, turn=entry.turn + 1)
        for order in ("shuffled", "reversed"):
            found[f"{name}, order {order}"] = Entry(
                make=functools.partial(reordered, name, order), after=name, turn=entry.turn + 2
            )
    return found


SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)
REFERENCE = "natural 30%"
PRIOR = "influence"


def entries() -> dict[str, Entry]:
    """All policies by name, the most telling first."""
    return {
        REFERENCE: Entry(make=functools.partial(natural, 0.3)),
        **with_ablations(PRIOR, Entry(make=functools.partial(named, "influence"))),
        **with_ablations(
            "dmagent-rl",
            Entry(make=functools.partial(agent, "dmagent-rl"), reads_feedback=True, turn=1),
            influence=False,
        ),
        **{
            f"natural {share:.0%}": Entry(make=functools.partial(natural, share), turn=2)
            for share in SHARES
            if share != 0.3
        },
        "question-topics": Entry(make=functools.partial(named, "question-topics"), turn=3),
        "dmagent-rl, topics by influence": Entry(
            make=functools.partial(agent, "dmagent-rl", topics="influence"), reads_feedback=True, turn=3
        ),
        "uniform 30%": Entry(make=uniform, turn=3),
    }


def add_policies(parser: argparse.ArgumentParser, only: Sequence[str] | None, modules: Sequence[str]) -> None:
    """Adds the arguments that `compared` reads, with their defaults."""
    parser.add_argument("--policies", nargs="*", default=only, help="these policies alone")
    parser.add_argument("--also", nargs="*", default=modules, metavar="MODULE", help="modules with further policies")


def compared(modules: Sequence[str], only: Sequence[str] | None) -> Mapping[str, Entry]:
    """The package's policies, those of further modules (each with a function ``entries()``), or some of them."""
    found = entries()
    for name in modules:
        found |= importlib.import_module(name).entries()
    return found if only is None else {name: found[name] for name in only}

"""Published baselines in the comparison: ``--also benchmarks.comparison.baselines``.

RegMix and Olmix get 64 proxies of the user's own: whole runs of the same task with random constant mixes, the cost of
which no other policy has. They are told the weights of the reward.
"""

from __future__ import annotations

import functools

from benchmarks.comparison.policies import Entry, TaskContext
from dmagent_loader.policies import Olmix, OnlineDataMixing, Policy, ProxyTable, RegMix
from dmagent_loader.policies.baselines.regmix import Regressor
from dmagent_loader.training.tasks.spec import TaskSpec

PROXIES = 64


def online(context: TaskContext) -> Policy:
    """The bandit over domains."""
    return OnlineDataMixing(context.start.space, context.start.natural)


def regmix(regressor: Regressor, context: TaskContext) -> Policy:
    """The regression on proxies."""
    return RegMix(
        context.start.space,
        context.start.natural,
        table=_table(context),
        regressor=regressor,
        metrics=_weights(context),
    )


def olmix(context: TaskContext) -> Policy:
    """The log-linear law on proxies."""
    return Olmix(context.start.space, context.start.natural, table=_table(context), metrics=_weights(context))


def _table(context: TaskContext) -> ProxyTable:
    assert context.proxies is not None
    mixes, feedback = context.proxies
    spec: TaskSpec = context.spec
    return ProxyTable(
        domains=context.start.space.names,
        metrics=spec.fields,
        mixes=mixes,
        losses=-feedback,
        run_tokens=spec.steps * spec.tokens_per_step,
    )


def _weights(context: TaskContext) -> dict[str, float]:
    balance = context.spec.balance
    return {
        name: weight / float(attainable)
        for name, weight, attainable in zip(context.spec.fields, (1 - balance, balance), context.ranges, strict=True)
    }


def entries() -> dict[str, Entry]:
    """Baselines by name; those with proxies come last, because 64 runs are 64 runs."""
    return {
        "odm": Entry(make=online, turn=3),
        f"RegMix, log-linear, {PROXIES} proxies": Entry(
            make=functools.partial(regmix, "log-linear"), turn=4, proxies=PROXIES
        ),
        f"Olmix, {PROXIES} proxies": Entry(make=olmix, turn=4, proxies=PROXIES),
    }

"""`dmagent-plus` in the comparison, with its ablations: ``--also benchmarks.comparison.plus``."""

from __future__ import annotations

import functools

from benchmarks.comparison.policies import Entry, TaskContext, with_ablations
from dmagent_loader.policies.plus import PlusPolicy
from dmagent_loader.training.tasks.spec import learning_rate_factor


def plus(checkpoint: str, context: TaskContext) -> PlusPolicy:
    """An agent as users make it, told the balance, the number of decisions and the course of the learning rate."""
    spec, start = context.spec, context.start
    return PlusPolicy.from_pretrained(
        checkpoint,
        start.space,
        start.natural,
        balance=spec.balance,
        decisions=spec.steps,
        learning_rate=functools.partial(learning_rate_factor, spec.schedule),
    )


def entries() -> dict[str, Entry]:
    """The bundled agent; further trainings are added by their folders."""
    return with_ablations("dmagent-plus", Entry(make=functools.partial(plus, "dmagent-plus"), reads_feedback=True))

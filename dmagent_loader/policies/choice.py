"""Construction of a run's policy from the `agent`, `topics` and `policy` arguments."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.checkpoint import is_plus
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History, Standardization
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.agent import AgentPolicy
from dmagent_loader.policies.base import Policy
from dmagent_loader.policies.baselines import OnlineDataMixing, ReplayPolicy
from dmagent_loader.policies.combined import CombinedPolicy
from dmagent_loader.policies.fields import report_unknown_topics
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.policies.plus import PlusPolicy
from dmagent_loader.policies.question_topics import QuestionTopics
from dmagent_loader.policies.schedule import LinearSchedule, TwoPhaseSchedule
from dmagent_loader.policies.static import StaticPolicy

PolicyFactory: TypeAlias = Callable[[DomainSpace, FloatArray], Policy]
"""Function from the domains of a run and their natural shares, (D,), to its policy."""

_WITHOUT_FEEDBACK = (StaticPolicy, LinearSchedule, TwoPhaseSchedule, ReplayPolicy)
"""Policies that users give mixes by the names of domains, before the domains of the run are known."""

_NAMES = "'influence', 'question-topics', 'natural', 'uniform' or 'odm'"


def make_policy(
    agent: str | os.PathLike[str] | MixingAgent | None,
    policy: Policy | PolicyFactory | str | None,
    space: DomainSpace,
    natural: FloatArray,
    *,
    topics: Policy | PolicyFactory | str | None = None,
    roles: Mapping[str, str] | None = None,
    standardization: Standardization | None = None,
    balance: float | None = None,
    floor: float | None = None,
) -> Policy | None:
    """The policy of a run; None: mixes are only changed manually.

    Args:
        agent: Name, path or Hub id of a checkpoint, or a loaded agent.
        policy: Policy to use instead of an agent, its name (`named_policy`), or a function that makes it from the
            domains and their natural shares, such as a class of baselines with ``functools.partial`` for its settings.
        space: Domains of the run.
        natural: (D,), share of all rows in each domain.
        topics: Policy that sets the shares of the domains inside each field instead of the agent, in the same forms;
            only with an agent.
        roles: See `AgentPolicy`; only with an agent.
        standardization: See `AgentPolicy`; only with an agent.
        balance: See `PlusPolicy`; only with such an agent.
        floor: See `PlusPolicy`; only with such an agent.

    Raises:
        ConfigurationError: Both were given, one has the wrong type, or a setting would have no effect.
        DomainError, MixError: The mix of a static policy, a schedule or a recorded path does not fit the domains.
        CheckpointError: The agent cannot be loaded.
    """
    if agent is not None and policy is not None:
        raise ConfigurationError("both agent and policy were given, but only one can decide: leave one out")
    if agent is None and (roles is not None or standardization is not None):
        raise ConfigurationError(
            "roles and standardization are for an agent, but none was given, so they would have no effect: pass agent= "
            "or leave them out; a PlusPolicy as policy= takes roles= itself"
        )
    plus = agent if isinstance(agent, (str, os.PathLike)) and is_plus(agent) else None
    if plus is None and (balance is not None or floor is not None):
        raise ConfigurationError(
            "balance and floor are for agent='dmagent-plus', so they would have no effect: pass this agent, or leave "
            "them out and set the target share of a policy; a PlusPolicy as policy= takes balance= and floor= itself"
        )
    if agent is None and topics is not None:
        raise ConfigurationError(
            f"topics={shown(topics)} replaces an agent's choice of domains, but no agent was given, so it would have "
            "no effect: pass agent=, or pass this policy as policy="
        )
    if agent is None:
        return None if policy is None else _policy("policy", policy, space, natural)
    if not isinstance(agent, (str, os.PathLike, MixingAgent)):
        raise ConfigurationError(f"agent is {shown(agent)}; it must be a name, a path, a Hub id or a MixingAgent")
    if plus is not None:
        if topics is not None or standardization is not None:
            raise ConfigurationError(
                f"topics and standardization have no effect on agent {shown(agent)}, which chooses the domains itself "
                "and reads feedback in nats: leave them out"
            )
        return PlusPolicy.from_pretrained(plus, space, natural, roles=roles, balance=balance, floor=floor)
    within = None if topics is None else _policy("topics", topics, space, natural)
    loaded = agent if isinstance(agent, MixingAgent) else MixingAgent.from_pretrained(agent)
    decides = AgentPolicy(
        loaded, space, natural, roles=roles, standardization=standardization, only_fields=within is not None
    )
    if within is not None:
        return CombinedPolicy(decides, within, space)
    report_unknown_topics(f"agent {loaded.name!r}", space)
    return decides


def uses_topics(policy: Policy | None) -> bool:
    """Whether a policy of this package decides by the topics of the domains."""
    if isinstance(policy, CombinedPolicy):
        return uses_topics(policy.parts[1])
    return isinstance(policy, (AgentPolicy, QuestionTopics))


def named_policy(name: str, space: DomainSpace, natural: FloatArray) -> Policy:
    """A policy with its default settings.

    ``"natural"`` keeps the domains' shares of rows, and ``"uniform"`` equal shares. ``"odm"`` is `OnlineDataMixing`.
    The settings of ``"influence"`` are in `InfluencePolicy.configured`.

    Raises:
        ConfigurationError: There is no policy of that name.
    """
    if name == "question-topics":
        return QuestionTopics(space, natural)
    if name == "influence":
        return InfluencePolicy.configured(space, natural)
    if name == "natural":
        return StaticPolicy(natural, name=name)
    if name == "uniform":
        return StaticPolicy(np.full(len(space), 1 / len(space)), name=name)
    if name == "odm":
        return OnlineDataMixing(space, natural)
    raise ConfigurationError(
        f"there is no policy named {shown(name)}: choose {_NAMES}, pass a policy object, or pass an agent as agent="
    )


def _policy(argument: str, given: Policy | PolicyFactory | str, space: DomainSpace, natural: FloatArray) -> Policy:
    if isinstance(given, str):
        return named_policy(given, space, natural)
    made: object = given
    if callable(given) and (isinstance(given, type) or not hasattr(given, "propose")):
        try:
            inspect.signature(given).bind(space, natural)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{argument} is {shown(given)}, which cannot be called with the domains and their natural shares "
                f"({error}): pass a policy object, or functools.partial(...) with the other arguments"
            ) from error
        made = given(space, natural)
    if isinstance(made, type) or not callable(getattr(made, "propose", None)):
        raise ConfigurationError(
            f"{argument} is {shown(given)}; it must be {_NAMES}, an object with a method propose(history), or a "
            "function that makes one from the domains and their natural shares"
        )
    if type(made) in _WITHOUT_FEEDBACK:
        # At the first decision the guard would keep the initial mix, and it would stay for the whole run.
        start = History(domains=space.names, fields=("none",), mixes=natural[None], feedback=np.zeros((1, 1)))
        cast(Policy, made).propose(start)
    return cast(Policy, made)

"""The trained agent as a policy over a user's own domains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.agent.model import MixingAgent
from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, DomainMap, DomainSpace, Projection
from dmagent_loader.mixture.history import STANDARDIZATIONS, History, Standardization
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.static import Weights

logger = logging.getLogger(__name__)


class AgentPolicy:
    """Translates a run's history for the agent, and the agent's mix for the run (paper, D.6; compositions: extension).

    Past mixes p become pC over the canonical domains; the agent's mix a becomes the user mix w that minimises
    KL(a || wC). Nothing is retrained.

    Args:
        agent: Trained on the canonical domains.
        space: The run's domains, in both fields.
        natural: Natural share of each domain, from which the projection starts: the shares of rows, say. None: equal.
        roles: Name of the environment's field for each of the agent's roles, for example
            ``{"keep": "general", "acquire": "code"}``. None: the fields are in the order of the roles already.
        iterations: Steps of the projection; 1 is the Bayes split.
        standardization: None: as the checkpoint says.

    Raises:
        DomainError: The agent is not over the canonical domains, or the space lacks one of the two fields.
        ConfigurationError: Other roles than the agent's, or an unknown standardization.
    """

    always_answers = True

    def __init__(
        self,
        agent: MixingAgent,
        space: DomainSpace,
        natural: Weights | None = None,
        *,
        roles: Mapping[str, str] | None = None,
        iterations: int = 50,
        standardization: Standardization | None = None,
    ) -> None:
        if agent.config.domains != DomainSpace.canonical().names:
            raise DomainError(
                f"agent {agent.name!r} was trained on {agent.config.num_domains} domains of its own, not on the 52 "
                "canonical ones, so that no map to your domains exists: call agent.propose with its own domains"
            )
        if roles is not None and set(roles) != set(agent.config.feedback_roles):
            raise ConfigurationError(
                f"roles names {sorted(roles)}, but agent {agent.name!r} reads {sorted(agent.config.feedback_roles)}: "
                "give the name of one of the environment's fields for each"
            )
        if standardization is not None and standardization not in STANDARDIZATIONS:
            raise ConfigurationError(
                f"unknown standardization {standardization!r}; choose one of {', '.join(STANDARDIZATIONS)}"
            )
        shares = None if natural is None else space.mix(natural, renormalize=True)
        self.name = agent.name
        self.map = DomainMap(space, natural=shares, iterations=iterations)
        self._agent = agent
        self._roles = None if roles is None else dict(roles)
        self._standardization = standardization
        self._projection: Projection | None = None
        _say_what_is_unknown(space)
        logger.info(
            "agent %s: %d domains, feedback standardised as %r",
            agent.name,
            len(space),
            standardization or agent.config.standardization,
        )

    @property
    def projection(self) -> Projection | None:
        """What was lost in translating the latest proposal; None before the first."""
        return self._projection

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step.

        Raises:
            DomainError: The history is over other domains.
            ConfigurationError: The environment lacks the field of a role.
            FeedbackError: Feedback that is not finite.
        """
        if history.domains != self.map.space.names:
            raise DomainError(
                f"the history is over {list(history.domains)}, but this policy was built for "
                f"{list(self.map.space.names)}"
            )
        canonical = History(
            domains=self._agent.config.domains,
            fields=history.fields if self._roles is None else self._agent.config.feedback_roles,
            mixes=self.map.to_canonical(history.mixes),
            feedback=history.feedback[:, self._columns(history.fields)],
        )
        proposal = self._agent.propose(canonical, standardization=self._standardization)
        self._projection = self.map.to_user(proposal)
        return self._projection.mix

    def check_fields(self, fields: Sequence[str]) -> None:
        """Makes sure that feedback on these fields can be given to the agent, before anything is trained.

        Raises:
            ConfigurationError: They are not as many as the agent's roles, or lack one that `roles` names.
        """
        roles = self._agent.config.feedback_roles
        if self._roles is None and len(fields) != len(roles):
            raise ConfigurationError(
                f"the environment has {len(fields)} field(s) {list(fields)}, but agent {self.name!r} reads "
                f"{len(roles)}, one for each role {list(roles)}: name the field of each by "
                "AgentWeightedSampler(roles=...), or give the environment these fields"
            )
        self._columns(tuple(fields))

    def _columns(self, fields: tuple[str, ...]) -> list[int]:
        if self._roles is None:
            return list(np.arange(len(fields)))
        columns = []
        for role in self._agent.config.feedback_roles:
            field = self._roles[role]
            if field not in fields:
                raise ConfigurationError(
                    f"role {role!r} is to be read from field {field!r}, but the environment's fields are {list(fields)}"
                )
            columns.append(fields.index(field))
        return columns


def _say_what_is_unknown(space: DomainSpace) -> None:
    """A domain whose topics are not known counts as one that is spread over all 26 of them.

    Where no topic is known, the agent chooses between the fields, and rows decide within. Beside such a domain, one of
    a known topic is needed only for what exceeds an even spread, which may be nothing.
    """
    for field in space.fields:
        members = [domain for domain in space.domains if domain.field == field]
        unknown = [domain.name for domain in members if domain.topic is None and domain.composition is None]
        if not unknown or len(members) == 1:
            continue
        if len(unknown) == len(members):
            logger.info(
                "the topics of %s are not known: the agent chooses how much of the field %r comes, rows how it is "
                "split (compositions= tells their topics)",
                shown(unknown),
                field,
            )
            continue
        alike = {name: get_close_matches(name.rsplit("/", 1)[-1].title(), CANONICAL_TOPICS, 1) for name in unknown}
        meant = ", ".join(f"{name!r} for {found[0]!r}" for name, found in alike.items() if found)
        logger.warning(
            "the topics of %s are not known, those of other domains of the field %r are: what is not known counts as "
            "an even spread over all topics, and may leave the others without weight; tell the topics by "
            "compositions=, or name each domain after one of dmagent_loader.mixture.domains.CANONICAL_TOPICS%s",
            shown(unknown),
            field,
            f" (is {meant} meant?)" if meant else "",
        )

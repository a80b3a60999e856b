"""Policy that applies a trained agent to the user's own domains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from dmagent_loader.agent.model import MixingAgent
from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, DomainMap, DomainSpace, Projection
from dmagent_loader.mixture.history import STANDARDIZATIONS, History, Standardization
from dmagent_loader.mixture.simplex import FloatArray, total_variation
from dmagent_loader.policies.fields import report_roles, report_starved
from dmagent_loader.policies.static import Weights

logger = logging.getLogger(__name__)

_OTHER_TOPICS = 0.3
"""Limit of the total variation between the topics of two question sets.

It is 0.10 to 0.18 between parts of MMLU, and at least 0.34 between MMLU and the 22 other sets compared
(docs/influence-results.md).
"""

_OUT_OF_RANGE = 4.0
"""Range of the feedback, in standard deviations of the agent's training, beyond which the agent extrapolates."""


class AgentPolicy:
    """Maps a run's history to the agent's domains, and its mix to the run's (paper, D.6; compositions: extension).

    Past mixes p become pC over the canonical domains; the agent's mix a becomes the user mix w that minimises
    KL(a || wC). Nothing is retrained.

    Args:
        agent: Agent trained on the canonical domains.
        space: Domains of the run, in both fields.
        natural: Natural share of each domain, such as its share of rows; the projection starts from it. None: equal
            shares.
        roles: Role of the agent -> field of the environment, for example ``{"keep": "general", "acquire": "code"}``.
            None: the fields are in the order of the roles.
        iterations: Number of projection steps; 1 is the Bayes split.
        standardization: Mode of `mixture.history.standardize`; None: the checkpoint's mode.
        only_fields: Whether another policy splits the weight of each field, as in `CombinedPolicy`: then there is no
            warning of domains that the agent would starve.

    Raises:
        DomainError: The agent was not trained on the canonical domains, or the space lacks one of the two fields.
        ConfigurationError: The roles differ from the agent's, or the standardization is unknown.
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
        only_fields: bool = False,
    ) -> None:
        if agent.config.domains != DomainSpace.canonical().names:
            raise DomainError(
                f"agent {agent.name!r} was trained on {agent.config.num_domains} domains of its own, not on the 52 "
                "canonical ones, so it cannot be mapped to your domains: call agent.propose with its own domains"
            )
        if roles is not None and set(roles) != set(agent.config.feedback_roles):
            raise ConfigurationError(
                f"roles names {sorted(roles)}, but agent {agent.name!r} reads {sorted(agent.config.feedback_roles)}: "
                "give each of these the name of one of the environment's fields"
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
        self._only_fields = only_fields
        self._projection: Projection | None = None
        self._range_reported = False
        self._label = f"agent {agent.name!r}"
        self._checked_fields: tuple[str, ...] = ()
        logger.info(
            "agent %s: %d domains, feedback standardised as %r",
            agent.name,
            len(space),
            standardization or agent.config.standardization,
        )

    @property
    def projection(self) -> Projection | None:
        """Projection of the latest proposal onto the run's domains; None before the first."""
        return self._projection

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step.

        Raises:
            DomainError: The history has other domains.
            ConfigurationError: The environment lacks the field of a role.
            FeedbackError: A feedback value is not finite.
        """
        if history.domains != self.map.space.names:
            raise DomainError(
                f"the history has the domains {list(history.domains)}, but this policy was built for "
                f"{list(self.map.space.names)}"
            )
        self._report_range(history)
        canonical = History(
            domains=self._agent.config.domains,
            fields=history.fields if self._roles is None else self._agent.config.feedback_roles,
            mixes=self.map.to_canonical(history.mixes),
            feedback=history.feedback[:, self._columns(history.fields)],
        )
        proposal = self._agent.propose(canonical, standardization=self._standardization)
        is_first = self._projection is None
        self._projection = self.map.to_user(proposal)
        if is_first and self.map.natural is not None and not self._only_fields:
            report_starved(self._label, self.map.space, self._projection.mix, self.map.natural)
        return self._projection.mix

    def check_questions(self, questions: Mapping[str, Sequence[str]]) -> None:
        """Warns if the topics of the questions to keep differ from those of the agent's training questions.

        An agent learns which topics help its own questions. With questions on other topics it can do worse than a
        constant natural mix (docs/influence-results.md).

        Args:
            questions: Field of the environment -> texts of its questions and answers.
        """
        known = self._agent.config.keep_topics
        if known is None or not questions:
            return
        keep = list(questions)[self._columns(tuple(questions))[0]]
        shares = LinearClassifier.bundled().shares(questions[keep])
        distance = float(total_variation(shares, np.array(known)))
        if distance <= _OTHER_TOPICS:
            return
        most = [CANONICAL_TOPICS[i] for i in np.argsort(-shares)[:3]]
        logger.warning(
            "the questions of %r are mostly about %s: their topics differ by %.2f (total variation, at most %.2f for "
            "similar questions) from those of the training of agent %r, and with other questions it can do worse "
            "than a constant mix; use AgentWeightedSampler(policy='influence'), which measures what helps these "
            "questions",
            keep,
            ", ".join(most),
            distance,
            _OTHER_TOPICS,
            self.name,
        )

    def check_fields(self, fields: Sequence[str]) -> None:
        """Checks before training that the agent can use feedback on these fields, and logs the role of each.

        Raises:
            ConfigurationError: Their number differs from that of the agent's roles, or a field of `roles` is missing.
        """
        roles = self._agent.config.feedback_roles
        if self._roles is None and len(fields) != len(roles):
            raise ConfigurationError(
                f"the environment has {len(fields)} field(s) {list(fields)}, but agent {self.name!r} reads "
                f"{len(roles)}, one for each role {list(roles)}: map roles to fields with "
                "deciding=DecisionConfig(roles=...), or give the environment these fields"
            )
        columns = self._columns(tuple(fields))
        if tuple(fields) == self._checked_fields or len(roles) != 2:
            return
        self._checked_fields = tuple(fields)
        keep, acquire = (fields[column] for column in columns)
        exchanged = dict(zip(roles, (acquire, keep), strict=True))
        remedy = f"pass deciding=DecisionConfig(roles={exchanged})" if self._roles is None else None
        report_roles(self._label, keep, acquire, self.map.space, remedy=remedy)

    def _report_range(self, history: History) -> None:
        """Warns once if feedback has changed more during the run than in nearly all of the agent's training."""
        statistics = self._agent.config.statistics
        if self._range_reported or statistics is None or len(history.feedback) < 2:
            return
        columns = self._columns(history.fields)
        moved = (history.feedback[-1] - history.feedback[0])[columns] / np.array(statistics.std)
        furthest = int(np.argmax(np.abs(moved)))
        if abs(moved[furthest]) <= _OUT_OF_RANGE:
            return
        self._range_reported = True
        logger.warning(
            "the feedback of %r has moved by %.3g since the first step, which is %.1f standard deviations of the "
            "training feedback: agent %r has hardly seen such feedback and does not react to further changes; use "
            "AgentWeightedSampler(policy='influence'), which does not depend on this range",
            history.fields[columns[furthest]],
            moved[furthest] * statistics.std[furthest],
            abs(moved[furthest]),
            self.name,
        )

    def _columns(self, fields: tuple[str, ...]) -> list[int]:
        if self._roles is None:
            return list(np.arange(len(fields)))
        columns = []
        for role in self._agent.config.feedback_roles:
            field = self._roles[role]
            if field not in fields:
                raise ConfigurationError(
                    f"role {role!r} reads field {field!r}, but the environment's fields are {list(fields)}: name one "
                    "of them"
                )
            columns.append(fields.index(field))
        return columns

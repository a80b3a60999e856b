"""Policy that matches the topics of the training data to those of the questions, without measuring the model.

Let q_k be the topic shares of the questions of field k, from a text classifier. The weights inside each field of the
data are (1 - a) w + a natural, where w is the mix of the run's domains closest to q_k. The topics of the domains come
from their names or `compositions`; domains of unknown topics are weighted by their row counts.

Shapes: D domains, T = 26 topics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError, StateError
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, FIELDS, SOURCE, TARGET, DomainMap, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.fields import report_roles, report_unknown_topics
from dmagent_loader.policies.informed import LENGTH, QUESTIONS
from dmagent_loader.policies.passes import MOST_PASSES, PassLimit

DEFAULT_TARGET_SHARE = 0.3
"""Weight of the target field. Of the natural mixes in benchmarks/results/influence.jsonl, 10 to 30% target did best on
average in each environment."""


class QuestionTopics:
    """Proposes one mix for the whole run, from the topics of the environment's questions.

    The topics of the environment's first field, the one to keep, determine the mix of the ``source`` domains. The
    topics of its last field, the one to acquire, determine the mix of the ``target`` domains.

    Args:
        space: Domains of the run.
        natural: (D,), natural share of each domain, such as its share of rows; sums to 1.
        target_share: Weight of the target field.
        natural_part: a, fraction of each field that keeps its natural mix.
        most_passes: Maximum number of passes over the rows of a repeating domain in the whole run, if its length is
            known; None: no limit. See `policies.passes`.
        classifier: Topic classifier of the questions; None: the bundled one.
        name: See `policies.base.Policy`.

    Raises:
        DomainError: The fields of the domains are not ``source`` and ``target``.
        ConfigurationError: A share lies outside [0, 1].
    """

    always_answers = True
    needs = frozenset({LENGTH, QUESTIONS})

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        target_share: float = DEFAULT_TARGET_SHARE,
        natural_part: float = 0.1,
        most_passes: float | None = MOST_PASSES,
        classifier: LinearClassifier | None = None,
        name: str = "question-topics",
    ) -> None:
        for label, value in (("target_share", target_share), ("natural_part", natural_part)):
            if not is_finite_number(value) or not 0 <= value <= 1:
                raise ConfigurationError(f"{label} is {shown(value)}; it must lie between 0 and 1")
        self.name = name
        self.space = space
        self.natural = validate_mix(natural, space.names)
        self.map = DomainMap(space, natural=self.natural)
        self._target_share, self._natural_part = target_share, natural_part
        self._classifier = classifier
        self.passes = PassLimit(space, most_passes)
        self._topics: dict[str, FloatArray] = {}
        self._label = f"policy {name!r}"
        self._checked_fields: tuple[str, ...] = ()

    @property
    def topics(self) -> dict[str, dict[str, float]]:
        """Field of the data -> topic -> share of the questions; empty before `inform`."""
        return {
            name: {t: float(s) for t, s in zip(CANONICAL_TOPICS, shares, strict=True) if s > 0}
            for name, shares in self._topics.items()
        }

    def check_fields(self, fields: Sequence[str]) -> None:
        """Logs which field is kept and which acquired, and warns of unknown topics; see `policies.fields`."""
        if tuple(fields) != self._checked_fields:
            self._checked_fields = tuple(fields)
            report_unknown_topics(self._label, self.space)
            self.report_roles(fields)

    def report_roles(self, fields: Sequence[str]) -> None:
        """The part of `check_fields` about the environment."""
        if len(fields) > 1:
            remedy = "list the field to keep first and the field to acquire last"
            report_roles(self._label, fields[0], fields[-1], self.space, remedy=remedy)

    def needed(self, decision: int) -> frozenset[str]:
        """The questions, once, and the length of the run."""
        return self.passes.needed(decision) | (frozenset() if self._topics else frozenset({QUESTIONS}))

    def inform(self, need: str, evidence: Any) -> None:
        """Takes the questions (field of the environment -> texts) or the length of the run.

        Raises:
            PolicyError: There are no questions, or the evidence is of another kind.
        """
        if need == LENGTH:
            self.passes.inform(evidence)
            return
        if need != QUESTIONS or not evidence:
            raise PolicyError(
                f"policy {self.name!r} needs the environment's questions, but received {shown(need)}: "
                f"{shown(evidence)}; give the run an Environment"
            )
        classifier = self._classifier or LinearClassifier.bundled()
        listed = list(evidence.values())
        self._topics = {SOURCE: classifier.shares(listed[0]), TARGET: classifier.shares(listed[-1])}

    def within(self, *, natural_part: float | None = None) -> FloatArray:
        """Weights of the domains inside each field: (D,), sum to 1 in each field.

        Args:
            natural_part: Overrides the policy's own value; None: no override.

        Raises:
            PolicyError: The questions are not known yet.
        """
        if not self._topics:
            raise PolicyError(
                f"policy {self.name!r} does not know the questions yet: use DataMixingCallback or Mixing, or call "
                "inform('questions', {field: texts}) before the first decision"
            )
        part = self._natural_part if natural_part is None else natural_part
        canonical = np.concatenate([0.5 * self._topics[name] for name in FIELDS])
        matched = self.map.to_user(canonical).mix
        result = np.zeros(len(self.space))
        for name in FIELDS:
            members = list(self.space.members(name))
            result[members] = (1 - part) * _shares(matched[members]) + part * _shares(self.natural[members])
        return result

    def propose(self, history: History) -> FloatArray:
        """The mix; it changes only if the limit on passes does.

        Raises:
            DomainError: The history has other domains.
            PolicyError: The questions are not known yet.
        """
        return self.passes.limited(self.unlimited(history))

    def unlimited(self, history: History) -> FloatArray:
        """The mix before the limit on passes: (D,), sums to 1.

        Raises:
            DomainError: The history has other domains.
            PolicyError: The questions are not known yet.
        """
        if history.domains != self.space.names:
            raise DomainError(
                f"the history has the domains {shown(list(history.domains))}, but this policy was built for "
                f"{shown(list(self.space.names))}"
            )
        return self.with_target_share(self.within())

    def with_target_share(self, within: FloatArray) -> FloatArray:
        """Scales the weights inside the fields to a mix: (D,) -> (D,), sums to 1."""
        mix = np.array(within)
        for name, share in ((SOURCE, 1 - self._target_share), (TARGET, self._target_share)):
            mix[list(self.space.members(name))] *= share
        return np.asarray(mix / mix.sum(), dtype=np.float64)

    def state_dict(self) -> dict[str, Any]:
        """The topics of the questions, as JSON values."""
        return {"topics": {name: shares.tolist() for name, shares in self._topics.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`.

        Raises:
            StateError: The state is damaged or of another policy.
        """
        try:
            found = {name: validate_mix(state["topics"][name], CANONICAL_TOPICS) for name in state["topics"]}
        except (ConfigurationError, KeyError, TypeError) as error:
            raise StateError(
                f"the state of policy {self.name!r} cannot be read ({error}): it is damaged or of another policy; load "
                "an older one"
            ) from error
        if set(found) not in (set(), set(FIELDS)):
            raise StateError(
                f"the state of policy {self.name!r} has topics for {sorted(found)}: it is damaged; load an older one"
            )
        self._topics = found


def _shares(weights: FloatArray) -> FloatArray:
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))

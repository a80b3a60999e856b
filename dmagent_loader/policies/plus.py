"""Policy of `dmagent-plus`: the influence policy's mix, corrected by a small trained network.

The network (`agent.plus.network`) sees what the influence policy does not use: feedback, progress, passes over the
rows, the age and noise of the measurement, the effect of each field of the data on the other's questions, and the
user's balance. It works with any number of domains of any names.

Shapes: D domains, F fields of the data, K question fields, R = 2 roles (keep, acquire), T steps so far.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dmagent_loader._validation import is_count, is_finite_number, shown, whole_number
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.agent.plus.observation import AGE_UNIT, Facts, Memory, Moment, horizon_of
from dmagent_loader.errors import ConfigurationError, PolicyError, StateError
from dmagent_loader.mixture.domains import TARGET, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.fields import report_roles
from dmagent_loader.policies.influence import InfluencePolicy, comparable, shrunken
from dmagent_loader.policies.informed import INFLUENCE, LENGTH
from dmagent_loader.policies.passes import PassLimit

logger = logging.getLogger(__name__)

ROLES = ("keep", "acquire")
EVEN = 0.5
"""Balance at which the untrained network leaves the influence policy's mix unchanged."""
_FLOOR_START, _FLOOR_LIMITS = -1.0, (-4.0, 1.0)
"""First log odds of the balance with a floor, and their limits."""
_FLOOR_UP, _FLOOR_DOWN = 0.1, 0.5
"""Steps of the log odds at a decision, for one unit of slack above the floor and below it. Of the settings tried on
surrogate tasks of the validation environments, these end below the floor least often."""
_FLOOR_UNIT = 0.02
"""Least unit of slack, in nats."""
_SCHEDULE_POINTS = 101
"""Evenly spaced points of the run at which a schedule of the learning rate is checked."""
_ROUNDING = 1e-6
"""Distance from 0 and 1 at which a rate still lies between them."""
_LEAST_PEAK = 0.5
"""Maximum over these points below which a schedule cannot be in parts of its own maximum, however short the peak."""


class PlusPolicy:
    """Corrects the influence policy's mix at each decision; the untrained network returns that mix itself.

    If influence cannot be measured, the network decides nothing: the fallback of the influence policy stays, with the
    target share that the balance asks for.

    Args:
        network: The network.
        space: Domains of the run, of any fields; ``target`` is the field to learn from.
        natural: (D,), natural share of each domain, such as its share of rows; sums to 1.
        balance: Weight of the field to acquire in the objective, between 0 and 1; the rest is the weight of the field
            to keep. Both count as shares of what is attainable (docs/agent-plus.md).
        floor: Largest loss of the field to keep against the base model, in nats; None: no floor. The balance moves from
            decision to decision so that the averaged feedback stays above the floor, and as much is acquired as it
            allows. It is a controller, not a guarantee. Not together with `balance`.
        roles: ``{"keep": ..., "acquire": ...}``, fields of the environment. None: the last field is acquired, all
            others are kept. A single field is both.
        decisions: Number of decisions in the run. None: from the length of the run, if that is known.
        learning_rate: Learning rate as a part of its maximum, from 0 to 1, as a function of the part of the run that is
            done; None: unknown.
        prior: The policy whose mix is corrected; None: `InfluencePolicy.configured`.
        name: See `policies.base.Policy`.

    Raises:
        ConfigurationError: A setting is invalid.

    Example:
        >>> space = DomainSpace.from_names(["source/a", "source/b", "target/c"])
        >>> policy = PlusPolicy(PlusNetwork.untrained(), space, np.array([0.4, 0.4, 0.2]), balance=0.7)
        >>> sorted(policy.needs)
        ['influence', 'length', 'questions']
    """

    always_answers = True

    def __init__(
        self,
        network: PlusNetwork,
        space: DomainSpace,
        natural: FloatArray,
        *,
        balance: float | None = None,
        floor: float | None = None,
        roles: Mapping[str, str] | None = None,
        decisions: int | None = None,
        learning_rate: Callable[[float], float] | None = None,
        prior: InfluencePolicy | None = None,
        name: str = "dmagent-plus",
    ) -> None:
        if balance is not None and (not is_finite_number(balance) or not 0 <= balance <= 1):
            raise ConfigurationError(f"balance is {shown(balance)}; the weight of acquiring must lie between 0 and 1")
        if floor is not None and (not is_finite_number(floor) or floor < 0):
            raise ConfigurationError(f"floor is {shown(floor)}; the largest loss must be 0 nats or more")
        if balance is not None and floor is not None:
            raise ConfigurationError(
                f"balance={balance} and floor={floor} were given, but a floor moves the balance: leave one out"
            )
        if roles is not None and set(roles) != set(ROLES):
            raise ConfigurationError(
                f"roles names {sorted(roles)}; give a field of the environment for each of {ROLES}"
            )
        self.name = name
        self.prior = InfluencePolicy.configured(space, natural) if prior is None else prior
        self.needs = self.prior.needs | {LENGTH}
        self.space, self.natural = space, self.prior.natural
        self._network, self._untrained = network, PlusNetwork.untrained()
        self._balance, self._floor = balance, floor
        if (balance is not None or floor is not None) and not {TARGET} < set(space.fields):
            logger.warning(
                "policy %r has %s, but the data have no domains of %s, so their weight cannot change, and it only "
                "shifts the mix inside %s a little: leave it out, or add such domains",
                name,
                f"balance={balance}" if floor is None else f"floor={floor}",
                "the field 'target'" if TARGET not in space.fields else "a field other than 'target'",
                shown(list(space.fields)),
            )
        self._roles = None if roles is None else dict(roles)
        self._decisions = None if decisions is None else whole_number("decisions", decisions, least=1)
        self._learning_rate = _checked_schedule(learning_rate)
        self._members = np.array([[d.field == name for d in space.domains] for name in space.fields], dtype=np.float64)
        self._acquires = np.array([float(name == TARGET) for name in space.fields])
        self._decision = 0
        self._length_informed = -1
        """The decision for which the length of the run was given last."""
        self._measured_at: int | None = None
        self._checked_fields: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], space: DomainSpace, natural: FloatArray, **settings: Any
    ) -> PlusPolicy:
        """The policy of a checkpoint.

        Args:
            name_or_path: Name of a bundled checkpoint, directory or Hub id.
            space: See the class.
            natural: See the class.
            settings: Further arguments of the class.

        Raises:
            CheckpointError: The checkpoint cannot be loaded.
            ConfigurationError: A setting is invalid.
        """
        network, name = checkpoint.load(name_or_path)
        return cls(network, space, natural, **{"name": name, **settings})

    @property
    def passes(self) -> PassLimit:
        """Limit on the passes over the rows of a domain: that of the influence policy."""
        return self.prior.passes

    @property
    def influence(self) -> Influence | None:
        """Mean of all measurements so far; None before the first."""
        return self.prior.influence

    def check_fields(self, fields: Sequence[str]) -> None:
        """Checks the fields of the environment, and logs which are kept and which is acquired.

        Raises:
            ConfigurationError: `roles` names another field.
        """
        kept, acquired = self._columns(tuple(fields))
        self.prior.check_fields(fields)
        if len(fields) > 1 and tuple(fields) != self._checked_fields:
            self._checked_fields = tuple(fields)
            keep, acquire = fields[kept[0]], fields[acquired]
            exchanged = {"keep": acquire, "acquire": keep}
            remedy = None
            if self._roles is None:
                remedy = f"pass deciding=DecisionConfig(roles={exchanged}), or roles= to a PlusPolicy of your own"
            report_roles(f"policy {self.name!r}", keep, acquire, self.space, remedy=remedy)

    def needed(self, decision: int) -> frozenset[str]:
        """What the influence policy needs, and the length of the run."""
        self._decision = decision
        # An influence policy without a limit on passes does not ask for the length.
        return self.prior.needed(decision) | ({LENGTH} if self._length_informed != decision else frozenset())

    def inform(self, need: str, evidence: Any) -> None:
        """Takes evidence; see `InfluencePolicy.inform`.

        Raises:
            PolicyError: The evidence is of another kind.
            DomainError: The measurement lacks a domain of the run.
        """
        self.prior.inform(need, evidence)
        if need == LENGTH:
            self._length_informed = self._decision
        if need == INFLUENCE and evidence is not None:
            self._measured_at = self._decision

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step: (D,), sums to 1.

        Raises:
            DomainError: The history has other domains.
            PolicyError: There is no measurement yet.
            ConfigurationError: `roles` names a field that the environment does not have.
        """
        return self.passes.limited(self.unlimited(history))

    def unlimited(self, history: History) -> FloatArray:
        """The mix before the limit on passes: (D,), sums to 1; errors as in `propose`."""
        prior = self.prior.unlimited(history)
        columns = self._columns(history.fields)
        facts = self._facts(prior, history.fields, columns)
        # No training task lacks a measurement: without one, only the balance moves the influence policy's fallback.
        network = self._untrained if self.influence is None else self._network
        return network.mix(facts, self._moment(prior, history, columns))

    def state_dict(self) -> dict[str, Any]:
        """The state of the influence policy, and the decision before which the influence was measured last."""
        return {"prior": self.prior.state_dict(), "measured_at": self._measured_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`.

        Raises:
            StateError: The state is damaged or of another policy.
        """
        if not isinstance(state, Mapping) or not set(state) >= {"prior", "measured_at"}:
            raise StateError(
                f"the state of policy {self.name!r} is {shown(state)}: it is damaged or of another policy; load an "
                "older one"
            )
        measured_at = state["measured_at"]
        if measured_at is not None and not is_count(measured_at):
            raise StateError(
                f"the state of policy {self.name!r} has measured_at {shown(measured_at)}, not a count: it is damaged; "
                "load an older one"
            )
        self.prior.load_state_dict(state["prior"])
        self._measured_at = measured_at

    def balances(self, gains: FloatArray, horizon: float) -> float:
        """The balance of the next decision.

        Without a floor it is constant. With one, a clipped integral controller moves its log odds, up while the
        averaged feedback of the field to keep is above the floor and down while it is below.

        Args:
            gains: (T, R), feedback after each step against the base model.
            horizon: Decisions that the moving average reaches back.
        """
        if self._floor is None:
            return EVEN if self._balance is None else float(self._balance)
        odds, average = _FLOOR_START, 0.0
        unit = max(self._floor, _FLOOR_UNIT)
        for gain in gains[:, 0]:
            average += (float(gain) - average) / horizon
            slack = (average + self._floor) / unit
            odds += _FLOOR_UP * min(slack, 1.0) if slack > 0 else _FLOOR_DOWN * max(slack, -2.0)
            odds = min(max(odds, _FLOOR_LIMITS[0]), _FLOOR_LIMITS[1])
        return float(1 / (1 + np.exp(-odds)))

    def _columns(self, fields: tuple[str, ...]) -> tuple[list[int], int]:
        """Columns of the question fields that are kept, and of the one that is acquired."""
        if self._roles is None:
            acquired = len(fields) - 1
            return [k for k in range(len(fields)) if k != acquired] or [acquired], acquired
        missing = [name for name in self._roles.values() if name not in fields]
        if missing:
            raise ConfigurationError(
                f"roles names {missing}, but the environment's fields are {list(fields)}: name two of them"
            )
        return [fields.index(self._roles["keep"])], fields.index(self._roles["acquire"])

    def _facts(self, prior: FloatArray, fields: tuple[str, ...], columns: tuple[list[int], int]) -> Facts:
        measured = self.prior.influence
        base = self.prior.base()
        known = self.prior.uses_topics
        facts = influence_facts(measured, self.space, self.natural, fields, columns)
        ratio = np.zeros(len(prior))
        if known:
            for members in self._members.astype(bool) & (self.natural > 0) & (base > 0):
                within = base[members] / base[members].sum(), self.natural[members] / self.natural[members].sum()
                ratio[members] = np.log(within[0] / within[1])
        return Facts(
            prior=prior,
            natural=self.natural,
            fields=self._members,
            acquires=self._acquires,
            measured=np.array(float(measured is not None)),
            topics=ratio,
            topics_known=np.array(float(known)),
            **facts,
        )

    def _moment(self, prior: FloatArray, history: History, columns: tuple[list[int], int]) -> Moment:
        kept, acquired = columns
        changes = history.feedback[1:] - history.feedback[0]
        gains = np.stack([changes[:, kept].mean(axis=1), changes[:, acquired]], axis=1)
        done, total = len(gains), self._total_decisions(prior)
        horizon = horizon_of(total)
        memory = Memory.of(history.mixes[1:], gains, horizon)
        progress = 0.0 if total is None else min(1.0, done / total)
        since = done - (self._measured_at or 0)
        rate = None if self._learning_rate is None or total is None else float(self._learning_rate(progress))
        passes, final, left = self._passes(prior, memory)
        return Moment(
            exposure=memory.exposure,
            gains=memory.gains(),
            progress=np.array(progress),
            progress_known=np.array(float(total is not None)),
            age=np.array(since / (AGE_UNIT if total is None else total)),
            passes=passes,
            final_passes=final,
            rows_left=left,
            learning_rate=np.array(1.0 if rate is None else rate),
            learning_rate_known=np.array(float(rate is not None)),
            balance=np.array(self.balances(gains, horizon)),
        )

    def _total_decisions(self, prior: FloatArray) -> float | None:
        length = self.passes.length
        if self._decisions is not None or length is None or length.interval is None:
            return self._decisions
        samples = length.samples(prior)
        return None if samples is None else max(1.0, samples / length.interval)

    def _passes(self, prior: FloatArray, memory: Memory) -> tuple[FloatArray, FloatArray, FloatArray]:
        """`passes`, `final_passes` and `rows_left` of `Moment`."""
        zeros, ones = np.zeros(len(prior)), np.ones(len(prior))
        length = self.passes.length
        if length is None:
            return zeros, zeros, ones
        rows = np.maximum(length.rows, 1)
        samples = length.samples(prior)
        final = zeros if samples is None else samples * prior / rows
        if length.interval is None:
            return zeros, final, ones
        passes = memory.steps * length.interval * memory.exposure / rows
        left = np.where(length.repeats, 1.0, np.clip(1.0 - passes, 0.0, 1.0))
        return passes, final, left


def _checked_schedule(schedule: Callable[[float], float] | None) -> Callable[[float], float] | None:
    """A schedule of the learning rate, as passed by a user.

    At a decision it would be too late: a failing policy keeps the mix, and a rate in other units moves it unnoticed.

    Raises:
        ConfigurationError: It is no function, or its values are not parts of its maximum.
    """
    if schedule is None:
        return None
    remedy = "pass a function of the part of the run that is done, for example lambda progress: 1 - progress"
    if not callable(schedule):
        raise ConfigurationError(f"learning_rate is {shown(schedule)}; {remedy}")
    highest = 0.0
    for progress in np.linspace(0.0, 1.0, _SCHEDULE_POINTS).tolist():
        value = schedule(progress)
        try:
            rate = float(value)
        except (TypeError, ValueError):
            rate = float("nan")
        if not -_ROUNDING <= rate <= 1 + _ROUNDING:
            raise ConfigurationError(
                f"learning_rate returned {shown(value)} at {progress:g} of the run, but a part of the maximum lies "
                f"between 0 and 1: {remedy}"
            )
        highest = max(highest, rate)
    if highest < _LEAST_PEAK:
        raise ConfigurationError(
            f"learning_rate returns {highest:g} at most, but it is the part of the maximum, which is 1 at the peak: "
            "divide it by the peak learning rate"
        )
    return schedule


def influence_facts(
    influence: Influence | None,
    space: DomainSpace,
    natural: FloatArray,
    fields: tuple[str, ...],
    columns: tuple[list[int], int],
) -> dict[str, FloatArray]:
    """The entries of `Facts` that describe a measurement: ``influence``, ``error``, ``across`` and ``reliability``.

    Args:
        influence: Measurement over all domains with rows; None: unavailable, everything is 0.
        space: Domains of the run.
        natural: (D,), natural shares; a domain without rows was not measured.
        fields: The K question fields.
        columns: Columns of the question fields that are kept, and of the one that is acquired.

    Raises:
        PolicyError: A question field was not measured.
    """
    signal, error = np.zeros((2, len(space))), np.zeros((2, len(space)))
    across, reliability = np.zeros((2, len(space.fields))), np.zeros((2, len(space.fields)))
    result = {"influence": signal, "error": error, "across": across, "reliability": np.zeros(2)}
    if influence is None:
        return result
    if missing := [name for name in fields if name not in influence.fields]:
        raise PolicyError(
            f"the influence on {missing} was not measured, only that on {list(influence.fields)}: measure it with the "
            "environment that gives the feedback"
        )
    roles = [[fields[k] for k in columns[0]], [fields[columns[1]]]]
    rows = [[influence.fields.index(name) for name in names] for names in roles]
    ones = np.ones(len(influence.fields))
    members = [[i for i in space.members(name) if natural[i] > 0] for name in space.fields]
    everywhere = [i for listed in members for i in listed]
    values = influence.values([space.names[i] for i in everywhere])
    units = values.std(axis=1, keepdims=True)
    scaled = np.zeros((len(values), len(space)))
    scaled[:, everywhere] = np.divide(values, units, out=np.zeros_like(values), where=units > 0)
    for f, listed in enumerate(members):
        names = [space.names[i] for i in listed]
        if not names:
            continue
        shares = natural[listed] / natural[listed].sum()
        means = scaled[:, listed] @ shares
        across[:, f] = [means[k].mean() for k in rows]
        if len(names) < 2:
            continue
        gains, squared_errors = comparable(influence, names, ones)
        shrunk, scale = shrunken(gains, squared_errors)
        deviations = gains.std(axis=1, ddof=1)
        relative = np.full_like(gains, 2.0)
        np.divide(np.sqrt(squared_errors), deviations[:, None], out=relative, where=deviations[:, None] > 0)
        for role, listed_rows in enumerate(rows):
            signal[role, listed] = shrunk[listed_rows].sum(axis=0) / scale
            error[role, listed] = relative[listed_rows].mean(axis=0)
            reliability[role, f] = np.clip(1 - (relative[listed_rows] ** 2).mean(), 0, 1)
    across -= across.mean(axis=1, keepdims=True)
    result["reliability"] = reliability.mean(axis=1)
    return result

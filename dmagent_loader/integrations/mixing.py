"""The work of every integration between two training steps, independent of the trainer.

An integration knows its trainer: when a step ends, how many samples were consumed, where metrics and checkpoints go.
Everything else is here, so a run decides, logs, saves and ends in the same way with every trainer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.environment import Environment
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.integrations._evidence import Evaluate, Evidence, LossProbe, Measure, inform, texts
from dmagent_loader.integrations._passes import Passes
from dmagent_loader.policies import INFLUENCE, QUESTIONS, AgentPolicy, FieldPolicy, InformedPolicy, name_of
from dmagent_loader.sampler import AgentWeightedSampler, Decision

__all__ = ["Mixing", "Report"]

logger = logging.getLogger(__name__)

_POLICY_STATE = "policy_state"
"""Key of the policy's state in the state of a sampler."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The metrics of one decision.

    Attributes:
        short: Metrics for a console: ``env/<field>``, ``mix/<field>``, ``dmagent/staleness_samples``.
        full: All metrics: those in `short`, ``mix/<domain>`` (the new mix), ``achieved/<domain>`` (shares trained on
            since the last decision), ``epochs/<domain>`` (passes over its rows so far), ``rows_left/<domain>`` (rows
            not read yet), ``dmagent/policy_failures`` (steps of the run at which the last good mix was kept),
            ``dmagent/bad_rows`` (samples of the run whose row was bad and was replaced),
            ``dmagent/consumed_samples``, ``dmagent/decision_seconds``, ``dmagent/evaluation_seconds`` and
            ``dmagent/evaluation_share`` (share of the time since training began). If influence was measured for this
            decision: ``influence/<field>/<domain>``, ``dmagent/influence_seconds``, ``dmagent/influence_tokens``. If
            the loss on each domain was: ``loss/<domain>``, ``dmagent/losses_seconds``, ``dmagent/losses_tokens``. With
            an informed policy: ``dmagent/evidence_share`` (share of the time since training began).
        decision: The decision itself.
    """

    short: Mapping[str, float]
    full: Mapping[str, float]
    decision: Decision


class Mixing:
    """The sampler and the environment of one run, and the progress of its training.

    Args:
        sampler: Sampler that the trainer reads.
        environment: Question sets; None: no decisions, mixes change by `set_mix` only.

    Raises:
        ConfigurationError: An argument has the wrong type.
    """

    def __init__(self, sampler: AgentWeightedSampler, environment: Environment | None) -> None:
        if not isinstance(sampler, AgentWeightedSampler):
            raise ConfigurationError(f"sampler is {shown(sampler)}; it must be an AgentWeightedSampler")
        if environment is not None and not isinstance(environment, Environment):
            raise ConfigurationError(
                f"environment is {shown(environment)}; it must be an Environment, for example from "
                "Environment.from_files"
            )
        self.sampler, self.environment = sampler, environment
        self.consumed = 0
        """Samples that training has consumed over all ranks since the run began."""
        self._plan = sampler.plan
        """Plan of the sampler when it was last looked at; a sampler that loads a state gets another one."""
        self._passes = Passes(sampler)
        self._loss_probe = self._new_loss_probe()
        self._limit: int | None = None
        self._announced = self._ended = False
        self._started, self._evaluating_seconds, self._measuring_seconds = 0.0, 0.0, 0.0
        self.follow_sampler()

    def begin(self, *, samples: int | None = None) -> None:
        """Begins or resumes training: starts the clock, and warns of a policy or environment that has no effect.

        Args:
            samples: Samples, over all ranks since the run began, at which the loop stops, if the data last that long;
                None: unknown.

        Raises:
            ConfigurationError: The policy cannot decide on the fields of the environment.
        """
        self.follow_sampler()
        self._started, self._evaluating_seconds, self._measuring_seconds = time.perf_counter(), 0.0, 0.0
        self._announced = self._ended = False
        self._passes.begin(self.consumed)
        self._loss_probe = self._new_loss_probe()
        self.stop_at(samples)
        policy = self.sampler.policy
        has_policy = policy is not None
        if self.environment is not None and isinstance(policy, FieldPolicy):
            policy.check_fields(self.environment.fields)
        # A combined policy does not follow the agent's topics.
        if self.environment is not None and isinstance(policy, AgentPolicy):
            policy.check_questions(texts(self.environment))
        if has_policy and self.environment is None:
            logger.warning(
                "the sampler has a policy, but there is no environment, so it never decides: pass environment="
            )
        if self.environment is not None and not has_policy:
            logger.warning(
                "there is an environment, but the sampler has neither agent nor policy, so the mix never changes: pass "
                "agent= or policy= to the sampler"
            )

    def follow_sampler(self) -> None:
        """Continues after the samples that the sampler was trained on before, if they are more than `consumed`.

        The same sampler has then been used in this process, or has loaded the state of a run. If it has loaded one
        since it was last looked at, training continues there, even if that is earlier.
        """
        self._follow_loaded_state()
        consumed = self.sampler.consumed
        if consumed > self.consumed:
            end = self.sampler.end
            self.consumed = max(self.consumed, consumed if end is None else min(consumed, end))

    def _follow_loaded_state(self) -> None:
        """Continues where a state ends that was loaded into the sampler itself, instead of by `load_state_dict`."""
        if self.sampler.plan is not self._plan:
            self._plan, self.consumed = self.sampler.plan, self.sampler.consumed
            self._passes.begin(self.consumed)

    def warn_if_used(self) -> None:
        """Warns that training which begins now, without a checkpoint, continues an earlier one."""
        if self.consumed:
            logger.warning(
                "the sampler was trained on for %d samples before, and training continues after them, with their mixes "
                "and their feedback: for a new run or another model, build sampler and callback anew",
                self.consumed,
            )

    def stop_at(self, samples: int | None) -> None:
        """Reports the samples, over all ranks since the run began, at which the trainer stops; None: still unknown."""
        if samples is not None:
            self._limit = whole_number("samples", samples, least=1)
            self.sampler.bind(limit=self._limit)

    def announce(self) -> None:
        """Logs, once, how many decisions the run will have and what ends it; after the first decision, if there is one.

        Integrations call it when they have reported the loader. In a loop of your own, `due` does.
        """
        if self._announced:
            return
        self._announced = True
        if self.sampler.measurements:
            self.sampler.begin_decisions()
        self._passes.forecast(self._limit)

    def due(self) -> bool:
        """Whether an evaluation is due; the same on all ranks."""
        self._follow_loaded_state()
        decides = self.environment is not None and self.sampler.policy is not None
        if (self.sampler.measurements or not decides) and not self.sampler.loader.by_trainer:
            self.announce()
        due = self.sampler.reweight_due(self.consumed)  # also records where a new pass of data workers begins
        return due and decides

    def reweight(self, evaluate: Evaluate, *, measure: Measure | None = None) -> Report:
        """Evaluates the model and lets the policy decide. All ranks call it together.

        Args:
            evaluate: Function from an `Environment`, or a `RowEnvironment` for policies that need losses, to the
                feedback of the trainer's model: ``lambda environment: environment.evaluate(model)``.
            measure: Function from environment, rows by domain and settings to the influence of the domains on the
                trainer's model, for policies that need it: ``lambda environment, rows, settings:
                environment.influence(model, rows, optimizer=optimizer, **settings)``. None: such policies decide
                without influence.
        """
        assert self.environment is not None
        before = self.sampler.measurements
        since = before[-1].consumed if before else 0
        started = time.perf_counter()
        feedback = evaluate(self.environment)
        seconds = time.perf_counter() - started
        self._evaluating_seconds += seconds
        policy, evidence = self.sampler.policy, Evidence()
        if isinstance(policy, InformedPolicy):
            started = time.perf_counter()
            evidence = inform(policy, self.sampler, self.environment, evaluate, measure, self._loss_probe)
            self._measuring_seconds += time.perf_counter() - started
        decision = self.sampler.reweight(feedback, consumed=self.consumed)
        elapsed = time.perf_counter() - self._started
        space = self.sampler.space
        short = {f"env/{field}": float(value) for field, value in feedback.items()}
        masses = space.field_mass(space.mix(decision.proposed, renormalize=True))
        short |= {f"mix/{field}": mass for field, mass in masses.items()}
        short["dmagent/staleness_samples"] = float(decision.staleness)
        full = dict(short)
        full |= {f"mix/{domain}": weight for domain, weight in decision.proposed.items()}
        if self.consumed > since:
            counts = self.sampler.achieved(since, self.consumed)
            full |= {f"achieved/{domain}": count / (self.consumed - since) for domain, count in counts.items()}
        self._passes.warn(self.consumed)
        full |= self._passes.metrics(self.consumed)
        full |= {
            "dmagent/policy_failures": float(decision.failures),
            "dmagent/bad_rows": float(sum(self.sampler.bad_rows.values())),
            "dmagent/consumed_samples": float(self.consumed),
            "dmagent/decision_seconds": decision.seconds,
            "dmagent/evaluation_seconds": seconds,
            "dmagent/evaluation_share": self._evaluating_seconds / elapsed if elapsed > 0 else 0.0,
        }
        if isinstance(policy, InformedPolicy):
            full["dmagent/evidence_share"] = self._measuring_seconds / elapsed if elapsed > 0 else 0.0
        if evidence.influence is not None:
            full |= {
                f"influence/{field}/{domain}": score.value
                for field, scores in evidence.influence.scores.items()
                for domain, score in scores.items()
            }
            full["dmagent/influence_seconds"] = evidence.influence.seconds
            full["dmagent/influence_tokens"] = float(evidence.influence.tokens)
        if evidence.losses is not None:
            full |= {f"loss/{domain}": loss for domain, loss in evidence.losses.by_domain.items()}
            full["dmagent/losses_seconds"] = evidence.losses.seconds
            full["dmagent/losses_tokens"] = float(evidence.losses.tokens)
        return Report(short=short, full=full, decision=decision)

    def _new_loss_probe(self) -> LossProbe:
        return LossProbe(self.sampler, None if self.environment is None else self.environment.settings)

    def finished(self) -> bool:
        """Whether the data are used up; if so, `consumed` is cut to the end of the data."""
        if not self.sampler.finished(self.consumed):
            return False
        self.consumed = self.sampler.end or self.consumed
        self.end()
        return True

    def end(self) -> None:
        """Logs, once, what is left of the data and how often each domain was read. `finished` calls it."""
        if not self._ended:
            self._ended = True
            self._passes.end(self.consumed)

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the trainer's checkpoint."""
        self._follow_loaded_state()
        return {
            "sampler": self.sampler.state_dict(consumed=self.consumed),
            "environment": None if self.environment is None else self.environment.fingerprint,
        }

    def load_state_dict(self, state: Any) -> None:
        """Resumes from a saved state.

        Args:
            state: Return value of `state_dict`.

        Raises:
            StateError: The state cannot be read, or belongs to other shards or another seed.
        """
        with distributed.together("reading the checkpoint's state"):
            try:
                restored, questions = state["sampler"], state["environment"]
                consumed = int(restored["consumed"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise StateError(
                    f"the saved state of the mixing cannot be read ({error!r}): pass the return value of state_dict() "
                    "of Mixing or DataMixingCallback, not that of the sampler alone"
                ) from error
        self.sampler.load_state_dict(self._without_former_questions(restored, questions))
        self._plan, self.consumed = self.sampler.plan, consumed
        self._passes.begin(consumed)
        self.compare_environment(questions)

    def _without_former_questions(self, restored: Any, saved: str | None) -> Any:
        """The sampler's state, without evidence about other questions than those of the environment.

        Args:
            restored: The saved state of the sampler.
            saved: Fingerprint of the environment in the checkpoint.
        """
        policy = self.sampler.policy
        if self.environment is None or saved in (None, self.environment.fingerprint) or _POLICY_STATE not in restored:
            return restored
        if not isinstance(policy, InformedPolicy) or not policy.needs & {INFLUENCE, QUESTIONS}:
            return restored
        logger.warning(
            "the evidence of policy %r is about the questions before the checkpoint: it is collected again before the "
            "next decision",
            name_of(policy),
        )
        return {name: value for name, value in restored.items() if name != _POLICY_STATE}

    def compare_environment(self, saved: str | None) -> None:
        """Warns if feedback before and after a checkpoint cannot be compared.

        Args:
            saved: Fingerprint of the environment in the checkpoint; None: there was no environment.
        """
        present = None if self.environment is None else self.environment.fingerprint
        if saved != present:
            logger.warning(
                "the environment's questions or settings differ from those before the checkpoint: feedback before "
                "and after it cannot be compared"
            )

"""The interval between two decisions: given by the user, or derived once from the length of the run."""

from __future__ import annotations

import logging

from dmagent_loader._validation import whole_number
from dmagent_loader.errors import ConfigurationError

logger = logging.getLogger(__name__)

DEFAULT_DECISIONS = 80
"""Decisions of a run, as in the paper."""
FALLBACK_INTERVAL = 64_000
"""Samples between two decisions of a run of unknown length, as in the paper."""
FEW_DECISIONS = 5
"""A run with fewer decisions is warned of, unless they were asked for."""


class Cadence:
    """When decisions are due: before the first sample, then once in each interval, at the end of a step.

    Args:
        decisions: Number of decisions in the run; None: 80, unless `samples_per_reweight` is given.
        samples_per_reweight: Samples, over all ranks, between two decisions; None: derived from `decisions`.

    Raises:
        ConfigurationError: Both were given, or one is not a whole number of 1 or more.

    Attributes:
        interval: Samples, over all ranks, between two decisions; None: not derived yet.
    """

    def __init__(self, decisions: int | None, samples_per_reweight: int | None) -> None:
        if decisions is not None and samples_per_reweight is not None:
            raise ConfigurationError(
                f"decisions={decisions} and samples_per_reweight={samples_per_reweight} both set the interval between "
                "decisions: leave one out"
            )
        self._asked = None if decisions is None else whole_number("decisions", decisions, least=1)
        self._wanted = self._asked or DEFAULT_DECISIONS
        self.interval: int | None = None
        if samples_per_reweight is not None:
            self.interval = whole_number("samples_per_reweight", samples_per_reweight, least=1)
        self.is_derived = self.interval is None
        self._is_restored = False

    def due(self, previous: int, consumed: int) -> bool:
        """Whether a decision is due, whatever the sizes of the steps.

        Args:
            previous: Consumed samples at the last decision.
            consumed: Consumed samples now.
        """
        assert self.interval is not None
        return consumed >= (previous // self.interval + 1) * self.interval

    def planned(self, total: int) -> int:
        """Most decisions of a run: the same number before and after the interval is derived.

        Args:
            total: Samples of the whole run over all ranks.
        """
        if self.is_derived:
            return self._wanted
        assert self.interval is not None
        return max(1, -(-total // self.interval))

    def restore(self, interval: int | None) -> None:
        """Takes over the interval of a saved run, unless the user has set one."""
        if self.is_derived:
            self.interval, self._is_restored = interval, interval is not None

    def forget(self) -> None:
        """Lets the next `begin` derive the interval anew, unless it was given or restored."""
        if self.is_derived and not self._is_restored:
            self.interval = None

    def begin(self, total: int | None, step: int) -> None:
        """Derives the interval, if it is not known yet, and logs how many decisions the run will have.

        A derived interval is a whole number of steps, so the decisions are evenly spaced, and not more than asked for.

        Args:
            total: Samples of the whole run over all ranks; None: unknown.
            step: Samples of one step over all ranks.
        """
        if total is None:
            self._begin_without_end()
            return
        spread = -(-max(1, -(-total // step)) // self._wanted) * step
        interval = self.interval = self.interval or spread
        count = max(1, -(-total // interval))
        if self._is_restored:
            # If the mix decides when the data end, the length of a run differs from start to start. That alone is no
            # reason to warn of a run that makes as many decisions as were asked for.
            is_ignored = self._asked not in (None, count) and interval != spread
            logger.log(
                logging.WARNING if is_ignored else logging.INFO,
                "the saved run decides after every %d samples, and this run keeps that interval: %d decisions in %d "
                "samples%s",
                interval,
                count,
                total,
                f"; decisions={self._asked} has no effect, pass samples_per_reweight={spread} instead"
                if is_ignored
                else "",
            )
        elif count < FEW_DECISIONS and count != self._asked:
            logger.warning(
                "only %d decision(s) in this run of %d samples, one after every %d samples: the mix stays nearly as it "
                "is; %s",
                count,
                total,
                interval,
                f"the run has only {-(-total // step)} steps of {step} samples, so train for longer"
                if self.is_derived
                else f"pass decisions={DEFAULT_DECISIONS} to the sampler in place of samples_per_reweight",
            )
        else:
            logger.info(
                "%d decisions in this run of %d samples: one before the first sample, then one after every %d samples "
                "(%d steps)",
                count,
                total,
                interval,
                max(1, interval // step),
            )

    def _begin_without_end(self) -> None:
        """`begin` for a run of unknown length."""
        if self.interval is not None:
            logger.info("one decision after every %d samples, in a run of unknown length", self.interval)
            return
        self.interval = FALLBACK_INTERVAL
        logger.warning(
            "the length of this run is unknown, so its %d decisions cannot be spread over it: one decision follows "
            "after every %d samples instead; limit the run (max_steps of the trainer, or samples= of Mixing.begin), or "
            "pass samples_per_reweight= to the sampler",
            self._wanted,
            self.interval,
        )

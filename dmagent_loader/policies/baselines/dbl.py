"""Dynamic batch loading (DBL) of Sheared LLaMA, arXiv 2310.06694, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.baselines.losses import LossPolicy, by_domain


class DynamicBatchLoading(LossPolicy):
    """Raises the weight of domains whose loss exceeds a reference loss.

        excess_d = max(loss_d - reference_d, 0)
        w_d     <- w_d exp(eta excess_d), normalised
        w       <- (1 - smoothing) w + smoothing / D

    The first two lines are Algorithm 1 of arXiv 2310.06694, with eta = 1; the authors' code
    (github.com/princeton-nlp/LLM-Shearing) lets the excess be negative. The smoothing is that of DoReMi (arXiv
    2305.10429), which that code uses as well; it keeps a weight from vanishing for good.

    For continual pre-training, the Data Mixing Agent paper (arXiv 2507.15640, D.2) takes as reference the loss of the
    base model on source domains and that of a model trained on the target data alone on target domains.

    Args:
        space: Domains of the run.
        natural: (D,), natural share of each domain, the mix of the first decision.
        reference: Domain -> reference loss in nats per token. A domain left out gets the loss of the base model,
            measured before the first decision: its weight only rises while the model is worse on it than that.
        eta: Step size.
        smoothing: Part of the mix that is uniform.
        initial: Mix of the first decision: domain -> weight, or field -> weight; None: `natural`.
        proxy_tokens: Tokens that the reference models were trained on, for the account of costs; None: unknown.
        name: See `policies.base.Policy`.

    Attributes:
        proxy_tokens: As given.

    Raises:
        ConfigurationError: A setting is invalid.
        DomainError: `reference` names another domain.
    """

    always_answers = True

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        reference: Mapping[str, float],
        eta: float = 1.0,
        smoothing: float = 1e-4,
        initial: Mapping[str, float] | None = None,
        proxy_tokens: int | None = None,
        name: str = "dbl",
    ) -> None:
        super().__init__(space, natural, initial=initial, name=name)
        if not is_finite_number(eta) or eta <= 0:
            raise ConfigurationError(f"eta is {shown(eta)}; it must be a positive number")
        if not is_finite_number(smoothing) or not 0 <= smoothing < 1:
            raise ConfigurationError(f"smoothing is {shown(smoothing)}; it must be at least 0 and less than 1")
        self.proxy_tokens = None if proxy_tokens is None else whole_number("proxy_tokens", proxy_tokens, least=0)
        self._reference = by_domain("reference", reference, space)
        self._eta, self._smoothing = eta, smoothing

    def updated(self, losses: FloatArray) -> FloatArray:
        """See `LossPolicy.updated`."""
        assert self.base_losses is not None
        reference = np.where(np.isnan(self._reference), self.base_losses, self._reference)
        excess = np.maximum(losses - reference, 0.0)
        weights = self.mix * np.exp(self._eta * (excess - excess.max()))
        smoothed = (1 - self._smoothing) * weights / weights.sum() + self._smoothing / len(weights)
        return np.asarray(smoothed, dtype=np.float64)

"""Arithmetic on distributions: validation, distances, rounding to integers, projection through a domain map.

Shapes: D domains, U user domains, C canonical domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dmagent_loader._validation import shown
from dmagent_loader.errors import DomainError, MixError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SUM_TOLERANCE = 1e-6
"""Largest accepted difference between the sum of a mix and 1; an accepted mix is divided by its sum."""

_LARGEST_SUMMED = 1e290
"""Largest weight up to which weights are summed as they are: the sum of larger ones may be no finite number."""


def validate_mix(
    weights: Mapping[str, float] | Sequence[float] | FloatArray,
    names: Sequence[str],
    *,
    renormalize: bool = False,
) -> FloatArray:
    """Turns weights into a mix: a float64 vector over `names` that sums to 1.

    Args:
        weights: A mapping from domain name to weight (names left out get 0), or D numbers in the order of `names`.
        names: The D domains.
        renormalize: Divide by the sum, whatever it is, instead of refusing a sum other than 1.

    Returns:
        (D,), non-negative, sums to 1.

    Raises:
        DomainError: A name in the mapping is not a domain.
        MixError: Wrong length, negative or non-finite weights, or a sum that is not 1.

    Example:
        >>> validate_mix({"source/web": 0.25, "target/math": 0.75}, ["source/web", "target/math"]).tolist()
        [0.25, 0.75]
    """
    if isinstance(weights, Mapping):
        known = set(names)
        if not weights.keys() <= known:
            unknown = [name for name in weights if name not in known]
            raise DomainError(f"the mix names unknown domains {_shorten(unknown)}; the domains are {_shorten(names)}")
        mix = numbers([weights.get(name, 0.0) for name in names])
    else:
        mix = numbers(weights)
        if mix.shape != (len(names),):
            raise MixError(
                f"the mix has shape {mix.shape}, but there are {len(names)} domains: give one weight for each"
            )
    least, most = float(mix.min(initial=0.0)), float(mix.max(initial=0.0))
    if not (least >= 0 and most < np.inf):
        if (bad := ~np.isfinite(mix)).any():
            raise MixError(f"the mix is not finite on {_named(names, mix, bad)}: every weight must be a finite number")
        raise MixError(f"the mix is negative on {_named(names, mix, mix < 0)}: weights must be 0 or more")
    if renormalize and most > _LARGEST_SUMMED:
        mix = mix / most
        most = 1.0
    total = float(mix.sum()) if most <= _LARGEST_SUMMED else most
    if total <= 0:
        raise MixError(f"all {len(names)} weights are 0: at least one domain needs a positive weight")
    if not renormalize and abs(total - 1.0) > SUM_TOLERANCE:
        raise MixError(
            f"the mix sums to {total:.6g} over {len(names)} domains, not to 1: divide the weights by their sum "
            "(set_mix does with renormalize=True)"
        )
    return mix / total


def numbers(weights: object) -> FloatArray:
    """Weights as floats: (n,).

    Raises:
        MixError: They are not a flat list of numbers, or too large for a float.
    """
    if isinstance(weights, (str, bytes)):
        raise MixError(f"the mix is {shown(weights)}: give a weight for each domain")
    try:
        values = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MixError(
            f"the mix is {shown(weights)}, not a list of numbers ({error}): give one number for each domain"
        ) from error
    if values.ndim != 1:
        raise MixError(f"the mix has shape {values.shape}: give one weight for each domain")
    return values


def largest_remainder(mix: FloatArray, total: int) -> IntArray:
    """Integers proportional to a mix that sum exactly to `total` (Hamilton's method).

    A weight of exactly 0 stays 0, and a positive weight never becomes 0 while a larger one can spare a unit.

    Args:
        mix: (D,), sums to 1.
        total: The sum of the result; at least the number of positive weights.

    Returns:
        (D,) int64, sums to `total`.
    """
    exact = mix * total
    counts = exact.astype(np.int64)
    missing = total - int(counts.sum())
    if missing > 0:
        order = np.where(mix > 0, counts - exact, np.inf).argsort(kind="stable")
        counts[order[:missing]] += 1
    elif missing < 0:
        counts[(-counts).argsort(kind="stable")[:-missing]] -= 1
    if np.count_nonzero(counts) < len(counts):
        for index in ((counts == 0) & (mix > 0)).nonzero()[0]:
            counts[counts.argmax()] -= 1
            counts[index] = 1
    return counts


def kl_divergence(p: FloatArray, q: FloatArray) -> float:
    """KL(p || q) in nats; infinite where q is 0 and p is not."""
    support = p > 0
    if (q[support] <= 0).any():
        return float("inf")
    return float(np.sum(p[support] * (np.log(p[support]) - np.log(q[support]))))


def js_divergence(p: FloatArray, q: FloatArray) -> FloatArray:
    """Jensen-Shannon divergence in nats along the last axis, finite even where one of the two is 0.

    Args:
        p: (..., D).
        q: (..., D), broadcast against `p`.

    Returns:
        (...), between 0 and log 2.
    """
    middle = 0.5 * (p + q)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * (np.log(p) - np.log(middle)), 0.0)
        right = np.where(q > 0, q * (np.log(q) - np.log(middle)), 0.0)
    return np.asarray(0.5 * (left.sum(axis=-1) + right.sum(axis=-1)), dtype=np.float64)


def total_variation(p: FloatArray, q: FloatArray) -> FloatArray:
    """Total variation distance along the last axis: half the L1 distance, between 0 and 1."""
    return np.asarray(0.5 * np.abs(p - q).sum(axis=-1), dtype=np.float64)


def effective_domains(mix: FloatArray) -> float:
    """exp(entropy): the number of equally weighted domains that would be as spread out as this mix."""
    support = mix[mix > 0]
    return float(np.exp(-np.sum(support * np.log(support))))


def em_projection(composition: FloatArray, target: FloatArray, start: FloatArray, iterations: int = 50) -> FloatArray:
    """The user mix w that minimises KL(a || wC), by expectation maximisation (extension, not in the paper).

    One iteration from the natural shares is the Bayes split of each canonical weight; many iterations find the
    maximum-likelihood mixture. Mass of `target` on columns that no row covers is left out, and the rest renormalised.

    Args:
        composition: (U, C), rows sum to 1: P(canonical domain | user domain).
        target: (C,), the canonical mix a.
        start: (U,), the natural shares; a domain that starts at 0 stays at 0.
        iterations: Number of EM steps.

    Returns:
        (U,), sums to 1.

    Raises:
        MixError: No covered canonical domain has weight.
    """
    covered = (composition[start > 0] > 0).any(axis=0)
    reachable = np.where(covered, target, 0.0)
    mass = float(reachable.sum())
    if mass <= 0:
        raise MixError("no user domain covers any canonical domain that has weight: check the domains' compositions")
    reachable = reachable / mass
    mix = start / start.sum()
    for _ in range(iterations):
        mixed = mix @ composition
        ratio = np.divide(reachable, mixed, out=np.zeros_like(mixed), where=mixed > 0)
        previous, mix = mix, mix * (composition @ ratio)
        mix = mix / mix.sum()
        if np.array_equal(mix, previous):
            break  # equal to the last bit: further steps would change nothing
    return np.asarray(mix, dtype=np.float64)


def _named(names: Sequence[str], values: FloatArray, selected: npt.NDArray[np.bool_]) -> str:
    return _shorten([f"{names[i]}={values[i]:.4g}" for i in np.flatnonzero(selected).tolist()])


def _shorten(items: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(repr(items[i]) for i in range(min(limit, len(items))))
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"

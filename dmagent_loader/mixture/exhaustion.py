"""The rule of each domain for when all its rows are used up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import SOURCE, DomainSpace

ExhaustionRule = Literal["repeat", "stop", "redistribute", "error"]
EXHAUSTION_RULES: tuple[ExhaustionRule, ...] = get_args(ExhaustionRule)


def exhaustion_rules(
    space: DomainSpace, exhausted: str | Mapping[str, str] | None = None
) -> tuple[ExhaustionRule, ...]:
    """The rule of each domain of a space for when all its rows are used up.

    - ``repeat``: the rows are read again in a new order (default for the source field).
    - ``stop``: the weight of the domain moves to the rest of its field, and the run ends when the field is used up, as
      in the paper (default for every other field).
    - ``redistribute``: as ``stop``, but the run continues: when the field is used up, its weight moves to the other
      fields.
    - ``error``: `ExhaustedError`.

    The weight moves to those domains of the field that have weight, in proportion to it. Domains of weight 0 take over,
    in proportion to their rows, only when no domain with weight is left.

    Args:
        space: The domains.
        exhausted: One rule for all domains, or a mapping from field or domain name to rule (the rule of a domain takes
            precedence).

    Raises:
        ConfigurationError: A rule is unknown, or a name is neither a field nor a domain.
    """
    chosen: dict[str, str] = {}
    if isinstance(exhausted, str):
        chosen = dict.fromkeys(space.fields, exhausted)
    elif isinstance(exhausted, Mapping):
        chosen = dict(exhausted)
    elif exhausted is not None:
        raise ConfigurationError(
            f"exhausted is {shown(exhausted)}; pass one rule for all, or a mapping from field or domain to rule"
        )
    unknown = sorted(set(chosen) - set(space.fields) - set(space.names))
    if unknown:
        raise ConfigurationError(
            f"exhausted names {unknown}, which are neither fields {space.fields} nor domains: check the spelling"
        )
    rules = []
    for domain in space.domains:
        default = "repeat" if domain.field == SOURCE else "stop"
        rule = chosen.get(domain.name, chosen.get(domain.field, default))
        if rule not in EXHAUSTION_RULES:
            raise ConfigurationError(
                f"exhaustion rule {rule!r} of domain {domain.name!r} is unknown; choose one of {list(EXHAUSTION_RULES)}"
            )
        rules.append(rule)
    return tuple(rules)

"""The Data Mixing Agent for continual pre-training: shards per domain, one callback, a mix that follows the model.

>>> import dmagent_loader
>>> dmagent_loader.DomainSpace.from_names(["source/web", "target/math"]).fields
('source', 'target')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dmagent_loader._version import __version__

if TYPE_CHECKING:
    from dmagent_loader.agent import MixingAgent
    from dmagent_loader.environment import Environment
    from dmagent_loader.mixture.domains import DomainSpace
    from dmagent_loader.sampler import AgentWeightedSampler

__all__ = ["AgentWeightedSampler", "DomainSpace", "Environment", "MixingAgent", "__version__"]

_HOMES = {
    "AgentWeightedSampler": "dmagent_loader.sampler",
    "DomainSpace": "dmagent_loader.mixture.domains",
    "Environment": "dmagent_loader.environment",
    "MixingAgent": "dmagent_loader.agent",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that the command line starts fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

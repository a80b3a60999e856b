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
    from dmagent_loader._run.state import load_state, save_state
    from dmagent_loader.agent import MixingAgent
    from dmagent_loader.data_loader import MixingDataLoader
    from dmagent_loader.environment import Environment
    from dmagent_loader.integrations.mixing import Mixing
    from dmagent_loader.mixture import DomainSpace
    from dmagent_loader.policies import GuardConfig
    from dmagent_loader.sampler import AgentWeightedSampler, DecisionConfig, PackText, ReadingConfig

__all__ = [
    "AgentWeightedSampler",
    "DecisionConfig",
    "DomainSpace",
    "Environment",
    "GuardConfig",
    "Mixing",
    "MixingAgent",
    "MixingDataLoader",
    "PackText",
    "ReadingConfig",
    "__version__",
    "load_state",
    "save_state",
]

_HOMES = {
    "AgentWeightedSampler": "dmagent_loader.sampler",
    "DecisionConfig": "dmagent_loader.sampler",
    "DomainSpace": "dmagent_loader.mixture",
    "Environment": "dmagent_loader.environment",
    "GuardConfig": "dmagent_loader.policies",
    "Mixing": "dmagent_loader.integrations.mixing",
    "MixingAgent": "dmagent_loader.agent",
    "MixingDataLoader": "dmagent_loader.data_loader",
    "PackText": "dmagent_loader.sampler",
    "ReadingConfig": "dmagent_loader.sampler",
    "load_state": "dmagent_loader._run.state",
    "save_state": "dmagent_loader._run.state",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that the command line starts fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

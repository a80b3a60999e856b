"""The errors that the package raises on purpose.

    DMAgentError
    ├── ConfigurationError (ValueError)      a setting that cannot work
    │   ├── DomainError                      unknown domain, domain without a field
    │   └── MixError                         weights that are not a distribution
    ├── ShardError                           the data on disk
    │   ├── ShardNotFoundError               no file matches
    │   ├── EmptyShardError                  a shard, or a whole domain, without rows
    │   ├── DamagedShardError                truncated, overwritten or changed bytes
    │   ├── ShardLayoutError                 a tar whose members cannot be read as samples by position
    │   └── DecodeError                      a member that cannot be, or must not be, decoded
    ├── StateError (ValueError)              a saved state that does not belong to this run
    ├── RankError (RuntimeError)             other ranks that failed, are gone, or belong to another run
    ├── ExhaustedError                       a domain ran out and its rule is ``error``
    ├── EnvironmentDataError (ValueError)    question files that cannot be used
    ├── FeedbackError (ValueError)           feedback that is not finite or has the wrong fields
    ├── PolicyError                          a policy that did not give a usable mix
    ├── InfluenceError (RuntimeError)        influence that cannot be measured on this model
    ├── CheckpointError                      agent weights that are missing, changed or of another shape
    └── MissingExtraError (ImportError)      an optional package that is not installed

Each message states the fault with its values, the consequence, and the remedy.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DMAgentError",
    "DamagedShardError",
    "DecodeError",
    "DomainError",
    "EmptyShardError",
    "EnvironmentDataError",
    "ExhaustedError",
    "FeedbackError",
    "InfluenceError",
    "MissingExtraError",
    "MixError",
    "PolicyError",
    "RankError",
    "ShardError",
    "ShardLayoutError",
    "ShardNotFoundError",
    "StateError",
]


HOW_TO_RESUME = "a run whose data have changed resumes with load_state_dict(state, data='changed')"
"""End of messages whose remedy changes shards, domains or their settings: an exact resumption would refuse them."""


class DMAgentError(Exception):
    """Base class of all errors of this package."""


class ConfigurationError(DMAgentError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DomainError(ConfigurationError):
    """A domain that is unknown, named twice, or belongs to no field."""


class MixError(ConfigurationError):
    """Weights that are not a distribution over the domains."""


class ShardError(DMAgentError):
    """A fault of the shards on disk or behind a URL."""


class ShardNotFoundError(ShardError, FileNotFoundError):
    """A pattern that matches no shard, or a shard that cannot be opened."""


class EmptyShardError(ShardError):
    """A shard or a domain that holds no rows."""


class DamagedShardError(ShardError):
    """A shard that is truncated, overwritten, or changed since it was indexed."""


class ShardLayoutError(ShardError):
    """An intact shard that cannot be read as samples by position: compressed, with links, or with repeated keys."""


class DecodeError(ShardError):
    """A member that could not be decoded, or whose decoder could execute code."""


class StateError(DMAgentError, ValueError):
    """A saved state that does not belong to this run, or cannot be read."""


class RankError(DMAgentError, RuntimeError):
    """Other ranks that failed, do not answer, or have other data, settings or mixes than this one."""


class ExhaustedError(DMAgentError):
    """A domain that is used up, with the exhaustion rule ``error``."""


class EnvironmentDataError(DMAgentError, ValueError):
    """A question file that is empty, malformed or lacks a column."""


class FeedbackError(DMAgentError, ValueError):
    """Feedback that is not finite, or does not cover the fields."""


class PolicyError(DMAgentError):
    """A policy that raised, was late, or proposed something that is not a mix."""


class InfluenceError(DMAgentError, RuntimeError):
    """Influence or losses of the domains that cannot be measured: too little memory, no access to the model, or rows
    without a token to predict."""


class CheckpointError(DMAgentError):
    """An agent checkpoint that is missing, changed, or of another shape."""


class MissingExtraError(DMAgentError, ImportError):
    """An optional package that is needed here and is not installed."""


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional module; the error names the extra that installs it.

    Args:
        module: Name of the module, for example ``"transformers"``.
        extra: The extra of this package that installs it, for example ``"hf"``.

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs {module!r}, which is not installed: pip install 'dmagent-loader[{extra}]'"
        ) from error

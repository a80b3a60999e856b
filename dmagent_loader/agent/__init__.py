"""The agent: a small Transformer that maps the mixes and the feedback so far to the next mix."""

from dmagent_loader.agent.checkpoint import list_bundled
from dmagent_loader.agent.config import AgentConfig
from dmagent_loader.agent.model import MixingAgent

__all__ = ["AgentConfig", "MixingAgent", "list_bundled"]

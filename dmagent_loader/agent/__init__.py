"""The agent: a small Transformer that reads mixes and feedback so far and writes the next mix."""

from dmagent_loader.agent.checkpoint import list_bundled
from dmagent_loader.agent.config import AgentConfig
from dmagent_loader.agent.model import MixingAgent

__all__ = ["AgentConfig", "MixingAgent", "list_bundled"]

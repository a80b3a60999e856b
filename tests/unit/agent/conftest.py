from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.mixture.history import FeedbackStatistics, History

STATISTICS = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=1000)


@pytest.fixture(scope="session")
def agent() -> MixingAgent:
    """Of full size, with weights large enough that its mixes are far from uniform."""
    torch.manual_seed(7)
    agent = MixingAgent(AgentConfig(statistics=STATISTICS), name="seven")
    with torch.no_grad():
        for parameter in agent.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return agent.eval()


@pytest.fixture
def saved(agent: MixingAgent, tmp_path: Path) -> Path:
    directory = tmp_path / "seven"
    agent.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_history(agent: MixingAgent) -> Callable[..., History]:
    def make(steps: int, seed: int = 0) -> History:
        rng = np.random.default_rng(seed)
        return History(
            domains=agent.config.domains,
            fields=("general", "math"),
            mixes=rng.dirichlet(np.full(52, 0.3), steps),
            feedback=np.column_stack([rng.normal(-5.0, 0.1, steps), rng.normal(-4.0, 0.5, steps)]),
        )

    return make

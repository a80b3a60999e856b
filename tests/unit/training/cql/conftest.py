from __future__ import annotations

import pytest
from training_fixtures import random_agent, random_record

from dmagent_loader.agent import MixingAgent
from dmagent_loader.training.record import FeedbackRecord


@pytest.fixture(scope="session")
def record() -> FeedbackRecord:
    return random_record()


@pytest.fixture(scope="session")
def agent() -> MixingAgent:
    return random_agent()

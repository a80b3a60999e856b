"""Settings of Conservative Q-Learning: what cannot work is refused."""

from __future__ import annotations

import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.cql.config import CQLConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discount": 1.5}, "discount is 1.5"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"num_critics": 0}, "num_critics is 0"),
        ({"updates": 70, "log_every": 50, "warmup_updates": 1}, "not a multiple of log_every"),
        ({"warmup_updates": 1200}, "nothing of 1200 updates"),
        ({"actor_learning_rate": float("nan")}, "actor_learning_rate is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CQLConfig(**changes)

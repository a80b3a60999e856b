"""The environment: small question sets, one per field, on which a model is scored between training steps.

The way of one evaluation: `questions` (files to pairs) -> `encoding` (pairs to tokens) -> `batches` (who scores what,
in which call) -> `scoring` (the model's log-probabilities) -> `core` (the mean per field, the same on every rank).
The way of one measurement of influence: `probe_rows` (rows to tokens) -> `influence` (which way, and what if memory is
short) -> `influence_ways` (gradients, or a virtual step) -> `gradients` (the parameters, put back as they were).
"""

from dmagent_loader.environment.core import Environment, LogLikelihoods
from dmagent_loader.environment.influence import InfluenceSettings
from dmagent_loader.environment.questions import Question
from dmagent_loader.environment.settings import EnvironmentSettings
from dmagent_loader.mixture.influence import Influence, Score

__all__ = [
    "Environment",
    "EnvironmentSettings",
    "Influence",
    "InfluenceSettings",
    "LogLikelihoods",
    "Question",
    "Score",
]

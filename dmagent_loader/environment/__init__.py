"""The environment: small question sets, one per field, on which a model is scored between training steps.

The way of one evaluation: `questions` (files to pairs) -> `encoding` (pairs to tokens) -> `batches` (who scores what,
in which call) -> `scoring` (the model's log-probabilities) -> `core` (the mean per field, the same on every rank).
"""

from dmagent_loader.environment.core import Environment, EnvironmentSettings, LogLikelihoods
from dmagent_loader.environment.questions import Question

__all__ = ["Environment", "EnvironmentSettings", "LogLikelihoods", "Question"]

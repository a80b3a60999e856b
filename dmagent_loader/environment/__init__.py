"""The environment: small question sets, one per field, on which a model is scored between training steps.

One evaluation: `questions` (files to pairs) -> `encoding` (pairs to tokens) -> `batches` (assignment of pairs to ranks
and calls) -> `scoring` (log-probabilities under the model) -> `evaluation` (mean per field, identical on every rank).
One influence measurement: `probe_rows` (rows to tokens) -> `influence` (choice of method, fallbacks when memory is
short) -> `influence_ways` (gradients, or a virtual step) -> `gradients` (parameter access, restored afterwards).
"""

from dmagent_loader.environment.core import Environment
from dmagent_loader.environment.evaluation import Evaluation, LogLikelihoods
from dmagent_loader.environment.influence import InfluenceSettings
from dmagent_loader.environment.questions import Question
from dmagent_loader.environment.rows import RowEnvironment
from dmagent_loader.environment.settings import EnvironmentSettings
from dmagent_loader.mixture.influence import Influence, Score

__all__ = [
    "Environment",
    "EnvironmentSettings",
    "Evaluation",
    "Influence",
    "InfluenceSettings",
    "LogLikelihoods",
    "Question",
    "RowEnvironment",
    "Score",
]

"""Policies, which map the history of a run to its next mix, and the guard that checks their proposals."""

from dmagent_loader.policies.agent import AgentPolicy
from dmagent_loader.policies.base import Policy, name_of
from dmagent_loader.policies.baselines import (
    CriticalRatio,
    DynamicBatchLoading,
    LogLinearLaw,
    MixtureLaw,
    Olmix,
    OnlineDataMixing,
    ProxyTable,
    RecordedPath,
    RegMix,
    Regression,
    ReplayPolicy,
    Velocitune,
    power_law_loss,
    rank_correlation,
)
from dmagent_loader.policies.choice import PolicyFactory, make_policy
from dmagent_loader.policies.combined import CombinedPolicy
from dmagent_loader.policies.fields import FieldPolicy
from dmagent_loader.policies.guard import Guard, GuardConfig, Outcome, propose_guarded
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.policies.informed import INFLUENCE, LENGTH, LOSSES, QUESTIONS, InformedPolicy
from dmagent_loader.policies.plus import PlusPolicy
from dmagent_loader.policies.question_topics import QuestionTopics
from dmagent_loader.policies.schedule import LinearSchedule, TwoPhaseSchedule
from dmagent_loader.policies.static import StaticPolicy

__all__ = [
    "AgentPolicy",
    "CombinedPolicy",
    "CriticalRatio",
    "DynamicBatchLoading",
    "FieldPolicy",
    "Guard",
    "GuardConfig",
    "INFLUENCE",
    "InfluencePolicy",
    "InformedPolicy",
    "LENGTH",
    "LOSSES",
    "LinearSchedule",
    "LogLinearLaw",
    "MixtureLaw",
    "Olmix",
    "OnlineDataMixing",
    "Outcome",
    "PlusPolicy",
    "Policy",
    "PolicyFactory",
    "ProxyTable",
    "QUESTIONS",
    "QuestionTopics",
    "RecordedPath",
    "RegMix",
    "Regression",
    "ReplayPolicy",
    "StaticPolicy",
    "TwoPhaseSchedule",
    "Velocitune",
    "make_policy",
    "name_of",
    "power_law_loss",
    "propose_guarded",
    "rank_correlation",
]

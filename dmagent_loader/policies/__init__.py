"""Policies, which map the history of a run to its next mix, and the guard that checks their proposals."""

from dmagent_loader.policies.agent import AgentPolicy
from dmagent_loader.policies.base import Policy, name_of
from dmagent_loader.policies.choice import make_policy
from dmagent_loader.policies.combined import CombinedPolicy
from dmagent_loader.policies.fields import FieldPolicy
from dmagent_loader.policies.guard import Guard, GuardConfig, Outcome, propose_guarded
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.policies.informed import INFLUENCE, LENGTH, QUESTIONS, InformedPolicy
from dmagent_loader.policies.plus import PlusPolicy
from dmagent_loader.policies.question_topics import QuestionTopics
from dmagent_loader.policies.schedule import LinearSchedule
from dmagent_loader.policies.static import StaticPolicy

__all__ = [
    "AgentPolicy",
    "CombinedPolicy",
    "FieldPolicy",
    "Guard",
    "GuardConfig",
    "INFLUENCE",
    "InfluencePolicy",
    "InformedPolicy",
    "LENGTH",
    "LinearSchedule",
    "Outcome",
    "PlusPolicy",
    "Policy",
    "QUESTIONS",
    "QuestionTopics",
    "StaticPolicy",
    "make_policy",
    "name_of",
    "propose_guarded",
]

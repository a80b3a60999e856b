"""Baselines: published methods of data mixing, and the controls that a claim about a policy needs.

docs/baselines.md compares them: source, needs, cost.
"""

from dmagent_loader.policies.baselines.critical_ratio import CriticalRatio, MixtureLaw
from dmagent_loader.policies.baselines.dbl import DynamicBatchLoading
from dmagent_loader.policies.baselines.odm import OnlineDataMixing
from dmagent_loader.policies.baselines.olmix import LogLinearLaw, Olmix
from dmagent_loader.policies.baselines.proxies import ProxyTable, rank_correlation
from dmagent_loader.policies.baselines.recorded import RecordedPath, ReplayPolicy
from dmagent_loader.policies.baselines.regmix import RegMix, Regression
from dmagent_loader.policies.baselines.velocitune import Velocitune, power_law_loss

__all__ = [
    "CriticalRatio",
    "DynamicBatchLoading",
    "LogLinearLaw",
    "MixtureLaw",
    "Olmix",
    "OnlineDataMixing",
    "ProxyTable",
    "RecordedPath",
    "RegMix",
    "Regression",
    "ReplayPolicy",
    "Velocitune",
    "power_law_loss",
    "rank_correlation",
]

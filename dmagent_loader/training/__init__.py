"""Offline training of agents: corpus, trajectories, proxies, feedback, supervised warm-up, Conservative Q-Learning.

The stages follow the paper (sections 3.2, 3.3 and C). Only the command line imports this package; the loader does not.
"""

from dmagent_loader.training.data.corpus import read_documents, train_tokenizer
from dmagent_loader.training.data.topics import TopicClassifier, TopicClassifierConfig
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import CONFIGS, Pipeline, PipelineConfig, with_settings

__all__ = [
    "CONFIGS",
    "FeedbackRecord",
    "Pipeline",
    "PipelineConfig",
    "TopicClassifier",
    "TopicClassifierConfig",
    "Workers",
    "read_documents",
    "train_tokenizer",
    "with_settings",
]

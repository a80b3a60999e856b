"""A family of small continual pre-training tasks, on which mixing policies are trained and compared (docs/tasks.md)."""

from dmagent_loader.training.tasks.axes import sample_tasks
from dmagent_loader.training.tasks.episode import Episode, attainable, range_task, reward, run_episode
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator, Simulator, Start
from dmagent_loader.training.tasks.spec import BaseModel, Perturbation, TaskSpec

__all__ = [
    "BaseModel",
    "Episode",
    "Perturbation",
    "ProxySimulator",
    "Simulator",
    "Start",
    "TaskLibrary",
    "TaskSpec",
    "attainable",
    "range_task",
    "reward",
    "run_episode",
    "sample_tasks",
]

"""The recorded set: the training data of agents.

Shapes: M trajectories, T steps, K fields.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as serialize

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.history import FeedbackStatistics
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.trajectories import Trajectories, TrajectoryConfig

SCHEMA = "feedback/2"
"""Kind and version of the file; increased when an older reader would misunderstand a newer one."""


@dataclass(frozen=True, kw_only=True)
class FeedbackRecord:
    """Trajectories with the feedback after each of their steps.

    Args:
        trajectories: The mixes.
        fields: Names of the K fields.
        feedback: (M, T + 1, K), mean log-probability per scored token in nats; row 0 is the base model's, rows after
            the end of a trajectory are NaN.
        losses: (M, T + 1), mean training loss of each step in nats per token; NaN in row 0 and after the end.
        seconds: Time spent on training and scoring the proxies.
        settings: Settings of the collection, with the fingerprints of corpus and questions.
    """

    trajectories: Trajectories
    fields: tuple[str, ...]
    feedback: FloatArray
    losses: FloatArray
    seconds: float
    settings: dict[str, Any]

    @property
    def num_feedbacks(self) -> int:
        """Number of evaluations of trained proxies, without those of the base models."""
        return int(self.trajectories.lengths.sum())

    def statistics(self) -> FeedbackStatistics:
        """Mean and std of each field over all steps of all trajectories, start states included (paper, C.3)."""
        return FeedbackStatistics.of(self.feedback[np.isfinite(self.feedback).all(axis=-1)])

    def save(self, path: Path) -> None:
        """Writes one safetensors file; settings are JSON in its header, mixes are rounded to float32."""
        arrays = {
            # Agents are trained in float32, and the file has half the size.
            "mixes": self.trajectories.mixes.astype(np.float32),
            "lengths": self.trajectories.lengths,
            "candidates": self.trajectories.candidates,
            "starts": self.trajectories.starts,
            "target_distribution": self.trajectories.target_distribution,
            "feedback": self.feedback,
            "losses": self.losses,
        }
        meta = {
            "schema": SCHEMA,
            "fields": json.dumps(self.fields),
            "seconds": repr(self.seconds),
            "settings": json.dumps(self.settings, sort_keys=True),
            "trajectory_settings": json.dumps(asdict(self.trajectories.config), sort_keys=True),
        }
        write_atomically(path, serialize(arrays, metadata=meta))

    @classmethod
    def load(cls, path: Path) -> FeedbackRecord:
        """Reads a file that `save` wrote.

        Raises:
            StateError: The file has another schema.
        """
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("schema") != SCHEMA:
                raise StateError(f"{path} has schema {meta.get('schema')}, not {SCHEMA}: collect the feedback again")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        arrays["mixes"] = arrays["mixes"].astype(np.float64)
        feedback, losses = arrays.pop("feedback"), arrays.pop("losses")
        return cls(
            trajectories=Trajectories(**arrays, config=TrajectoryConfig.from_json(meta["trajectory_settings"])),
            fields=tuple(json.loads(meta["fields"])),
            feedback=feedback,
            losses=losses,
            seconds=float(meta["seconds"]),
            settings=json.loads(meta["settings"]),
        )

"""What real runs say about influence: the record from which surrogate tasks are drawn.

For each environment (a pair of question sets) and the 52 canonical domains: the gain of a proxy that was trained on
each domain alone, taken as the truth; the measured influence with its errors; natural shares and question topics; and
final gains of whole runs under known mixes. `benchmarks/influence/calibration.py` collects the record.

Shapes: E environments, S draws of the measurement, K = 2 fields (keep, acquire), G groups of questions, D = 52 domains,
R runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as serialize

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.simplex import FloatArray, IntArray

SCHEMA = "plus-calibration/1"
"""Kind and version of the file."""
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Influence and runs of E environments on real proxies.

    Args:
        environments: Names, ``KEEP+ACQUIRE``.
        truth: (E, K, D), gain in nats of a proxy that was trained on the domain alone; NaN: the domain has no text.
        values: (E, S, K, D), measured influence; NaN as in `truth`.
        errors: (E, S, K, D), its standard errors.
        groups: (E, S, K, G, D), influence on each group of questions.
        natural: (E, D), natural shares inside each field of the data; each half sums to 0.5.
        topics: (E, D), the shares that the topics of the questions suggest, likewise.
        run_environment: (R,), number of the environment of each run.
        run_mix: (R, D), mean mix of each run.
        run_gains: (R, K), final gains on questions that no policy read, in nats.
    """

    environments: tuple[str, ...]
    truth: FloatArray
    values: FloatArray
    errors: FloatArray
    groups: FloatArray
    natural: FloatArray
    topics: FloatArray
    run_environment: IntArray
    run_mix: FloatArray
    run_gains: FloatArray

    def save(self, path: Path) -> None:
        """Writes one safetensors file, in float32."""
        arrays = {
            entry.name: np.asarray(getattr(self, entry.name), dtype=np.float32)
            for entry in fields(self)
            if entry.name != "environments"
        }
        meta = {"schema": SCHEMA, "environments": json.dumps(self.environments)}
        write_atomically(path, serialize(arrays, metadata=meta))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads a file that `save` wrote.

        Raises:
            StateError: There is no such file, or it has another schema.
        """
        if not path.is_file():
            raise StateError(
                f"there is no calibration record {path}: it is in training_record/plus of the repository; pass its path"
            )
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("schema") != SCHEMA:
                raise StateError(f"{path} has schema {meta.get('schema')}, not {SCHEMA}: collect the record again")
            arrays = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
        arrays["run_environment"] = arrays["run_environment"].astype(np.int64)
        return cls(environments=tuple(json.loads(meta["environments"])), **arrays)

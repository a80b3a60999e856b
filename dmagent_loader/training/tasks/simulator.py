"""What a policy acts on: the protocol of simulators, and the simulator that trains a real proxy.

Shapes: K = 2 fields of questions (keep, acquire), D domains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dmagent_loader._files import write_atomically
from dmagent_loader.environment import Environment, EnvironmentSettings, Question
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.domains import NUM_TOPICS, SOURCE, TARGET, DomainSpace
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.proxies.language_model import ProxyModel
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.tasks.library import MOST_KEPT, TaskLibrary, proxy_config, texts
from dmagent_loader.training.tasks.rows import TaskRows, with_target_pool
from dmagent_loader.training.tasks.spec import TaskSpec, learning_rate_factor

ASKED, ASKED_NOISY = (64, 24), (8, 4)
"""Questions read after each step, to keep and to acquire: as many as in the recorded set, and if they are noisy."""
PROBE_ROWS = 52 * 32
"""Rows of all domains in a measurement of influence at least; integrations read as many, and 32 of each domain."""
LOSS_ROWS, LOSS_STREAM = 4, 4_900_000
"""Rows of each domain that its loss is measured on, and their stream."""
PROBE_STREAMS = 5_000_000
"""Streams of probe rows are numbered from here on: other rows than any that a run trains on first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What is known before the first decision.

    Args:
        space: Domains of the run.
        fields: Names of the K fields of questions, the one to keep first.
        natural: (D,), natural share of each domain, half of the weight in each field of the data; sums to 1.
        mix: (D,), mix that the base model was trained on.
        feedback: (K,), of the base model, in nats.
        length: Length of the run.
        questions: Field -> texts of the questions that feedback reads.
    """

    space: DomainSpace
    fields: tuple[str, ...]
    natural: FloatArray
    mix: FloatArray
    feedback: FloatArray
    length: RunLength
    questions: Mapping[str, list[str]]

    def at(self, target_share: float) -> FloatArray:
        """The natural mix with a share of the target field: (D,), sums to 1."""
        mix = np.zeros(len(self.natural))
        for name, share in ((SOURCE, 1.0 - target_share), (TARGET, target_share)):
            members = list(self.space.members(name))
            mix[members] = share * self.natural[members] / self.natural[members].sum()
        return mix


class Simulator(Protocol):
    """One task, run step by step."""

    def reset(self, spec: TaskSpec, stream: int) -> Start:
        """Begins a run.

        Args:
            spec: The task.
            stream: Number of the repetition; runs of one stream read the same rows of a domain first.
        """
        ...

    def step(self, mix: FloatArray, *, feedback: bool = True) -> FloatArray:
        """Trains for a step on a mix, (D,), and returns the feedback after it: (K,); NaN where `feedback` is False."""
        ...

    def finish(self) -> FloatArray:
        """Gains over the base model on questions that no policy reads, in nats: (K,)."""
        ...

    def losses(self) -> Mapping[str, float]:
        """Mean loss per token of the present model on each domain, always on the same training rows."""
        ...

    def influence(self, repeat: int = 0) -> Influence:
        """Influence of each domain on the start model.

        Args:
            repeat: Number of the measurement; another one reads other rows.
        """
        ...


class ProxySimulator:
    """Runs tasks on real proxies. The result is a function of spec, stream and mixes.

    Args:
        library: Text, questions and base models.
        probe_rows: Rows of all domains that a measurement of influence reads at least.
    """

    def __init__(self, library: TaskLibrary, *, probe_rows: int = PROBE_ROWS) -> None:
        self.library, self._probe_rows = library, probe_rows
        self._spec: TaskSpec | None = None

    def reset(self, spec: TaskSpec, stream: int) -> Start:
        """See `Simulator`.

        Raises:
            ConfigurationError: A step does not divide into updates.
        """
        config = proxy_config(spec.base.size, spec.learning_rate)
        unit = ROW_TOKENS * config.rows_per_update
        if spec.tokens_per_step % unit:
            raise ConfigurationError(
                f"a step of {spec.tokens_per_step} tokens does not divide into updates of {unit} tokens: choose a "
                "multiple"
            )
        if spec != self._spec:
            self._prepare(spec)
        updates = spec.steps * spec.tokens_per_step // unit
        self._trainer = ProxyTrainer(
            1,
            config,
            start=self._weights,
            schedule=lambda done: learning_rate_factor(spec.schedule, done / updates),
        )
        self._rows = TaskRows(self._space, spec, stream, topic=self._topic)
        mix = self._space.mix_of(self.library.start_state(spec.target, spec.base))
        return Start(
            space=self._domains,
            fields=spec.fields,
            natural=self._space.natural(0.5),
            mix=mix,
            feedback=self._asked.feedback(self._base)[0],
            length=RunLength(
                rows=self._rows.capacity,
                repeats=self._rows.repeats,
                limit=spec.steps * spec.tokens_per_step // ROW_TOKENS,
                ending=(),
                interval=spec.tokens_per_step // ROW_TOKENS,
            ),
            questions=self._texts,
        )

    def step(self, mix: FloatArray, *, feedback: bool = True) -> FloatArray:
        """See `Simulator`."""
        self._trainer.train(torch.from_numpy(self._rows.next(mix)[None]))
        if not feedback:
            return np.full(2, np.nan)
        return np.asarray(self._asked.feedback(self._trainer.averaged)[0], dtype=np.float64)

    def finish(self) -> FloatArray:
        """See `Simulator`."""
        return np.asarray(self._scored.feedback(self._trainer.averaged)[0] - self._before, dtype=np.float64)

    def model(self) -> ProxyModel:
        """The present model, with the weights that feedback and `finish` score."""
        return ProxyModel(self._trainer.config, self._trainer.averaged.state_dict())

    @torch.no_grad()
    def losses(self) -> Mapping[str, float]:
        """See `Simulator`."""
        assert self._spec is not None, "reset comes first"
        rows = TaskRows(self._space, self._spec, LOSS_STREAM, topic=self._topic).of_each(LOSS_ROWS)
        model = self._trainer.averaged
        return {name: float(model.losses(torch.from_numpy(listed[None]))) for name, listed in rows.items()}

    def influence(self, repeat: int = 0) -> Influence:
        """See `Simulator`; a measurement is kept in the work folder of the library."""
        assert self._spec is not None, "reset comes first"
        path = self.library.work / "influence" / f"{self._spec.id}-{repeat}.json"
        if not path.exists():
            count = max(min(32, self._probe_rows), self._probe_rows // len(self._domains))
            rows = TaskRows(self._space, self._spec, PROBE_STREAMS + repeat, topic=self._topic).of_each(count)
            model = ProxyModel(proxy_config(self._spec.base.size), self._probed_weights())
            found = self._environment.influence(model, {name: list(listed) for name, listed in rows.items()})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found.to_json()).encode())
        return Influence.from_json(json.loads(path.read_text(encoding="utf-8")))

    def _prepare(self, spec: TaskSpec) -> None:
        """What all runs of a task share."""
        self._spec = None  # if a part cannot be made, the parts are of two tasks
        library, perturbed = self.library, spec.perturbation.kind
        self._weights = library.weights(spec.target, spec.base)
        self._base = ProxyModel(proxy_config(spec.base.size), self._weights).proxies
        tokenizer = library.corpus(spec.target).tokenizer()
        keep, acquire = library.of_task(spec)
        asked = ASKED_NOISY if perturbed == "noisy_questions" else ASKED
        read = dict(zip(spec.fields, (keep.read, acquire.read), strict=True))
        config = QuestionConfig(max_tokens=ROW_TOKENS, max_questions=MOST_KEPT, batch_tokens=512)
        self._asked = ProxyQuestions(read, tokenizer, replace(config, max_questions=asked))
        self._scored = ProxyQuestions(
            dict(zip(spec.fields, (keep.scored, acquire.scored), strict=True)), tokenizer, config
        )
        if perturbed == "noisy_questions":
            read = {
                name: listed[:: max(1, len(listed) // n)][:n]
                for (name, listed), n in zip(read.items(), asked, strict=True)
            }
        settings = EnvironmentSettings(
            score="pair", cloze=True, max_length=ROW_TOKENS, progress=False, batch_tokens=512
        )
        self._environment = Environment(read, tokenizer, settings)
        self._texts = {name: texts(listed) for name, listed in read.items()}
        self._topic = self._most_asked_topic(keep.read, spec)
        self._space = with_target_pool(library.space(spec.target, spec.space, spec.number), spec)
        self._domains = DomainSpace.from_names(self._space.names)
        self._before = self._scored.feedback(self._base)[0]
        self._spec = spec

    def _most_asked_topic(self, questions: list[Question], spec: TaskSpec) -> int:
        """Topic that the questions to keep are most about, among those with source text."""
        shares = LinearClassifier.bundled().shares(texts(questions))
        has_text = self.library.corpus(spec.target).num_tokens[:NUM_TOPICS] > ROW_TOKENS
        return int(np.argmax(np.where(has_text, shares, -1.0)))

    def _probed_weights(self) -> Mapping[str, torch.Tensor]:
        assert self._spec is not None
        if self._spec.perturbation.kind != "stale_probe":
            return self._weights
        base = self._spec.base
        return self.library.weights(self._spec.target, replace(base, tokens=base.tokens // 5))

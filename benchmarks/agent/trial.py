"""Trial of policies: continual pre-training of a larger model under each of them (paper, section 4).

For each seed a base model is pre-trained on the source field. Every policy continues training from its weights. The
runs of a seed read the same rows of a domain in the same order, so that their differences come from the mixes alone.

Several runs of a seed are trained as one batched model. Such a batch is a unit of work, as in the collection of
feedback: after a kill it continues from its file. Policies that are added later are put into new batches.

Shapes: P runs of a batch, T steps, D = 52 domains, K fields of the environment, F = 2 fields of the corpus.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.agent.held_out import HeldOutRows
from benchmarks.agent.rollout import ClosedLoop, LoopConfig, proposal
from benchmarks.agent.stream_numbers import TRIAL
from benchmarks.agent.trial_record import TrialRecord
from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import FIELDS, NUM_CANONICAL, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray, total_variation
from dmagent_loader.policies import Policy, StaticPolicy
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import BaseConfig, train_bases
from dmagent_loader.training.proxies.model import ProxyConfig, StackedProxies
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.run_folder import claim, save_tensors
from dmagent_loader.training.trajectories import propose

SAVE_EVERY = 5
"""Steps between two saves of a batch."""
RANDOM = "random "
"""Prefix of the names of the random static mixes."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Settings of a trial.

    Args:
        model: Size and optimiser of the target model, which is larger than the agents' proxies.
        base: Pre-training of the base models; one is trained for each seed.
        seeds: Number of repetitions, each with another base model and other data streams.
        steps: T, largest number of reweighting steps.
        tokens_per_step: Tokens trained between two decisions.
        target_tokens: Number of target-field tokens.
        row_tokens: Tokens of a training row.
        random_mixes: Number of random static mixes, among which the best static one is chosen.
        smoothing: Smoothing of the random mixes, see `TrajectoryConfig`.
        runs_at_once: Largest number of runs in one batched model.
        evaluate_every: Steps between two evaluations of runs whose policy does not read the feedback; other runs are
            evaluated after each step.
        marks: Shares of the target tokens. When a run has used up one of them, and when it ends, it is also evaluated
            on the unseen questions and the held-out text.
        held_out_rows: Approximate number of held-out rows of each field.
        seed: Seed of the random mixes and, with the number of the repetition, of everything else.

    Raises:
        ConfigurationError: A number is not positive, or a step does not divide into updates.
    """

    model: ProxyConfig = field(
        default_factory=lambda: ProxyConfig(
            width=128,
            layers=4,
            feed_forward=340,
            rows_per_update=4,
            learning_rate=1e-3,
            warmup_updates=20,
            averaging=0.95,
        )
    )
    base: BaseConfig = field(default_factory=lambda: BaseConfig(models=1, tokens=1_500_000, learning_rate=3e-3))
    seeds: int = 3
    steps: int = 80
    tokens_per_step: int = 2048
    target_tokens: int = 85_000
    row_tokens: int = 128
    random_mixes: int = 16
    smoothing: float = 0.02
    runs_at_once: int = 3
    evaluate_every: int = 5
    marks: tuple[float, ...] = (0.5,)
    held_out_rows: int = 96
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.seeds, self.runs_at_once, self.evaluate_every, self.held_out_rows) < 1 or self.random_mixes < 0:
            raise ConfigurationError(
                f"a trial of {self.seeds} seeds, {self.runs_at_once} runs at once, an evaluation every "
                f"{self.evaluate_every} steps and {self.held_out_rows} held-out rows: all must be 1 or more"
            )
        rows, rest = divmod(self.tokens_per_step, self.row_tokens)
        if rest or rows % self.model.rows_per_update:
            raise ConfigurationError(
                f"tokens_per_step {self.tokens_per_step} is not a multiple of row_tokens {self.row_tokens} x "
                f"rows_per_update {self.model.rows_per_update}: choose one that is"
            )

    @property
    def loop(self) -> LoopConfig:
        """Settings of one run."""
        return LoopConfig(
            steps=self.steps,
            tokens_per_step=self.tokens_per_step,
            target_tokens=self.target_tokens,
            row_tokens=self.row_tokens,
            seed=self.seed,
        )


def static_policies(corpus: Corpus, config: TrialConfig) -> dict[str, StaticPolicy]:
    """Static mixes to compare agents with.

    ``naive``: the target distribution (paper, D.2). ``static 50/50``: half the target distribution, half the start
    state. ``source only``: the start state, as in continued pre-training on the source. The others are random mixes,
    with uniform target shares and topics drawn as in the recorded trajectories.
    """
    start, target = corpus.start_state, corpus.target_distribution
    mixes = {"naive": target, "static 50/50": 0.5 * (start + target), "source only": start}
    # From an empty present mix, a proposal is the random mix itself, up to its sum.
    drawn = propose(
        np.random.default_rng([config.seed, 1]),
        np.zeros(NUM_CANONICAL),
        start[:NUM_TOPICS],
        target[NUM_TOPICS:],
        config.random_mixes,
        config.smoothing,
    )
    mixes |= {f"{RANDOM}{i + 1:02d}": mix / mix.sum() for i, mix in enumerate(drawn)}
    return {name: StaticPolicy(mix, name=name) for name, mix in mixes.items()}


def run_trial(
    policies: Mapping[str, Policy],
    corpus: Corpus,
    questions: ProxyQuestions,
    unseen: ProxyQuestions,
    config: TrialConfig,
    directory: Path,
    *,
    workers: Workers | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> TrialRecord:
    """Pre-trains the base models and continues training from each under every policy.

    Args:
        policies: Name -> policy over the canonical domains, a pure function of the history.
        corpus: Tokens of the 52 domains.
        questions: Question sets whose feedback the policies read.
        unseen: Questions of the same fields that were used neither to train nor to choose anything.
        config: Settings.
        directory: Folder for results. A second call with the same settings continues from them, also with other
            policies.
        workers: Number and place of the workers; None: this process.
        device: See `ProxyTrainer`.
        progress: Whether to show progress bars.

    Raises:
        StateError: `directory` holds results of other settings or data, or of another policy of the same name.
        ConfigurationError: The two question sets have different fields, there is no policy, or a policy of an
            unfinished batch is missing.
    """
    if questions.fields != unseen.fields or not policies:
        raise ConfigurationError(
            f"{len(policies)} policies with questions of {questions.fields} and unseen ones of {unseen.fields}: give "
            "one policy or more, and both question sets for the same fields"
        )
    # Neither more seeds nor another batch size in a later call changes the existing runs.
    identity = {
        "trial": {name: value for name, value in asdict(config).items() if name not in ("seeds", "runs_at_once")},
        "corpus": corpus.fingerprint,
        "questions": questions.fingerprint,
        "unseen questions": unseen.fingerprint,
    }
    claim(directory, identity, "runs")
    workers = workers or Workers()
    bases = _Bases(corpus=corpus, config=config, directory=directory, device=device)
    steps = config.base.tokens // config.tokens_per_step
    trained = workers.run(bases, [steps] * config.seeds, progress=progress, description="base models")
    runs = TrialRuns(
        policies=policies,
        batches=_batches(policies, config, directory),
        corpus=corpus,
        questions=questions,
        unseen=unseen,
        config=config,
        bases=trained,
        directory=directory,
        device=device,
    )
    sizes = [config.steps * len(names) for _ in range(config.seeds) for names in runs.batches.values()]
    results = workers.run(runs, sizes, progress=progress, description="runs")
    by_seed = [results[i : i + len(runs.batches)] for i in range(0, len(results), len(runs.batches))]
    found = [name for names in runs.batches.values() for name in names]
    order = [found.index(name) for name in policies]

    def joined(name: str) -> FloatArray:
        return np.stack([np.concatenate([part[name].numpy() for part in parts]) for parts in by_seed], axis=1)[order]

    return TrialRecord(
        names=tuple(policies),
        fields=questions.fields,
        tokens_per_step=config.tokens_per_step,
        mixes=joined("mixes"),
        lengths=joined("lengths").astype(np.int64),
        feedback=joined("feedback"),
        unseen=joined("unseen"),
        held_out=joined("held_out"),
        seconds=float(sum(float(part["seconds"]) for part in results)),
    )


def _batches(policies: Mapping[str, Policy], config: TrialConfig, directory: Path) -> dict[int, tuple[str, ...]]:
    """Batches that contain the given policies, as number -> names of policies.

    A policy stays in its first batch, because results are stored by batch.
    """
    path = directory / "batches.json"
    batches: list[list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    known = {name for batch in batches for name in batch}
    # Static policies separately, because a batch is evaluated as often as its most demanding policy needs.
    for steering in (False, True):
        new = [n for n, p in policies.items() if n not in known and isinstance(p, StaticPolicy) != steering]
        batches += [new[i : i + config.runs_at_once] for i in range(0, len(new), config.runs_at_once)]
    write_atomically(path, (json.dumps(batches, indent=1) + "\n").encode())
    return {number: tuple(batch) for number, batch in enumerate(batches) if set(batch) & set(policies)}


@dataclass(frozen=True, kw_only=True)
class _Bases:
    """The base models as units of work, one for each seed."""

    corpus: Corpus
    config: TrialConfig
    directory: Path
    device: str

    def work(self, number: int) -> dict[str, Tensor]:
        seed = self.config.seed + number
        return train_bases(
            self.corpus,
            self.corpus.start_state[None],
            replace(self.config.base, models=1, seed=seed),
            replace(self.config.model, seed=seed),
            self.directory / f"base-{number}",
            row_tokens=self.config.row_tokens,
            device=self.device,
            progress=False,
        )


@dataclass(frozen=True, kw_only=True)
class TrialRuns:
    """The runs as units of work: all batches of the first seed, then those of the second, and so on.

    See `run_trial` for the arguments that are not described here.

    Args:
        policies: Name -> policy.
        batches: Number of a batch -> names of its policies.
        bases: Weights of the base model of each seed, (1, ...) each.
    """

    policies: Mapping[str, Policy]
    batches: Mapping[int, tuple[str, ...]]
    corpus: Corpus
    questions: ProxyQuestions
    unseen: ProxyQuestions
    config: TrialConfig
    bases: Sequence[Mapping[str, Tensor]]
    directory: Path
    device: str

    def work(self, number: int) -> dict[str, Tensor]:
        """Trains one batch, starting from the state in its file if there is one; returns the tensors of its result."""
        seed, position = divmod(number, len(self.batches))
        batch, names = list(self.batches.items())[position]
        path = self.directory / f"seed-{seed}-batch-{batch:03d}.safetensors"
        saved = load_file(str(path)) if path.exists() else {}
        self._check(names, saved)
        if saved and "model.updates" not in saved:
            return saved
        missing = [name for name in names if name not in self.policies]
        if missing:
            raise ConfigurationError(
                f"the runs of {', '.join(names)} are unfinished, but {', '.join(missing)} is missing: pass the same "
                "policies again, or use another directory"
            )
        return self._run(seed, names, path, saved)

    def _check(self, names: Sequence[str], saved: Mapping[str, Tensor]) -> None:
        for position, name in enumerate(names):
            if not saved or name not in self.policies:
                continue
            mixes, feedback = saved["mixes"][position].numpy(), saved["feedback"][position].numpy()
            first = proposal(self.policies[name], self.questions.fields, mixes[:1], feedback[:1])
            if total_variation(first, mixes[1]) > 1e-6:
                raise StateError(
                    f"policy {name!r} begins with another mix than the run of that name in {self.directory}: it is "
                    "a different policy; give it another name, or use another directory"
                )

    def _run(self, seed: int, names: Sequence[str], path: Path, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.config
        policies = [self.policies[name] for name in names]
        start = {name: tensor.expand(len(names), *tensor.shape[1:]) for name, tensor in self.bases[seed].items()}
        trainer = ProxyTrainer(len(names), config.model, start=start, device=self.device)
        held_out = HeldOutRows(self.corpus, rows_per_field=config.held_out_rows, row_tokens=config.row_tokens)
        base = _selected(trainer.averaged, np.zeros(1, dtype=np.int64))
        loop = ClosedLoop(
            policies,
            trainer,
            self.corpus,
            config.loop,
            numbers=[TRIAL + seed] * len(names),
            start_state=self.corpus.start_state,
            fields=self.questions.fields,
            base_feedback=self.questions.feedback(base),
        )
        if saved:
            trainer.load_state({k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
            loop.restore(saved["mixes"].numpy(), saved["feedback"].numpy(), int(saved["step"]))
            unseen, losses = saved["unseen"].numpy(), saved["held_out"].numpy()
        else:
            unseen = np.full_like(loop.feedback, np.nan)
            unseen[:, 0] = self.unseen.feedback(base)
            losses = np.full((*loop.mixes.shape[:2], len(FIELDS)), np.nan)
            losses[:, 0] = held_out.losses(base)
        seconds = float(saved["seconds"]) if saved else 0.0
        steered = not all(isinstance(policy, StaticPolicy) for policy in policies)
        started = time.perf_counter()
        while loop.advance():
            due = self._due(loop)
            if steered or loop.step % config.evaluate_every == 0:
                loop.feedback[loop.active, loop.step] = self.questions.feedback(trainer.averaged)
            if due.any():
                runs, models = loop.active[due], _selected(trainer.averaged, np.flatnonzero(due))
                loop.feedback[runs, loop.step] = self.questions.feedback(models)
                unseen[runs, loop.step] = self.unseen.feedback(models)
                losses[runs, loop.step] = held_out.losses(models)
            last = len(loop.staying) == 0
            if last or loop.step % SAVE_EVERY == 0:
                saved = {
                    "mixes": torch.from_numpy(loop.mixes),
                    "feedback": torch.from_numpy(loop.feedback),
                    "unseen": torch.from_numpy(unseen),
                    "held_out": torch.from_numpy(losses),
                    "lengths": torch.from_numpy((loop.mixes.sum(axis=-1) > 0).sum(axis=-1) - 1),
                    "step": torch.tensor(loop.step),
                    "seconds": torch.tensor(seconds + time.perf_counter() - started, dtype=torch.float64),
                }
                state = {} if last else {f"model.{name}": tensor for name, tensor in trainer.state().items()}
                save_tensors(path, {**saved, **state})
        return dict(saved)

    def _due(self, loop: ClosedLoop) -> npt.NDArray[np.bool_]:
        """Mask of the active runs that are evaluated in full after this step."""
        marks = np.array(self.config.marks) * self.config.target_tokens
        used = loop.target_tokens[loop.active, loop.step - 1 : loop.step + 1, None]
        passed = (used >= marks).sum(axis=-1)
        return np.asarray((passed[:, 1] > passed[:, 0]) | ~np.isin(loop.active, loop.staying))


def _selected(proxies: StackedProxies, positions: IntArray) -> StackedProxies:
    """Copies some of the stacked models."""
    chosen = StackedProxies(len(positions), proxies.config).to(proxies.embedding.device)
    index = torch.from_numpy(positions).to(proxies.embedding.device)
    chosen.load_state_dict({name: tensor[index] for name, tensor in proxies.state_dict().items()})
    return chosen

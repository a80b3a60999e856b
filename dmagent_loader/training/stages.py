"""The whole training, stage by stage: from text files to agent checkpoints.

- trajectories: corpus, start states, Algorithm 1.
- feedback: base models, proxies, the recorded set.
- sft: supervised warm-up.
- cql: Conservative Q-Learning of the warmed-up agent.

Each stage writes its result into the output directory and is skipped if the result exists, so a run that was killed
continues where it stopped. A result of other settings is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from dmagent_loader._files import write_atomically
from dmagent_loader._validation import shown
from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.checkpoint import bundled_roots, only_in_repository
from dmagent_loader.agent.critic import save_critics
from dmagent_loader.environment.questions import read_questions
from dmagent_loader.errors import ConfigurationError, ShardNotFoundError, StateError
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.training.cards import cql_card, cql_report, sft_card, sft_report
from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.train import train_cql
from dmagent_loader.training.data.corpus import Corpus, CorpusConfig, build_corpus
from dmagent_loader.training.proxies.bases import BaseConfig, start_states, train_bases
from dmagent_loader.training.proxies.feedback import FeedbackConfig, collect_feedback
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.workers import Workers
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.run_folder import SETTINGS, claim
from dmagent_loader.training.sft import SFTConfig, train_sft
from dmagent_loader.training.trajectories import Trajectories, TrajectoryConfig, sample_trajectories

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="DataclassInstance")

CORPUS, BASES, TRAJECTORIES, FEEDBACK, RECORDED, SFT, RL = (
    "corpus",
    "bases",
    "trajectories.safetensors",
    "feedback",
    "recorded.safetensors",
    "sft",
    "rl",
)
"""Names of the stages' results in the output directory."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """All settings of a run; the defaults are those of the bundled agents.

    Args:
        target: Folder of the target documents in the data directory; source documents are in ``source/<Topic>.jsonl``
            or ``.jsonl.gz``.
        questions: Field -> question file in the data directory; the field to keep comes first, then the one to learn.
        corpus: Settings of tokenizer, topics and tokens.
        trajectories: Settings of Algorithm 1. The target field has 52% of the tokens of a full trajectory, as in the
            paper.
        feedback: Settings of base models, proxies and questions.
        sft: Settings of the supervised warm-up.
        cql: Settings of Conservative Q-Learning.
    """

    target: str = "target_math"
    questions: Mapping[str, str] = field(
        default_factory=lambda: {"general": "env/mmlu_val.jsonl.gz", "math": "env/math_train_500.jsonl.gz"}
    )
    corpus: CorpusConfig = field(default_factory=lambda: CorpusConfig(max_tokens=400_000))
    trajectories: TrajectoryConfig = field(
        default_factory=lambda: TrajectoryConfig(tokens_per_step=2048, target_tokens=85_000, target_weight=0.5)
    )
    feedback: FeedbackConfig = field(
        default_factory=lambda: FeedbackConfig(
            bases=BaseConfig(tokens=3_000_000),
            proxy=ProxyConfig(rows_per_update=4, learning_rate=1.5e-3, warmup_updates=20, averaging=0.95),
            questions=QuestionConfig(max_questions=(64, 24), batch_tokens=256),
        )
    )
    sft: SFTConfig = field(
        default_factory=lambda: SFTConfig(expert_share=0.2, updates=300, evaluate_every=10, validation=8, test=8)
    )
    cql: CQLConfig = field(default_factory=CQLConfig)


def full_config() -> PipelineConfig:
    """Settings of the bundled agents: 384 trajectories of up to 80 steps; hours on two CPU cores."""
    return PipelineConfig()


def small_config() -> PipelineConfig:
    """Settings for a trial of all stages in minutes on two CPU cores; the resulting agents are not usable."""
    return with_settings(
        PipelineConfig(),
        {
            "corpus": {"max_tokens": 100_000},
            "trajectories": {"candidates_per_step": [1, 100, 1000], "trajectories_per_set": 12, "steps": 24}
            | {"target_tokens": 25_500},
            "feedback": {"bases": {"models": 2, "tokens": 500_000}, "questions": {"max_questions": [32, 12]}},
            "sft": {"expert_share": 0.4, "updates": 200, "validation": 2, "test": 2},
            "cql": {"updates": 200, "warmup_updates": 50},
        },
    )


CONFIGS = {"full": full_config, "small": small_config}
"""Settings by name."""


def with_settings(config: T, values: Mapping[str, Any]) -> T:
    """Replaces some settings of a config by the values of nested mappings, as in a JSON file.

    Raises:
        ConfigurationError: A name is not a setting, or a value is of another kind than the setting.

    Example:
        >>> with_settings(PipelineConfig(), {"trajectories": {"steps": 5}}).trajectories.steps
        5
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"the settings of {type(config).__name__} are {shown(values)}: give an object, name -> value"
        )
    known = {f.name for f in dataclasses.fields(config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigurationError(f"{type(config).__name__} has no settings {unknown}; it has {sorted(known)}")
    changes: dict[str, Any] = {}
    for name, value in values.items():
        present = getattr(config, name)
        if dataclasses.is_dataclass(present) and not isinstance(present, type):
            changes[name] = with_settings(present, value)
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    try:
        return dataclasses.replace(config, **changes)
    except TypeError as error:  # a comparison inside, as of a text and a number
        raise ConfigurationError(
            f"{type(config).__name__} does not take {shown(changes)} ({error}): give values like its defaults"
        ) from error


def find_record(name_or_path: str | Path) -> Path:
    """File of a recorded set, from the path of the file or its folder, or from the name of a set of the repository.

    Raises:
        StateError: There is neither a file nor a set of that name.
    """
    for path in (Path(name_or_path), Path(name_or_path) / RECORDED):
        if path.is_file():
            return path
    named = {path.parent.name: path for root in bundled_roots() for path in root.glob(f"*/{RECORDED}")}
    if str(name_or_path) not in named:
        raise StateError(
            f"there is no recorded set {str(name_or_path)!r}: give a file, or one of the names that are known here "
            f"({', '.join(sorted(named)) or 'none'}){only_in_repository(str(name_or_path))}"
        )
    return named[str(name_or_path)]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The stages of one run.

    Args:
        config: Settings.
        output: Folder for the results of all stages.
        data: Folder with ``source/<Topic>.jsonl(.gz)``, the target folder and the question files; None: only the stages
            whose inputs are already in `output` can run.
        recorded: A recorded set to train on instead of collecting one: see `find_record`.
        notes: Description of the text and its licences for the model cards: Markdown sections.
        workers: Number and place of the workers that collect the feedback.
        device: Device of the proxies, see `ProxyTrainer`.
        progress: Whether to show progress bars.
    """

    config: PipelineConfig
    output: Path
    data: Path | None = None
    recorded: str | Path | None = None
    notes: str = "## Data\n\nThe person who trained this agent has not described the data."
    workers: Workers = field(default_factory=Workers)
    device: str = "cpu"
    progress: bool = True

    def corpus(self) -> Corpus:
        """The corpus, built from the text files unless it exists.

        Raises:
            ShardNotFoundError: The data directory does not have the expected layout.
            StateError: The existing corpus has other settings.
        """
        directory = self.output / CORPUS
        if (directory / "corpus.json").exists():
            corpus = Corpus.load(directory)
            if corpus.facts["settings"] != json.loads(json.dumps(asdict(self.config.corpus))):
                raise StateError(
                    f"the corpus in {directory} was built with other settings: use another output directory"
                )
            return corpus
        data = self._data()
        source = {path.name.split(".")[0]: [path] for path in sorted((data / "source").glob("*.jsonl*"))}
        target = sorted((data / self.config.target).glob("*.jsonl*"))
        if not source or not target:
            raise ShardNotFoundError(
                f"{data} has {len(source)} files source/<Topic>.jsonl(.gz) and {len(target)} files "
                f"{self.config.target}/*.jsonl(.gz): both fields need text; point --data at a folder of that layout"
            )
        logger.info("building the corpus from %d source and %d target files", len(source), len(target))
        corpus = build_corpus(source, target, self.config.corpus)
        corpus.save(directory)
        return corpus

    def trajectories(self) -> Trajectories:
        """The trajectories, drawn unless they exist.

        Raises:
            ShardNotFoundError, StateError: See `corpus`.
        """
        path = self.output / TRAJECTORIES
        config = self.config.trajectories
        if path.exists():
            trajectories = Trajectories.load(path)
            if trajectories.config != config:
                raise StateError(f"{path} was drawn with other settings: use another output directory")
            return trajectories
        corpus = self.corpus()
        states = start_states(corpus.start_state, self.config.feedback.bases)
        total = len(config.candidates_per_step) * config.trajectories_per_set
        with tqdm(total=total, desc="trajectories", disable=not self.progress) as bar:
            trajectories = sample_trajectories(
                states, corpus.target_distribution, config, on_trajectory=lambda: bar.update()
            )
        trajectories.save(path)
        return trajectories

    def questions(self, corpus: Corpus) -> ProxyQuestions:
        """The question sets that score the proxies.

        Raises:
            EnvironmentDataError: A question file is missing or damaged, or none of its pairs is short enough.
        """
        files = {name: self._data() / relative for name, relative in self.config.questions.items()}
        return ProxyQuestions.from_files(files, corpus.tokenizer(), self.config.feedback.questions)

    def record(self) -> FeedbackRecord:
        """The recorded set: the given one, or else one that is collected unless it exists.

        Raises:
            ShardNotFoundError, StateError: See `corpus`.
        """
        if self.recorded is not None:
            return FeedbackRecord.load(find_record(self.recorded))
        path = self.output / RECORDED
        if path.exists():
            record = FeedbackRecord.load(path)
            if record.settings["collection"] != json.loads(json.dumps(asdict(self.config.feedback))):
                raise StateError(f"{path} was collected with other settings: use another output directory")
            return record
        corpus, config = self.corpus(), self.config.feedback
        questions = self.questions(corpus)  # first: drawing the trajectories takes long
        trajectories = self.trajectories()
        states = start_states(corpus.start_state, config.bases)
        bases = train_bases(
            corpus,
            states,
            config.bases,
            config.proxy,
            self.output / BASES,
            row_tokens=config.row_tokens,
            device=self.device,
            progress=self.progress,
        )
        record = collect_feedback(
            trajectories,
            corpus,
            questions,
            bases,
            config,
            self.output / FEEDBACK,
            workers=self.workers,
            device=self.device,
            progress=self.progress,
        )
        record.save(path)
        # Mixes are rounded in the file: the first call must return the same as later ones.
        return FeedbackRecord.load(path)

    def sft(self) -> MixingAgent:
        """The agent after the supervised warm-up, trained unless it exists.

        Raises:
            ShardNotFoundError, StateError: See `record`.
        """
        directory = self.output / SFT
        if self._is_done(directory, self.config.sft):
            return MixingAgent.from_pretrained(directory)
        record = self.record()
        self._claim(directory, self.config.sft)
        # The longest recorded history; the agent warns about longer ones.
        agent_config = AgentConfig(max_steps=record.trajectories.config.steps, keep_topics=self._keep_topics())
        with tqdm(total=self.config.sft.updates, desc="sft", disable=not self.progress) as bar:
            result = train_sft(record, self.config.sft, agent_config, on_update=lambda: bar.update())
        result.agent.save_pretrained(directory, card=sft_card(record, result, self.notes))
        write_atomically(self.output / "sft.md", sft_report(record, result).encode())
        return result.agent

    def cql(self) -> MixingAgent:
        """The agent after Conservative Q-Learning, trained unless it exists; its critics are saved in ``critic``.

        Raises:
            ShardNotFoundError, StateError: See `record`.
        """
        directory = self.output / RL
        if self._is_done(directory, self.config.cql):
            return MixingAgent.from_pretrained(directory)
        warm = self.sft()
        record = self.record()
        self._claim(directory, self.config.cql)
        result = train_cql(record, warm, self.config.cql, progress=self.progress)
        save_critics(result.critics, directory / "critic")
        result.agent.save_pretrained(directory, card=cql_card(record, self.config.cql, result, self.notes))
        write_atomically(self.output / "cql.md", cql_report(result).encode())
        return result.agent

    def _is_done(self, directory: Path, config: SFTConfig | CQLConfig) -> bool:
        """Whether the checkpoint exists; refuses one of other settings."""
        if (directory / SETTINGS).exists():
            self._claim(directory, config)
        return (directory / "config.json").exists()

    def _claim(self, directory: Path, config: SFTConfig | CQLConfig) -> None:
        """Reserves a checkpoint's folder. Called after its inputs exist: a mistyped name must not reserve it."""
        settings: dict[str, Any] = {"training": asdict(config)}
        if isinstance(config, CQLConfig):
            settings["sft"] = asdict(self.config.sft)
        settings["recorded"] = str(self.recorded) if self.recorded else "collected"
        claim(directory, settings, "an agent")

    def _keep_topics(self) -> tuple[float, ...] | None:
        """Topics of the questions to keep; None: without a data directory they are unknown."""
        if self.data is None:
            return None
        listed = read_questions(self.data / next(iter(self.config.questions.values())))
        shares = LinearClassifier.bundled().shares([f"{q.question} {q.answer}" for q in listed])
        return tuple(float(share) for share in shares)

    def _data(self) -> Path:
        if self.data is None:
            raise ConfigurationError(
                f"{self.output} lacks the inputs of this stage, and there is no data directory to build them from: "
                "pass --data, or --recorded for the stages that train an agent"
            )
        return self.data

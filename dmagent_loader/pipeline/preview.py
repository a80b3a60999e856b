"""The whole pipeline in one command, at the size of the preview weights: minutes on one CPU core.

Corpus, trajectories, feedback, agent: every stage leaves its result in the output directory and is skipped when its
result is there, so a run that was killed goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.errors import ConfigurationError, ShardNotFoundError, StateError
from dmagent_loader.history import Standardization
from dmagent_loader.pipeline.card import model_card, report
from dmagent_loader.pipeline.corpus import Corpus, CorpusConfig, build_corpus
from dmagent_loader.pipeline.feedback import FeedbackConfig, FeedbackRecord, collect_feedback
from dmagent_loader.pipeline.proxies import ProxyConfig
from dmagent_loader.pipeline.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.pipeline.rollout import Rollout, skewed_start_state, steer_proxies
from dmagent_loader.pipeline.sft import SFTConfig, train_sft
from dmagent_loader.pipeline.trajectories import Trajectories, TrajectoryConfig, sample_trajectories
from dmagent_loader.simplex import FloatArray

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """All settings of a run; the defaults are those of the bundled preview weights.

    Args:
        target: Folder of the target documents below the data directory; source documents lie in
            ``source/<Topic>.jsonl`` or ``.jsonl.gz``.
        questions: Field -> question file below the data directory; first the field to keep, then the one to learn.
        corpus: Tokenizer, topics, tokens.
        trajectories: Algorithm 1. The target field has 52% of the tokens of a full trajectory, as in the paper.
        feedback: Proxies and questions.
        sft: The agent's training.
    """

    target: str = "target_math"
    questions: Mapping[str, str] = field(
        default_factory=lambda: {"general": "env/mmlu_val.jsonl.gz", "math": "env/math_train_500.jsonl.gz"}
    )
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    trajectories: TrajectoryConfig = field(
        default_factory=lambda: TrajectoryConfig(
            trajectories_per_set=24, steps=24, tokens_per_step=4096, target_tokens=51_118
        )
    )
    feedback: FeedbackConfig = field(
        default_factory=lambda: FeedbackConfig(proxy=ProxyConfig(), questions=QuestionConfig(max_questions=160))
    )
    sft: SFTConfig = field(default_factory=SFTConfig)


def with_settings(config: T, values: Mapping[str, Any]) -> T:
    """A config with some settings replaced, from nested mappings as in a JSON file.

    Raises:
        ConfigurationError: A name that is no setting.

    Example:
        >>> with_settings(PreviewConfig(), {"trajectories": {"steps": 5}}).trajectories.steps
        5
    """
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
    return dataclasses.replace(config, **changes)


def prepare_corpus(config: PreviewConfig, data: Path, output: Path) -> Corpus:
    """The corpus in ``output/corpus``, built from the text files unless it is there."""
    directory = output / "corpus"
    if (directory / "corpus.json").exists():
        corpus = Corpus.load(directory)
        if corpus.facts["settings"] != json.loads(json.dumps(asdict(config.corpus))):
            raise StateError(f"the corpus in {directory} was built with other settings: use another output directory")
        return corpus
    source = {path.name.split(".")[0]: [path] for path in sorted((data / "source").glob("*.jsonl*"))}
    target = sorted((data / config.target).glob("*.jsonl*"))
    if not source or not target:
        raise ShardNotFoundError(
            f"{data} has {len(source)} files source/<Topic>.jsonl(.gz) and {len(target)} files "
            f"{config.target}/*.jsonl(.gz): both fields need text; point --data at a folder of that layout"
        )
    logger.info("building the corpus from %d source and %d target files", len(source), len(target))
    corpus = build_corpus(source, target, config.corpus)
    corpus.save(directory)
    return corpus


def prepare_trajectories(config: PreviewConfig, corpus: Corpus, output: Path, *, progress: bool) -> Trajectories:
    """The trajectories in ``output/trajectories.safetensors``, drawn unless they are there."""
    path = output / "trajectories.safetensors"
    if path.exists():
        trajectories = Trajectories.load(path)
        if trajectories.config != config.trajectories:
            raise StateError(f"{path} was drawn with other settings: use another output directory")
        return trajectories
    total = len(config.trajectories.candidates_per_step) * config.trajectories.trajectories_per_set
    with tqdm(total=total, desc="trajectories", disable=not progress) as bar:
        trajectories = sample_trajectories(
            corpus.start_state, corpus.target_distribution, config.trajectories, on_trajectory=bar.update
        )
    trajectories.save(path)
    return trajectories


def prepare_feedback(
    config: PreviewConfig, data: Path, corpus: Corpus, trajectories: Trajectories, output: Path, *, progress: bool
) -> FeedbackRecord:
    """The recorded set in ``output/recorded.safetensors``, collected unless it is there."""
    path = output / "recorded.safetensors"
    if path.exists():
        record = FeedbackRecord.load(path)
        if record.settings["trajectories"] != trajectories.fingerprint:
            raise StateError(f"{path} is of other trajectories: use another output directory")
        return record
    files = {name: data / relative for name, relative in config.questions.items()}
    questions = ProxyQuestions.from_files(files, corpus.tokenizer(), config.feedback.questions)
    record = collect_feedback(trajectories, corpus, questions, config.feedback, output / "feedback", progress=progress)
    record.save(path)
    return record


def train_preview(config: PreviewConfig, data: Path, output: Path, *, notes: str, progress: bool = True) -> Path:
    """Runs all stages: text files to a checkpoint directory.

    Args:
        config: Settings.
        data: Folder with ``source/<Topic>.jsonl(.gz)``, the target folder and the question files.
        output: For the results of all stages; partial results in it are continued.
        notes: For the model card: what the text is and under which licences; Markdown sections.
        progress: Whether to show progress bars.

    Returns:
        ``output/checkpoint``, which `MixingAgent.from_pretrained` loads; the recorded set lies in it too.

    Raises:
        ShardNotFoundError: `data` has not that layout.
        StateError: `output` holds results of other settings.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare_corpus(config, data, output)
    trajectories = prepare_trajectories(config, corpus, output, progress=progress)
    record = prepare_feedback(config, data, corpus, trajectories, output, progress=progress)
    agent_config = AgentConfig(max_steps=config.trajectories.steps)
    with tqdm(total=config.sft.updates, desc="sft", disable=not progress) as bar:
        result = train_sft(record, config.sft, agent_config, on_update=bar.update)
    logger.info("steering proxies with the trained agent")
    rollouts = roll_out(config, data, corpus, result.agent)
    checkpoint = output / "checkpoint"
    result.agent.save_pretrained(checkpoint, card=model_card(record, result, rollouts, notes))
    record.save(checkpoint / "recorded.safetensors")
    (output / "report.md").write_text(report(record, result, rollouts), encoding="utf-8")
    logger.info("%s is complete after %.0f s", checkpoint, time.perf_counter() - started)
    return checkpoint


def roll_out(config: PreviewConfig, data: Path, corpus: Corpus, agent: MixingAgent) -> dict[str, Rollout]:
    """Closed loops with the trained agent: as in the recorded trajectories, and as in continual pre-training."""
    files = {name: data / relative for name, relative in config.questions.items()}
    questions = ProxyQuestions.from_files(files, corpus.tokenizer(), config.feedback.questions)
    steps, tokens = config.trajectories.steps, config.trajectories.tokens_per_step

    def steer(start_state: FloatArray, pretraining_steps: int, standardization: Standardization) -> Rollout:
        return steer_proxies(
            agent,
            corpus,
            questions,
            config.feedback,
            start_state,
            steps=steps,
            tokens_per_step=tokens,
            pretraining_steps=pretraining_steps,
            standardization=standardization,
        )

    skewed = skewed_start_state(config.trajectories.seed)
    pretrained = f"proxies pre-trained for {steps} steps"
    return {
        "as recorded: untrained proxies, the corpus's start state, frozen statistics": steer(
            corpus.start_state, 0, "frozen"
        ),
        f"{pretrained} on the corpus's start state, anchored statistics": steer(corpus.start_state, steps, "anchored"),
        f"{pretrained} on a made-up skewed start state, anchored statistics": steer(skewed, steps, "anchored"),
    }

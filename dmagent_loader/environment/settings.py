"""Settings of an environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmagent_loader._validation import shown, whole_number
from dmagent_loader.environment.calling import LogitsOf
from dmagent_loader.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class EnvironmentSettings:
    """Settings for computing feedback from question sets.

    Args:
        score: ``"answer"``: mean over the answer's tokens given the question (Eq. 1, reconstructed).
            ``"pair"``: mean over the tokens of question and answer, which is less noisy for short answers (extension).
        cloze: Omit the list of choices from multiple-choice questions, see `questions.read_questions`.
        separator: Text inserted between question and answer and scored with the answer, like ``target_delimiter`` in
            lm-evaluation-harness, which has the same default. A white-space separator is dropped if the question ends
            or the answer begins with white space.
        max_length: Maximum number of tokens the model reads; longer pairs are truncated from the left. None: the
            length in the model's configuration, else the tokenizer's, else 2048.
        max_questions: Maximum number of questions per field, evenly spaced over its files. None: all.
        batch_size: Maximum number of pairs per model call. Does not change the feedback.
        batch_tokens: Maximum number of tokens per model call, including padding. Does not change the feedback. None:
            8192, or 1024 on a CPU to fit its caches.
        prefix_token_id: Token used as the context of an empty question. None: the tokenizer's BOS token, else its EOS
            token.
        progress: Whether rank 0 shows a progress bar on a terminal.
        logits_of: Function from model, input ids and attention mask, both (B, T) int64 and padded on the right, to
            logits, (B, T, V). None: the model is called as its signature says, see `scoring.Model`.

    Raises:
        ConfigurationError: A value is invalid.
    """

    score: Literal["answer", "pair"] = "answer"
    cloze: bool = False
    separator: str = " "
    max_length: int | None = None
    max_questions: int | None = None
    batch_size: int = 64
    batch_tokens: int | None = None
    prefix_token_id: int | None = None
    progress: bool = True
    logits_of: LogitsOf | None = None

    def __post_init__(self) -> None:
        if self.score not in ("answer", "pair"):
            raise ConfigurationError(f"unknown score {self.score!r}; choose 'answer' or 'pair'")
        for name in ("max_length", "max_questions", "batch_size", "batch_tokens"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        for name in ("cloze", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} is {shown(getattr(self, name))}; it must be True or False")
        if self.logits_of is not None and not callable(self.logits_of):
            raise ConfigurationError(
                f"logits_of is {shown(self.logits_of)}; it must be a function of (model, input_ids, attention_mask)"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EnvironmentSettings:
        """Builds settings from a mapping; missing entries keep their defaults.

        Raises:
            ConfigurationError: A value is invalid or a name is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ConfigurationError(f"an environment has no settings {unknown}; choose from {names}")
        return cls(**settings)

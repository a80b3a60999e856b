"""Settings of an environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class EnvironmentSettings:
    """How question sets are turned into feedback.

    Args:
        score: ``"answer"``: the mean over the answer's tokens given the question (Eq. 1, reconstructed).
            ``"pair"``: the mean over the tokens of question and answer, less noisy where answers are short (extension).
        cloze: Ask multiple choice questions without the list of choices, see `questions.read_questions`.
        separator: Put between question and answer and scored with the answer, as lm-evaluation-harness does with its
            ``target_delimiter``, whose default is the same. White space is left out where white space is there already.
        max_length: The most tokens that the model reads; what does not fit is cut from the left. None: the length in
            the model's configuration, else the tokenizer's, else 2048.
        max_questions: The most questions of a field, evenly spaced in its files. None: all.
        batch_size: The most pairs in a call of the model.
        batch_tokens: The most tokens in a call of the model, padding included. None: 8192, or 1024 on a CPU, whose
            caches hold no more. Neither changes the feedback.
        prefix_token_id: Stands in for an empty question. None: the tokenizer's BOS token, else its EOS token.
        progress: Whether rank 0 shows a progress bar.

    Raises:
        ConfigurationError: A value that cannot work.
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

    def __post_init__(self) -> None:
        if self.score not in ("answer", "pair"):
            raise ConfigurationError(f"unknown score {self.score!r}; choose 'answer' or 'pair'")
        for name in ("max_length", "max_questions", "batch_size", "batch_tokens"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        for name in ("cloze", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} is {shown(getattr(self, name))}; it must be True or False")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EnvironmentSettings:
        """The settings with these values, and defaults for the others.

        Raises:
            ConfigurationError: A value that cannot work, or one for no setting.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ConfigurationError(f"an environment has no settings {unknown}; it has {names}")
        return cls(**settings)

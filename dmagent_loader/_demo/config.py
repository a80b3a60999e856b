"""The sizes of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from dmagent_loader.errors import ConfigurationError

CONTEXT_TOKENS = 512
"""Positions of the model: more than a row, because a question with its answer may be longer."""

MIN_VOCAB = 512

DEFAULT_AGENT = "dmagent-rl"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of training and evaluation; the defaults take about four minutes on two CPU cores.

    Args:
        seed: Seed of the model's first weights and of the order of samples.
        vocab_size: Vocabulary size of the byte-level BPE tokenizer.
        row_tokens: Length of a packed training row.
        batch_rows: Rows in one optimizer step.
        hidden_size: Width of the model.
        num_layers: Number of layers of the model.
        base_steps: Optimizer steps of the base model, on the source field.
        base_learning_rate: Peak learning rate of the base model; cosine decay to a tenth.
        decisions: Reweighting steps of each continual run.
        steps_per_decision: Optimizer steps between two decisions.
        run_learning_rate: Peak learning rate of the continual runs; linear decay to zero.
        source_chars: Maximum number of characters of training text of the source field.
        target_chars: Maximum number of characters of training text of the target field.
        questions: Maximum number of questions of each field of the environment.
        question_chars: Maximum number of characters in all questions and answers of a field; bounds the cost of an
            evaluation.
        held_out_rows: Maximum number of rows of each field for the held-out loss.
        num_threads: CPU threads; a model this small gains nothing from many, and results would depend on them.
    """

    seed: int = 0
    vocab_size: int = 2048
    row_tokens: int = 128
    batch_rows: int = 8
    hidden_size: int = 128
    num_layers: int = 4
    base_steps: int = 700
    base_learning_rate: float = 3e-3
    decisions: int = 20
    steps_per_decision: int = 14
    run_learning_rate: float = 1.5e-3
    source_chars: int = 3_000_000
    target_chars: int = 1_800_000
    questions: int = 120
    question_chars: int = 40_000
    held_out_rows: int = 160
    num_threads: int = 2

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB:
            raise ConfigurationError(
                f"vocab_size is {self.vocab_size}, but a byte-level tokenizer needs {MIN_VOCAB} or more"
            )
        if not 2 <= self.row_tokens <= CONTEXT_TOKENS:
            raise ConfigurationError(f"row_tokens is {self.row_tokens}; it must be between 2 and {CONTEXT_TOKENS}")

    @classmethod
    def quick(cls) -> DemoConfig:
        """All stages with a few seconds of training: a check that everything works, with meaningless numbers."""
        return cls(
            vocab_size=1024,
            row_tokens=64,
            hidden_size=64,
            num_layers=2,
            base_steps=40,
            decisions=3,
            steps_per_decision=6,
            source_chars=900_000,
            target_chars=500_000,
            questions=40,
            question_chars=16_000,
            held_out_rows=40,
            num_threads=1,
        )

    @property
    def samples_per_reweight(self) -> int:
        """Rows between two decisions."""
        return self.steps_per_decision * self.batch_rows

    @property
    def run_steps(self) -> int:
        """Optimizer steps of each continual run."""
        return self.decisions * self.steps_per_decision

    @property
    def run_tokens(self) -> int:
        """Token budget of each continual run."""
        return self.run_steps * self.batch_rows * self.row_tokens

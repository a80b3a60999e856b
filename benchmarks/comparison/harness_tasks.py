"""Tasks of lm-evaluation-harness from local files, and its scores of a proxy.

Questions and text are those halves of the comparison's sets that neither feedback nor influence reads.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dmagent_loader.environment import Environment, Question
from dmagent_loader.environment.encoding import PairEncoder, request
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.data.corpus import END_OF_TEXT
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.proxies.language_model import ProxyModel
from dmagent_loader.training.tasks.library import QUESTIONS, TaskLibrary
from dmagent_loader.training.tasks.spec import TaskSpec

SETS = ("hellaswag", "arc", "boolq", "piqa", "openbookqa")
"""Question sets with candidate answers that each task is scored on; the task itself keeps one of them or none."""
NO_YES = ["no", "yes"]
"""Candidate answers of sets without a list."""
ACQUIRE, SOURCE_TEXT, TARGET_TEXT = "acquire", "source text", "target text"
LOG_LIKELIHOOD, ACCURACY, ACCURACY_NORM, BITS = "log-likelihood", "accuracy", "normalized accuracy", "bits per byte"
"""Scores: log-likelihood of the right answer in nats; ``acc``, ``acc_norm`` and ``bits_per_byte`` of the harness."""
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task of the harness.

    Args:
        name: Its name.
        output_type: Its kind.
        rows: Columns ``text`` and ``target``; for multiple choice, ``choices`` and the position of the right one as
            ``target``.

    Raises:
        ConfigurationError: There are no rows.
    """

    name: str
    output_type: Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling"]
    rows: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigurationError(
                f"the task {self.name!r} has nothing to score: none of its questions, or of the held-out text of its "
                "field, fits into a row; give more of them in the data folder"
            )


def harness_tasks(library: TaskLibrary, spec: TaskSpec) -> list[HarnessTask]:
    """The tasks of the harness that models of a task of the comparison are scored on."""

    def unread(name: str, side: str) -> list[Question]:
        return library.questions(spec.target, name, side).scored

    tokenizer = library.corpus(spec.target).tokenizer()
    found = [
        HarnessTask(
            name=name,
            output_type="multiple_choice",
            rows=choice_rows(unread(name, "keep"), candidates(library.data, name), tokenizer),
        )
        for name in SETS
    ]
    if spec.acquire != "text":
        answers = [request(question, " ") for question in unread(spec.acquire, "acquire")]
        rows = [{"text": context, "target": continuation} for context, continuation in answers]
        found.append(HarnessTask(name=ACQUIRE, output_type="loglikelihood", rows=rows))
    for name, side in ((SOURCE_TEXT, "keep"), (TARGET_TEXT, "acquire")):
        rows = [{"text": "", "target": piece.question + piece.answer} for piece in unread("text", side)]
        found.append(HarnessTask(name=name, output_type="loglikelihood_rolling", rows=rows))
    return found


def candidates(data: Path, name: str) -> dict[tuple[str, str], list[str]]:
    """Candidate answers of a question set: (question, right answer) -> all answers."""
    found = {}
    for file in QUESTIONS[name]:
        with gzip.open(data / "env" / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if "choices" in row:
                    found[row.get("stem", row["question"]), row["choices"][row["answer_index"]]] = row["choices"]
                else:
                    found[row["question"], row["answer"]] = NO_YES
    return found


def choice_rows(
    questions: Sequence[Question], choices: Mapping[tuple[str, str], Sequence[str]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Questions as rows of a multiple choice task; one with a candidate answer that does not fit is left out."""
    encoder = PairEncoder(tokenizer)
    rows = []
    for question in questions:
        listed = list(choices[question.question, question.answer])
        pairs = [encoder.encode(*request(replace(question, answer=answer), " "), question.origin) for answer in listed]
        if all(len(pair.tokens) <= ROW_TOKENS + 1 for pair in pairs):
            rows.append({"text": question.question, "choices": listed, "target": listed.index(question.answer)})
    return rows


class CausalLM(nn.Module):
    """A proxy with the attributes that the harness asks of a model of transformers."""

    device = torch.device("cpu")

    def __init__(self, model: ProxyModel) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.model, self.config = model, PretrainedConfig()

    def tie_weights(self) -> None:
        """Its embeddings are tied as they are."""

    def forward(self, input_ids: Tensor) -> Any:
        """Logits, (B, T, V), as transformers return them."""
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.model(input_ids))


@dataclass(frozen=True, kw_only=True)
class HarnessScores:
    """Scores of a model.

    Args:
        values: Task and score, such as ``"arc, log-likelihood"`` -> value.
        numbers: The same -> number of questions or pieces of text.
        requests: All (context, continuation) that the model was asked.
        log_likelihoods: Their log-likelihoods by the harness, in nats.
    """

    values: Mapping[str, float]
    numbers: Mapping[str, int]
    requests: Sequence[tuple[str, str]]
    log_likelihoods: Sequence[float]

    def apart(self, model: ProxyModel, tokenizer: Any) -> float:
        """Largest difference between a log-likelihood by the harness and by `Environment`, in nats per scored token."""
        asked = Environment.from_pairs(
            {"all": self.requests},
            tokenizer,
            separator="",
            max_length=ROW_TOKENS,
            prefix_token_id=tokenizer.token_to_id(END_OF_TEXT),
            progress=False,
        )
        ours = asked.log_likelihoods(model)["all"]
        return float(np.abs((ours.sums - np.array(self.log_likelihoods)) / ours.num_tokens).max())


def harness_scores(model: ProxyModel, tokenizer: Any, tasks: Sequence[HarnessTask]) -> HarnessScores:
    """Scores a model by the evaluator of lm-evaluation-harness.

    Args:
        model: The model.
        tokenizer: Its tokenizer, a `tokenizers.Tokenizer`.
        tasks: See `harness_tasks`.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        harness = HFLM(
            pretrained=CausalLM(model),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT),
            backend="causal",
            max_length=ROW_TOKENS,
            batch_size=BATCH,
            logits_cache=False,  # see tests/integration/test_environment_against_lm_eval.py
        )
        found = evaluate(lm=harness, task_dict={task.name: _configured(task) for task in tasks}, bootstrap_iters=0)
    values: dict[str, float] = {}
    numbers: dict[str, int] = {}
    requests, log_likelihoods = [], []
    for task in tasks:
        samples, results = found["samples"][task.name], found["results"][task.name]
        scores: dict[str, float] = {}
        if task.output_type == "loglikelihood_rolling":
            requests += [("", text) for sample in samples for (text,) in sample["arguments"]]
            log_likelihoods += [value for sample in samples for value in sample["filtered_resps"]]
            scores[BITS] = results["bits_per_byte,none"]
        else:
            requests += [pair for sample in samples for pair in sample["arguments"]]
            log_likelihoods += [value for sample in samples for value, _ in sample["filtered_resps"]]
            is_choice = task.output_type == "multiple_choice"
            right = [sample["filtered_resps"][sample["target"] if is_choice else 0][0] for sample in samples]
            scores[LOG_LIKELIHOOD] = float(np.mean(right))
            if is_choice:
                scores |= {ACCURACY: results["acc,none"], ACCURACY_NORM: results["acc_norm,none"]}
        values |= {f"{task.name}, {score}": float(value) for score, value in scores.items()}
        numbers |= {f"{task.name}, {score}": len(samples) for score in scores}
    return HarnessScores(values=values, numbers=numbers, requests=requests, log_likelihoods=log_likelihoods)


def _configured(task: HarnessTask) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": task.name,
        "output_type": task.output_type,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(task.rows))},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "text",
        "doc_to_target": "target",
    }
    if task.output_type == "multiple_choice":
        config["doc_to_choice"] = "choices"
    return ConfigurableTask(config=config)

"""Text, questions and base models of tasks, from a data folder. All that takes long is kept in a work folder.

The data folder has ``source/TOPIC.jsonl.gz``, ``target_math/*.jsonl.gz``, ``target_code/*.jsonl.gz`` (column ``text``)
and ``env/NAME.jsonl.gz`` (columns ``question`` and ``answer``), see docs/agent-data.md.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dmagent_loader._files import write_atomically
from dmagent_loader._validation import shown
from dmagent_loader.environment import Question
from dmagent_loader.environment.encoding import PairEncoder, request
from dmagent_loader.environment.questions import evenly_spaced, questions_from_pairs, read_questions
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, FIELDS, NUM_CANONICAL, NUM_TOPICS, SOURCE, TARGET
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.corpus import Corpus, CorpusConfig, build_corpus
from dmagent_loader.training.data.spaces import ROW_TOKENS, Documents, Space, canonical_space, merged
from dmagent_loader.training.proxies.bases import BaseConfig, start_states, train_bases
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.tasks.spec import BaseModel, TaskSpec

QUESTIONS = {
    "mmlu": ("mmlu_val", "mmlu_test_sample"),
    "piqa": ("piqa_val_sample",),
    "hellaswag": ("hellaswag_val_sample",),
    "sciq": ("sciq_val",),
    "arc": ("arc_easy_val", "arc_challenge_val"),
    "openbookqa": ("openbookqa_val",),
    "socialiqa": ("socialiqa_val_sample",),
    "commonsenseqa": ("commonsense_qa_val",),
    "boolq": ("boolq_val_sample",),
    "winogrande": ("winogrande_val_sample",),
    "math": ("math_train_500", "math_test_sample"),
    "gsm8k": ("gsm8k_test",),
    "svamp": ("svamp_test",),
    "mathqa": ("mathqa_test",),
    "aqua": ("aqua_dev", "aqua_test"),
    "mbpp": ("mbpp",),
    "humaneval": ("humaneval",),
}
"""Question set -> its files in ``env``."""
MOST_KEPT, MOST_ACQUIRED = 480, 240
"""Pairs of each set at most, both halves together."""
PROMPT_TOKENS, COMPLETION_TOKENS = 32, 88
"""A held-out document as a pair: its first tokens, and those that follow."""
SIZES = {
    "0.06M": ProxyConfig(width=32, heads=2, feed_forward=86),
    "0.16M": ProxyConfig(),
    "0.24M": ProxyConfig(width=80, heads=4, feed_forward=214),
    "0.7M": ProxyConfig(width=128, layers=3, feed_forward=340),
    "1.4M": ProxyConfig(width=160, layers=4, heads=5, feed_forward=426),
    "3.2M": ProxyConfig(width=224, layers=5, heads=7, feed_forward=596),
    "5M": ProxyConfig(width=288, layers=5, heads=9, feed_forward=768),
    "15M": ProxyConfig(width=448, layers=6, heads=14, feed_forward=1196),
}
ROWS_PER_UPDATE = 4


def proxy_config(size: str, learning_rate: float = 1.5e-3) -> ProxyConfig:
    """The proxies of the recorded set, in another size.

    Raises:
        ConfigurationError: There is no size of that name.
    """
    if size not in SIZES:
        raise ConfigurationError(f"there is no proxy of size {shown(size)}; choose among {', '.join(SIZES)}")
    return replace(
        SIZES[size],
        rows_per_update=ROWS_PER_UPDATE,
        learning_rate=learning_rate,
        warmup_updates=20,
        averaging=0.95,
    )


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A question set: policies and probes read one half, scores are of the other."""

    read: list[Question]
    scored: list[Question]


class TaskLibrary:
    """Makes the parts of tasks from text, and keeps what was made.

    Args:
        data: Folder of the text and the question sets.
        work: Folder for corpora, base models and domain spaces; a second library reads them.
        corpus: Settings of the corpora.
    """

    def __init__(self, data: Path, work: Path, corpus: CorpusConfig | None = None) -> None:
        self.data, self.work = data, work
        self._corpus_config = corpus or CorpusConfig(max_tokens=400_000)
        # Few of each: a corpus is 30 MB of text.
        self.corpus: Callable[[str], Corpus] = functools.lru_cache(maxsize=3)(self._corpus)
        self.weights: Callable[[str, BaseModel], dict[str, Tensor]] = functools.lru_cache(maxsize=8)(self._weights)
        self.space: Callable[[str, str, int], Space] = functools.lru_cache(maxsize=6)(self._space)
        self.questions: Callable[[str, str, str], Halves] = functools.lru_cache(maxsize=16)(self._questions)

    def _corpus(self, target: str) -> Corpus:
        """The corpus of a target field; a topic that is the target is no source domain."""
        folder = self.work / f"corpus-{target}"
        if not (folder / "corpus.json").exists():
            source = {t: [self.data / "source" / f"{t}.jsonl.gz"] for t in CANONICAL_TOPICS if t != target}
            files = [self.data / "source" / f"{target}.jsonl.gz"]
            if target not in CANONICAL_TOPICS:
                files = sorted((self.data / f"target_{target}").glob("*.jsonl.gz"))
            build_corpus(source, files, self._corpus_config).save(folder)
        return Corpus.load(folder)

    def start_state(self, target: str, base: BaseModel) -> FloatArray:
        """Mix of the 52 domains that a base model was pre-trained on: (52,)."""
        natural = self.corpus(target).start_state
        if base.sharpness is None:
            return natural
        states = start_states(natural, BaseConfig(models=2, sharpness=base.sharpness, seed=base.seed))
        return np.asarray(states[1], dtype=np.float64)

    def _weights(self, target: str, base: BaseModel) -> dict[str, Tensor]:
        """Weights of a base model: trained once, then read from the work folder."""
        return base_weights(self.corpus(target), base, self.start_state(target, base), self.work)

    def _space(self, target: str, name: str, seed: int) -> Space:
        """The rows of each domain; `seed` draws random partitions."""
        corpus = self.corpus(target)
        if name == "canonical":
            return canonical_space(corpus)
        kind, _, number = name.partition("-")
        count = int(number)
        if kind == "merged":
            return merged(name, corpus, _random_groups(count, seed))
        documents = Documents.of(corpus)
        if kind == "parts":
            return documents.space(name, documents.parts(count, seed))
        path = self.work / f"clusters-{corpus.fingerprint[:8]}-{count}.npy"
        if not path.exists():
            array = io.BytesIO()
            np.save(array, documents.clusters(_of_fields(count, 0.35)))
            write_atomically(path, array.getvalue())
        return documents.space(name, np.load(path))

    def _questions(self, target: str, name: str, side: str) -> Halves:
        """A question set, as evenly spaced pairs that fit into a row, dealt in turn into two halves.

        Args:
            target: Target field, for its tokenizer and its held-out documents.
            name: Question set or ``"text"``.
            side: ``"keep"`` or ``"acquire"``: the field of the held-out documents, and the largest number of pairs.

        Raises:
            ConfigurationError: There is no set of that name, or it has fewer than two pairs that fit into a row.
        """
        corpus = self.corpus(target)
        most = MOST_KEPT if side == "keep" else MOST_ACQUIRED
        if name == "text":
            listed = held_out_pairs(corpus, SOURCE if side == "keep" else TARGET, most)
        elif name in QUESTIONS:
            files = [self.data / "env" / f"{file}.jsonl.gz" for file in QUESTIONS[name]]
            listed = [question for file in files for question in read_questions(file, cloze=True)]
        else:
            raise ConfigurationError(
                f"there is no question set {shown(name)}; choose 'text' or one of {', '.join(QUESTIONS)}"
            )
        encoder = PairEncoder(corpus.tokenizer())
        fitting = [q for q in listed if len(encoder.encode(*request(q, " "), q.origin).tokens) <= ROW_TOKENS + 1]
        if len(fitting) < 2:
            remedy = (
                f"add documents to the field, of which 1 in {self._corpus_config.held_out_every} of a topic is held out"
                if name == "text"
                else "add shorter pairs to its files"
            )
            raise ConfigurationError(
                f"question set {name!r} to {side} has {len(fitting)} of {len(listed)} pairs that fit into a row of "
                f"{ROW_TOKENS} tokens, but a task needs two, one to read and one to score: {remedy}"
            )
        chosen = evenly_spaced(fitting, most)
        return Halves(read=chosen[::2], scored=chosen[1::2])

    def of_task(self, spec: TaskSpec) -> tuple[Halves, Halves]:
        """The question sets to keep and to acquire."""
        return (
            self.questions(spec.target, spec.keep, "keep"),
            self.questions(spec.target, spec.acquire, "acquire"),
        )


def base_weights(corpus: Corpus, base: BaseModel, state: FloatArray, work: Path) -> dict[str, Tensor]:
    """Weights of a base model: trained once, then read from a folder in `work`.

    Args:
        corpus: Text.
        base: The model.
        state: (52,), the mix that it is trained on.
        work: Folder of the library.
    """
    skew = "" if base.sharpness is None else f"-{base.sharpness:g}"
    return train_bases(
        corpus,
        state[None],
        BaseConfig(models=1, tokens=base.tokens, seed=base.seed),
        replace(proxy_config(base.size), seed=base.seed),
        row_tokens=ROW_TOKENS,
        directory=work / f"base-{corpus.fingerprint[:8]}-{base.size}-{base.tokens}-{base.seed}{skew}",
        progress=False,
    )


def held_out_pairs(corpus: Corpus, field: str, most: int) -> list[Question]:
    """Pieces of documents that nothing was trained on, each as a prompt and its completion.

    A domain gives as many as its share of the field's documents. With whole pairs scored, as they are in tasks, the
    mean log-probability of such a pair is minus the text's loss per token.

    Args:
        corpus: The corpus.
        field: Field of the documents.
        most: Largest number of pairs.
    """
    tokenizer: Any = corpus.tokenizer()
    shares = corpus.start_state + corpus.target_distribution
    pairs, length = [], PROMPT_TOKENS + COMPLETION_TOKENS
    first = FIELDS.index(field) * NUM_TOPICS
    for domain in range(first, first + NUM_TOPICS):
        text = corpus.held_out[corpus.held_out_bounds[domain] : corpus.held_out_bounds[domain + 1]]
        pieces = [text[start : start + length].tolist() for start in range(0, len(text) - length + 1, length)]
        for tokens in evenly_spaced(pieces, round(most * float(shares[domain]))):
            pairs.append((tokenizer.decode(tokens[:PROMPT_TOKENS]), tokenizer.decode(tokens[PROMPT_TOKENS:])))
    # A piece can begin or end inside a character of several bytes.
    return questions_from_pairs(field, [pair for pair in pairs if pair[1] and "\ufffd" not in "".join(pair)])


def _random_groups(count: int, seed: int) -> IntArray:
    """Number of the merged domain of each of the 52; a third of them are of the target field: (52,)."""
    rng = np.random.default_rng([seed, 11])
    counts = _of_fields(count, 1 / 3)
    group, first = np.zeros(NUM_CANONICAL, dtype=np.int64), 0
    for position, name in enumerate(FIELDS):
        part = slice(position * NUM_TOPICS, (position + 1) * NUM_TOPICS)
        group[part] = first + rng.permutation(NUM_TOPICS) % counts[name]
        first += counts[name]
    return group


def _of_fields(count: int, target_share: float) -> dict[str, int]:
    """Field -> number of its domains, at least one."""
    of_target = max(1, round(target_share * count))
    return {SOURCE: max(1, count - of_target), TARGET: of_target}


def texts(questions: Sequence[Question]) -> list[str]:
    """Questions with their answers, as policies receive them."""
    return [f"{question.question} {question.answer}" for question in questions]

"""The corpus: token arrays of the 52 canonical domains, start state and target distribution (paper, section 3.1, C.1).

Source documents have a topic label (one or more files for each of the 26 topics). Target documents do not: a classifier
that is trained on the labelled source documents assigns their topics.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from dmagent_loader.errors import ConfigurationError, DomainError, ShardNotFoundError, StateError, require_extra
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, FIELDS, NUM_CANONICAL, NUM_TOPICS, SOURCE, TARGET
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.topics import TopicClassifier, TopicClassifierConfig

END_OF_TEXT = "<|endoftext|>"
SCHEMA = 2

TokenArray = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Settings of the corpus.

    Args:
        vocab_size: Vocabulary size of the byte-level BPE tokenizer.
        tokenizer_characters: Largest number of characters of each domain that the tokenizer is trained on.
        max_tokens: Largest number of tokens kept of each domain; document counts include all documents.
        held_out_every: n, if every n-th document of a domain is held out from training to measure losses.
        classifier: Settings of the topic classifier for target documents.
    """

    vocab_size: int = 1024
    tokenizer_characters: int = 200_000
    max_tokens: int = 300_000
    held_out_every: int = 20
    classifier: TopicClassifierConfig = field(default_factory=TopicClassifierConfig)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens of the 52 canonical domains.

    Args:
        tokens: Tokens of all domains, concatenated; documents end in `END_OF_TEXT`.
        bounds: (53,), position in `tokens` where each domain starts, and the end.
        held_out: Tokens of the documents held out from training, concatenated.
        held_out_bounds: (53,), position in `held_out` where each domain starts, and the end.
        documents: (52,), number of documents of each domain in the files, kept or not.
        tokenizer_json: The trained tokenizer.
        facts: Facts about the build: files, classifier accuracy, settings.
    """

    tokens: TokenArray
    bounds: IntArray
    held_out: TokenArray
    held_out_bounds: IntArray
    documents: IntArray
    tokenizer_json: str
    facts: Mapping[str, Any]

    @property
    def num_tokens(self) -> IntArray:
        """Number of tokens kept of each domain: (52,)."""
        return np.diff(self.bounds)

    @property
    def start_state(self) -> FloatArray:
        """Mix of a base model's data: shares of the source documents, (52,) (paper, section 3.1)."""
        return self._document_shares(SOURCE)

    @property
    def target_distribution(self) -> FloatArray:
        """Document shares of the topics on target domains, 0 on source domains: (52,) (paper, C.1)."""
        return self._document_shares(TARGET)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tokens, bounds and tokenizer."""
        digest = hashlib.sha256(self.tokenizer_json.encode())
        for array in (self.bounds, self.tokens, self.held_out_bounds, self.held_out):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        """The tokenizer, as a `tokenizers.Tokenizer`."""
        return require_extra("tokenizers", "rl").Tokenizer.from_str(self.tokenizer_json)

    def save(self, directory: Path) -> None:
        """Writes ``corpus.safetensors``, ``tokenizer.json`` and, as the mark of completeness, ``corpus.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {
            "tokens": self.tokens,
            "bounds": self.bounds,
            "held_out": self.held_out,
            "held_out_bounds": self.held_out_bounds,
            "documents": self.documents,
        }
        save_file(arrays, str(directory / "corpus.safetensors"))
        (directory / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        meta = {"schema": SCHEMA, "fingerprint": self.fingerprint, "facts": self.facts}
        (directory / "corpus.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Corpus:
        """Reads a folder that `save` wrote.

        Raises:
            StateError: The corpus has another schema, or its files do not belong together.
        """
        meta = json.loads((directory / "corpus.json").read_text(encoding="utf-8"))
        if meta["schema"] != SCHEMA:
            raise StateError(f"corpus in {directory} has schema {meta['schema']}, not {SCHEMA}: build it again")
        corpus = cls(
            **load_file(str(directory / "corpus.safetensors")),
            tokenizer_json=(directory / "tokenizer.json").read_text(encoding="utf-8"),
            facts=meta["facts"],
        )
        if corpus.fingerprint != meta["fingerprint"]:
            raise StateError(
                f"the corpus files in {directory} do not belong together: delete them and build the corpus again"
            )
        return corpus

    def _document_shares(self, field_name: str) -> FloatArray:
        shares = np.zeros(NUM_CANONICAL)
        part = slice(FIELDS.index(field_name) * NUM_TOPICS, (FIELDS.index(field_name) + 1) * NUM_TOPICS)
        shares[part] = self.documents[part] / self.documents[part].sum()
        return shares


def read_documents(path: Path) -> Iterator[str]:
    """Texts of a JSON-lines file (column ``text``, plain or gzip), or of a plain text file as one document.

    Blank lines of a JSON-lines file are ignored.

    Raises:
        ShardNotFoundError: There is no such file.
        ConfigurationError: The file cannot be read to its end, is not UTF-8, or a line has no text.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            if ".jsonl" not in path.suffixes:
                yield stream.read()
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _text(line, f"{path} line {number}")
    except FileNotFoundError as error:
        raise ShardNotFoundError(f"there is no text file {path}: add it, or check the folder") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is not UTF-8 ({error}): convert it to UTF-8, plain or compressed by gzip as .gz"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path} cannot be read to its end ({error}): write it again") from error


def _text(line: str, origin: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{origin} is not JSON ({error}): write one JSON object per line") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigurationError(f"{origin} has no 'text': every line needs one, in a JSON object")
    return text


def build_corpus(source: Mapping[str, Sequence[Path]], target: Sequence[Path], config: CorpusConfig) -> Corpus:
    """Builds the corpus from text files.

    Args:
        source: Canonical topic -> files of labelled source documents.
        target: Files of target documents of any topic.
        config: Settings.

    Raises:
        DomainError: A topic is not canonical.
        ShardNotFoundError: There is no source file or no target file.
        ConfigurationError: The vocabulary does not fit into 16 bits, all documents would be held out, a file cannot be
            read, or the target files hold no documents.
    """
    unknown = sorted(set(source) - set(CANONICAL_TOPICS))
    if unknown:
        raise DomainError(
            f"source files are named after {unknown}, which are not canonical topics; these are {CANONICAL_TOPICS}"
        )
    if not source or not target:
        raise ShardNotFoundError(
            f"there are files for {len(source)} source topics and {len(target)} target files: both fields need text"
        )
    if config.held_out_every < 2:
        raise ConfigurationError(f"held_out_every is {config.held_out_every}: at 1 no document would be trained on")
    if not 257 <= config.vocab_size <= 2**16:
        raise ConfigurationError(f"vocab_size is {config.vocab_size}: it must hold 257 symbols and fit into 16 bits")
    labelled = {topic: [text for path in source[topic] for text in read_documents(path)] for topic in source}
    classifier = TopicClassifier(labelled, config.classifier)
    unlabelled = [text for path in target for text in read_documents(path)]
    if not unlabelled:
        raise ConfigurationError(
            f"the target files hold no documents ({', '.join(map(str, target))}): add text of the field to learn"
        )
    by_domain: list[list[str]] = [list(labelled.get(topic, ())) for topic in CANONICAL_TOPICS]
    by_domain += [[] for _ in CANONICAL_TOPICS]
    for text, label in zip(unlabelled, classifier.predict(unlabelled), strict=True):
        by_domain[NUM_TOPICS + CANONICAL_TOPICS.index(classifier.topics[label])].append(text)

    every = config.held_out_every
    trained = [[text for i, text in enumerate(documents) if i % every != every - 1] for documents in by_domain]
    kept = [documents[every - 1 :: every] for documents in by_domain]
    tokenizer = train_tokenizer(
        (text for documents in trained for text in _up_to(documents, config.tokenizer_characters)), config.vocab_size
    )
    tokens, bounds = _joined([_tokens(tokenizer, documents, config.max_tokens) for documents in trained])
    held_out, held_out_bounds = _joined([_tokens(tokenizer, d, max(1, config.max_tokens // every)) for d in kept])
    return Corpus(
        tokens=tokens,
        bounds=bounds,
        held_out=held_out,
        held_out_bounds=held_out_bounds,
        documents=np.array([len(documents) for documents in by_domain], dtype=np.int64),
        tokenizer_json=tokenizer.to_str(),
        facts={
            "source_files": {topic: [path.name for path in paths] for topic, paths in source.items()},
            "target_files": [path.name for path in target],
            "classifier_accuracy": classifier.accuracy,
            "classifier_held_out_documents": classifier.num_held_out,
            "settings": asdict(config),
        },
    )


def _joined(parts: Sequence[TokenArray]) -> tuple[TokenArray, IntArray]:
    return np.concatenate(parts), np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Trains a byte-level BPE tokenizer, a `tokenizers.Tokenizer`, in which `END_OF_TEXT` is token 0."""
    tokenizers = require_extra("tokenizers", "rl")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _up_to(documents: Sequence[str], characters: int) -> Iterator[str]:
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _tokens(tokenizer: Any, documents: Sequence[str], max_tokens: int) -> TokenArray:
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    parts: list[TokenArray] = [np.zeros(0, dtype=np.uint16)]
    total = 0
    # In batches: the tokenizer is much faster on many texts, and most domains reach their limit early.
    for start in range(0, len(documents), 64):
        for encoding in tokenizer.encode_batch(documents[start : start + 64], add_special_tokens=False):
            parts.append(np.array(encoding.ids + end, dtype=np.uint16))
            total += len(parts[-1])
        if total >= max_tokens:
            break
    return np.concatenate(parts)[:max_tokens]

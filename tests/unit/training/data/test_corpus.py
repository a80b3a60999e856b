"""Corpus: text files to token arrays, with topics for documents that have none."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, DomainError, ShardNotFoundError, StateError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.training.data.corpus import Corpus, CorpusConfig, build_corpus, read_documents
from dmagent_loader.training.data.topics import TopicClassifierConfig

WORDS = {
    "Science": "atom energy planet cell enzyme gravity orbit neutron",
    "Sports": "goal match team striker league referee penalty coach",
    "Finance": "bond interest loan dividend market broker credit yield",
}
CONFIG = CorpusConfig(vocab_size=300, max_tokens=2000, classifier=TopicClassifierConfig(held_out=0.2))


def documents(topic: str, count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[topic].split(), 30)) + "." for _ in range(count)]


def write(path: Path, texts: list[str]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "origin": "made"}) + "\n" for text in texts)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Path]], list[Path]]:
    folder = tmp_path_factory.mktemp("text")
    source = {
        topic: [write(folder / f"{topic}.jsonl{'.gz' * (i % 2)}", documents(topic, 20 * (i + 1), i))]
        for i, topic in enumerate(WORDS)
    }
    target = [write(folder / "t.jsonl.gz", documents("Science", 9, 7) + documents("Finance", 3, 8))]
    return source, target


@pytest.fixture(scope="module")
def built(files: tuple[dict[str, list[Path]], list[Path]]) -> Corpus:
    return build_corpus(*files, CONFIG)


def test_start_state_and_target_distribution_are_document_shares(built: Corpus) -> None:
    """The target documents say which topic they are of: 9 of 12 are Science. Catches a swap of the two fields."""
    start, target = built.start_state, built.target_distribution
    index = CANONICAL_TOPICS.index
    assert np.allclose(start[[index("Science"), index("Sports"), index("Finance")]], [20 / 120, 40 / 120, 60 / 120])
    assert np.allclose(target[[26 + index("Science"), 26 + index("Finance")]], [0.75, 0.25])
    assert np.isclose(start.sum(), 1)
    assert not start[26:].any()
    assert np.isclose(target.sum(), 1)
    assert not target[:26].any()


def test_tokens_of_a_domain_are_its_documents_but_each_twentieth(
    built: Corpus, files: tuple[dict[str, list[Path]], list[Path]]
) -> None:
    d = CANONICAL_TOPICS.index("Science")
    tokens = built.tokens[built.bounds[d] : built.bounds[d + 1]]
    text = built.tokenizer().decode(tokens.tolist(), skip_special_tokens=False)
    documents = list(read_documents(files[0]["Science"][0]))
    expected = "<|endoftext|>".join(documents[:19])
    assert expected.startswith(text[:500])
    assert built.num_tokens.max() <= CONFIG.max_tokens
    assert built.num_tokens[CANONICAL_TOPICS.index("Games")] == 0


def test_held_out_documents_are_never_trained_on(files: tuple[dict[str, list[Path]], list[Path]]) -> None:
    """Catches shares cut off the same tokens, and a split that another order of files or domains would shift."""
    config = dataclasses.replace(CONFIG, max_tokens=100_000, held_out_every=5)
    corpus = build_corpus(*files, config)
    tokenizer = corpus.tokenizer()

    def texts(tokens: np.ndarray) -> list[str]:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")[:-1]

    for topic in WORDS:
        d = CANONICAL_TOPICS.index(topic)
        every = list(read_documents(files[0][topic][0]))
        trained = texts(corpus.tokens[corpus.bounds[d] : corpus.bounds[d + 1]])
        held_out = texts(corpus.held_out[corpus.held_out_bounds[d] : corpus.held_out_bounds[d + 1]])
        assert held_out == every[4::5]
        assert trained == [text for i, text in enumerate(every) if i % 5 != 4]
    target = CANONICAL_TOPICS.index("Science") + 26
    assert corpus.held_out_bounds[target + 1] > corpus.held_out_bounds[target]
    # Start state and target distribution are of all documents.
    assert corpus.documents[CANONICAL_TOPICS.index("Finance")] == 60


def test_a_saved_corpus_loads_and_a_changed_one_is_refused(built: Corpus, tmp_path: Path) -> None:
    built.save(tmp_path)
    loaded = Corpus.load(tmp_path)
    assert loaded.fingerprint == built.fingerprint
    for name in ("tokens", "bounds", "held_out", "held_out_bounds", "documents"):
        assert np.array_equal(getattr(loaded, name), getattr(built, name)), name
    assert loaded.held_out.size > 0
    assert loaded.facts["classifier_accuracy"] == built.facts["classifier_accuracy"]
    dataclasses.replace(built, tokens=built.tokens[::-1].copy()).save(tmp_path / "other")
    (tmp_path / "other" / "corpus.safetensors").replace(tmp_path / "corpus.safetensors")
    with pytest.raises(StateError, match="do not belong together"):
        Corpus.load(tmp_path)


def test_changed_held_out_text_is_refused_too(built: Corpus, tmp_path: Path) -> None:
    built.save(tmp_path)
    dataclasses.replace(built, held_out=built.held_out[::-1].copy()).save(tmp_path / "other")
    (tmp_path / "other" / "corpus.safetensors").replace(tmp_path / "corpus.safetensors")
    with pytest.raises(StateError, match="do not belong together"):
        Corpus.load(tmp_path)


def test_topics_that_can_be_told_apart_are(built: Corpus) -> None:
    assert built.facts["classifier_accuracy"] > 0.95


def test_input_that_cannot_be_used_is_refused(files: tuple[dict[str, list[Path]], list[Path]], tmp_path: Path) -> None:
    source, target = files
    with pytest.raises(DomainError, match="Cheese"):
        build_corpus({"Cheese": target}, target, CONFIG)
    with pytest.raises(ShardNotFoundError, match="0 target files"):
        build_corpus(source, [], CONFIG)
    with pytest.raises(ConfigurationError, match="held_out_every is 1: at 1 no document would be trained on"):
        build_corpus(source, target, dataclasses.replace(CONFIG, held_out_every=1))
    with pytest.raises(ConfigurationError, match="vocab_size is 100"):
        build_corpus(source, target, dataclasses.replace(CONFIG, vocab_size=100))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "no"}\n', encoding="utf-8")
    with pytest.raises(ConfigurationError, match="line 2 has no 'text'"):
        list(read_documents(bad))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "line 2 is not JSON .*: write one JSON object per line"),
        ("a.jsonl", b'["text"]\n', "line 1 has no 'text': every line needs one, in a JSON object"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x8d\x00", "a.jsonl.zst is not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read to its end"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        list(read_documents(tmp_path / name))


def test_blank_lines_are_no_documents_and_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n \n', encoding="utf-8")
    assert list(read_documents(tmp_path / "a.jsonl")) == ["one", "two"]
    with pytest.raises(ShardNotFoundError, match=r"there is no text file .*b\.jsonl\.gz"):
        list(read_documents(tmp_path / "b.jsonl.gz"))


def test_target_files_without_documents_are_refused(
    files: tuple[dict[str, list[Path]], list[Path]], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ConfigurationError, match=r"the target files hold no documents .*empty\.jsonl"):
        build_corpus(files[0], [empty], CONFIG)

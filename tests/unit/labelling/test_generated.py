"""`dmagent generate`: texts of a real model in files, resumable, and from there to a source field of shards."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling import GenerationConfig, generate_documents, generated_files
from dmagent_loader.shards.manifest import load_manifest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["goalkeeper", "saved", "penalty", "league", "match", "team", "soup", "onions", "butter", "garlic", "zero\0"]
"""With a zero byte, as tokenizers of bytes have it, which readers refuse in texts."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {word: number for number, word in enumerate(["<end>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<end>", eos_token="<end>")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 16}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=24)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(base: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(generated_files, "PART_BATCHES", 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return transformers.LlamaForCausalLM.from_pretrained(base), tokenizer


CONFIG = GenerationConfig(max_tokens=20, batch_size=3)


def generate(model: tuple[Any, Any], output: Path, documents: int, config: GenerationConfig = CONFIG) -> int:
    return generate_documents(*model, output, documents, config, progress=False)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


def texts(output: Path) -> list[str]:
    return [
        json.loads(line)["text"] for part in contents(output).values() for line in gzip.decompress(part).splitlines()
    ]


def test_a_job_that_is_killed_goes_on_and_gives_the_same_bytes(
    model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 6 texts: the first call dies in the third one, the second call writes that one and the last."""
    filled = generate(model, tmp_path / "whole", 20)
    assert [len(gzip.decompress(part).splitlines()) for part in contents(tmp_path / "whole").values()] == [6, 6, 6, 2]
    assert filled == sum(bool(text) for text in texts(tmp_path / "whole"))
    assert len(set(texts(tmp_path / "whole"))) > 10
    assert any("zero" in text for text in texts(tmp_path / "whole"))
    begun: list[int] = []
    original = generated_files.generate_texts

    def watched(*arguments: Any, first_batch: int) -> Any:
        begun.append(first_batch)
        if begun == [0, 2, 4]:
            raise KeyboardInterrupt
        return original(*arguments, first_batch=first_batch)

    monkeypatch.setattr(generated_files, "generate_texts", watched)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tmp_path / "killed", 20)
    assert len(contents(tmp_path / "killed")) == 2
    assert generate(model, tmp_path / "killed", 20) == filled
    assert begun == [0, 2, 4, 4, 6]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_more_texts_are_added_to_those_that_are_there(model: tuple[Any, Any], tmp_path: Path) -> None:
    generate(model, tmp_path / "some", 8)
    generate(model, tmp_path / "some", 20)
    generate(model, tmp_path / "all", 20)
    assert contents(tmp_path / "some") == contents(tmp_path / "all")
    with pytest.raises(ConfigurationError, match="holds more than 8 texts"):
        generate(model, tmp_path / "some", 8)
    with pytest.raises(ConfigurationError, match="holds more than 19 texts"):
        generate(model, tmp_path / "some", 19)
    assert contents(tmp_path / "some") == contents(tmp_path / "all")


def test_texts_of_another_model_or_with_other_settings_are_not_mixed(model: tuple[Any, Any], tmp_path: Path) -> None:
    generate(model, tmp_path / "out", 4)
    with pytest.raises(ConfigurationError, match="holds texts with another seed"):
        generate(model, tmp_path / "out", 8, GenerationConfig(max_tokens=20, batch_size=3, seed=1))
    with torch.no_grad():
        model[0].model.norm.weight[3] += 1
    with pytest.raises(ConfigurationError, match="holds texts with another model"):
        generate(model, tmp_path / "out", 8)


def test_folders_with_other_files_are_refused_and_damage_is_named(model: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.jsonl").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"holds other files, \['notes.jsonl'\]"):
        generate(model, tmp_path / "mine", 4)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.jsonl"]
    with pytest.raises(ConfigurationError, match="is a URL, but the texts of a model are written to local folders"):
        generate_documents(*model, "s3://bucket/texts", 4, CONFIG, progress=False)
    generate(model, tmp_path / "out", 4)
    (tmp_path / "out" / "part-000000.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ShardError, match=r"part-000000.jsonl.gz cannot be read .*: remove the file"):
        generate(model, tmp_path / "out", 4)
    with pytest.raises(ConfigurationError, match="documents is 0"):
        generate(model, tmp_path / "none", 0)


def test_from_a_model_to_a_source_field_of_shards_with_compositions(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of docs/topics.md; only the first command needs the model."""
    generated, shards, quiet = tmp_path / "generated", tmp_path / "shards", ["--no-progress"]
    command = ["generate", str(base), "--output", str(generated), "--documents", "40", "--max-tokens", "20"]
    assert main([*command, *quiet]) == 0
    assert f"{generated}: 40 texts" in capsys.readouterr().out
    command = ["filter", "--domain", f"source/all={generated}", "--output", str(tmp_path / "filtered")]
    assert main([*command, "--min-characters", "20", *quiet]) == 0
    command = ["label", "--input", str(tmp_path / "filtered/source"), "--field", "source", "--split"]
    assert main([*command, "--min-confidence", "0", "--output", str(tmp_path / "labelled"), *quiet]) == 0
    command = ["shard", "--input", str(tmp_path / "labelled/source"), "--field", "source", "--output", str(shards)]
    assert main([*command, *quiet]) == 0
    assert main(["compose", str(shards), "--min-confidence", "0", *quiet]) == 0
    manifest = load_manifest(shards)
    assert len(manifest) >= 2
    assert (shards / "compositions.json").is_file()
    assert main(["generate", str(tmp_path / "nothing"), "--output", str(generated), "--documents", "1"]) == 2
    assert "no language model could be loaded from" in capsys.readouterr().err

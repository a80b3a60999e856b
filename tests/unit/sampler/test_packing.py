"""Runs over text shards packed on the fly: exact under resume, any number of ranks, and every change of the mix."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading import quiet
from samplers import logged
from shard_fixtures import write_jsonl
from text_shards import END, END_ID, byte_tokenizer, random_documents, write_documents
from transformers import PreTrainedTokenizerFast

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, PackText, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, DecodeError, StateError
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.testing import assert_same_after_resume
from dmagent_loader.transforms import IGNORED_LABEL, PACKED_MEMBER, ShiftedTokens, collate_packed, packed_tokens
from dmagent_loader.transforms.packed import of_packed_rows

LENGTH = 16
DOMAINS = {"source/long": (2, 6, 300), "source/short": (3, 40, 8), "target/math": (2, 25, 40)}
"""Shards, documents of each, and longest document."""
CHANGES = [(0.1, 0.2, 0.7), (0.8, 0.2, 0.0), (0.0, 0.3, 0.7)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    documents = {
        name: [random_documents(100 * number + shard, count, longest) for shard in range(num_shards)]
        for number, (name, (num_shards, count, longest)) in enumerate(DOMAINS.items())
    }
    return write_documents(tmp_path_factory.mktemp("text"), documents)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(shards: Any, cache: Path, *, pack: PackText | None = None, **settings: Any) -> AgentWeightedSampler:
    """A sampler whose mix changes three times, as the ledger of a run would have it."""
    pack = pack or PackText(byte_tokenizer(), LENGTH)
    sampler = AgentWeightedSampler(shards, pack=pack, reading=quiet(cache, settings.pop("reading", None)), **settings)
    for number, mix in enumerate(CHANGES, start=1):
        sampler.plan.append(LedgerEntry(start=20 * number, mix=mix, decided_by="test", decided_at=20 * number))
    return sampler


def text_manifest(folder: Path, rows: dict[str, int]) -> str:
    """Shards of `dmagent shard` with so many documents of each domain."""
    folder.mkdir()
    domains = {}
    for name, count in rows.items():
        documents = [{"text": f"{name} {number} " * 5} for number in range(count)]
        domains[name] = [write_jsonl(folder / f"{name.replace('/', '-')}.jsonl", documents)]
    shard_files(domains, folder / "shards", ShardingConfig(rows_per_shard=20), progress=False)
    return str(folder / "shards" / "manifest.json")


def contents(samples: Any) -> list[tuple[int, str, str, bytes]]:
    return [(s["__index__"], s["__domain__"], s["__key__"], s[PACKED_MEMBER].tobytes()) for s in samples]


def test_a_pass_hands_out_every_token_once(shards, cache):
    """All tokens in, less the remainders that the accounts name, and all rows full."""
    sampler = build(shards, cache, exhausted="stop")
    accounts = sampler.collection.accounts
    tokens = Counter()
    for name in shards:
        one = AgentWeightedSampler(
            {name: shards[name]}, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache), exhausted="stop"
        )
        rows = list(one)
        assert {row[PACKED_MEMBER].shape for row in rows} == {(LENGTH,)}
        assert len({row["__key__"] for row in rows}) == len(rows) == accounts[name].rows
        tokens[name] = sum(row[PACKED_MEMBER].size for row in rows)
    for name, account in accounts.items():
        assert account.tokens == tokens[name] + account.remainder
        assert account.remainder < LENGTH * len(shards[name])


def test_a_run_resumes_at_every_sample_in_1_2_and_4_ranks(shards, cache):
    """Over three changes of the mix, with the same tokens, whatever the number of ranks before and after."""
    whole = contents(itertools.islice(build(shards, cache, exhausted="repeat"), 100))
    first = build(shards, cache, exhausted="repeat")
    ranks = {
        world: [build(shards, cache, exhausted="repeat", rank=r, world_size=world) for r in range(world)]
        for world in (1, 2, 4)
    }
    stream = iter(first)
    for consumed in range(96):
        state = json.loads(json.dumps(first.state_dict()))
        for world, samplers in ranks.items():
            rest: list[tuple[int, str, str, bytes]] = []
            for sampler in samplers:
                sampler.load_state_dict(state)
                rest += contents(itertools.islice(sampler, (100 - consumed) // world))
            assert sorted(rest) == whole[consumed : consumed + len(rest)], (consumed, world)
        next(stream)


def test_a_change_of_the_mix_loses_and_repeats_nothing(shards, cache):
    """There is no half-filled row to be carried over, so a domain goes on with the rows that it has not given."""
    sampler = AgentWeightedSampler(
        shards, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache), exhausted="repeat"
    )
    names = list(shards)
    found, keys = iter(sampler), Counter()
    for first, mix in zip(range(0, 60, 20), CHANGES, strict=True):
        sampler.set_mix(dict(zip(names, mix, strict=True)))
        samples = list(itertools.islice(found, 20))
        tokens = np.array([sum(s[PACKED_MEMBER].size for s in samples if s["__domain__"] == name) for name in names])
        assert np.abs(tokens / tokens.sum() - mix).max() <= 1 / 20, "shares of tokens are those of the mix"
        assert sampler.achieved(first, first + 20) == {
            name: n // LENGTH for name, n in zip(names, tokens.tolist(), strict=True)
        }
        keys.update((s["__domain__"], s["__key__"]) for s in samples)
    assert set(keys.values()) == {1}


def test_a_run_with_decisions_resumes(shards, cache):
    def run() -> AgentWeightedSampler:
        pack = PackText(byte_tokenizer(), LENGTH)
        return AgentWeightedSampler(shards, pack=pack, policy=StaticPolicy({"source/long": 1.0}), reading=quiet(cache))

    assert_same_after_resume(run, 60, every=7)


def test_lazy_rows_and_threads_give_the_same_batches(shards, cache):
    batches = [
        [
            batch["input_ids"]
            for batch in MixingDataLoader(build(shards, cache, **settings), batch_size=4, collate_fn=collate_packed)
        ]
        for settings in ({}, {"decode": "lazy"}, {"reading": ReadingConfig(num_threads=2, num_rows=8)})
    ]
    assert len(batches[0]) > 15
    for other in batches[1:]:
        assert torch.equal(torch.cat(batches[0]), torch.cat(other))


def test_transforms_and_probes_get_the_packed_rows(shards, cache):
    sampler = build(shards, cache, transform=ShiftedTokens(length=LENGTH - 1))
    sample = next(iter(sampler))
    assert sample["tokens"].shape == (LENGTH - 1,)
    probes = sampler.probe_rows(3)
    assert {name: len(rows) for name, rows in probes.items()} == dict.fromkeys(shards, 3)
    assert torch.equal(probes["target/math"][0]["labels"][:-1], probes["target/math"][0]["tokens"][1:])


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (PackText(byte_tokenizer(), LENGTH + 1), "this run has rows of 17 tokens, tokenizer"),
        (PackText(byte_tokenizer("</s>"), LENGTH), "end token 256, member 'txt'"),
        (PackText(byte_tokenizer(), LENGTH, end_token=5), "end token 5, member 'txt'"),
    ],
)
def test_another_packing_is_refused_by_name_or_is_changed_data(shards, cache, caplog, pack, words):
    state = build(shards, cache).state_dict(consumed=30)
    other = build(shards, cache, pack=pack)
    with pytest.raises(StateError, match="the state is of a run with packing rows of 16 tokens, tokenizer") as error:
        other.load_state_dict(state)
    assert words in str(error.value)
    assert "pack all documents anew by load_state_dict(state, data='changed')" in str(error.value)
    other.load_state_dict(state, data="changed")
    (message,) = logged(caplog, "the run continues with changed data from sample 30 on")
    assert "the packing was rows of 16 tokens" in message
    assert [s["__index__"] for s in itertools.islice(other, 5)] == list(range(30, 35))
    with pytest.raises(StateError, match="this run has None"):
        AgentWeightedSampler(shards, reading=quiet(cache)).load_state_dict(state)


def test_a_new_shard_joins_a_packed_run(shards, cache, tmp_path):
    """As stored rows do: the rows of the other shards stay the same, and none comes twice."""
    first = AgentWeightedSampler(
        shards, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache), exhausted="stop"
    )
    seen = [(s["__domain__"], s["__key__"]) for s in itertools.islice(first, 40)]
    more = write_documents(tmp_path, {"target/math": [["-"], ["-"], ["1 + 1 = 2 " * 30]]})["target/math"][2]
    grown = {**shards, "target/math": [*shards["target/math"], more]}
    second = AgentWeightedSampler(
        grown, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache), exhausted="stop"
    )
    second.load_state_dict(first.state_dict(), data="changed")
    seen += [(s["__domain__"], s["__key__"]) for s in second]
    assert max(Counter(seen).values()) == 1
    assert sum(key.startswith("text-2d0") for domain, key in seen if domain == "target/math") > 10


def test_bad_documents_follow_on_bad_row(shards, cache, tmp_path):
    texts: list[Sequence[str | bytes]] = [[*random_documents(0, 40, 30), b"\xff"]]
    bad = {**shards, **write_documents(tmp_path, {"source/bad": texts})}
    with pytest.raises(DecodeError, match="'source/bad', row 40 of shard"):
        AgentWeightedSampler(bad, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache))
    settings = ReadingConfig(max_bad_rows=0.03)
    sampler = AgentWeightedSampler(
        bad, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache, settings), on_bad_row="skip"
    )
    assert sampler.collection.accounts["source/bad"].bad_documents == 1
    assert sum(1 for _ in itertools.islice(sampler, 50)) == 50
    assert sampler.bad_rows == {}


def test_a_packing_in_the_wrong_place_is_named(shards, cache):
    with pytest.raises(ConfigurationError, match=r"transform is a PackText.*pass it as pack="):
        AgentWeightedSampler(shards, transform=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache))
    with pytest.raises(ConfigurationError, match="pack is 16; it must be a PackText"):
        AgentWeightedSampler(shards, pack=16, reading=quiet(cache))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_folder", [False, True])
def test_commands_find_the_rows_of_a_packed_run(tmp_path, capsys, is_folder):
    """With its tokenizer: they say what load_state_dict does, and replay the keys that the run read."""
    tokenizer = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer))
    if is_folder:
        tokenizer = tmp_path / "tokenizer"
        PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=END).save_pretrained(tokenizer)
    manifest = text_manifest(tmp_path / "first", {"source/web": 60, "target/math": 40})
    sampler = AgentWeightedSampler(manifest, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(tmp_path / "cache"))
    keys = [sample["__key__"] for sample in itertools.islice(sampler, 12)]
    (tmp_path / "state.json").write_text(json.dumps(sampler.state_dict()))
    more = ["--tokenizer", str(tokenizer), "--cache-dir", str(tmp_path / "cache")]
    assert main(["replay", str(tmp_path / "state.json"), "--shards", manifest, *more]) == 0
    assert [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()] == keys
    assert main(["state", str(tmp_path / "state.json"), "--shards", manifest, *more]) == 0
    out = capsys.readouterr().out
    assert "its documents were packed when they were read: rows of 16 tokens, tokenizer " in out
    assert "load_state_dict(state) resumes exactly at sample 12" in out
    other = text_manifest(tmp_path / "second", {"source/web": 60, "target/math": 41})
    assert main(["state", str(tmp_path / "state.json"), "--shards", other, *more]) == 1
    assert "domain 'target/math': " in capsys.readouterr().out


def test_commands_name_what_they_need_for_a_packed_run(shards, cache, tmp_path, capsys):
    manifest = text_manifest(tmp_path / "text", {"source/web": 60, "target/math": 40})
    packed, stored = tmp_path / "packed.json", tmp_path / "stored.json"
    sampler = AgentWeightedSampler(manifest, pack=PackText(byte_tokenizer(), LENGTH), reading=quiet(cache))
    packed.write_text(json.dumps(sampler.state_dict(consumed=5)))
    stored.write_text(json.dumps(AgentWeightedSampler(manifest, reading=quiet(cache)).state_dict(consumed=5)))
    byte_tokenizer("</s>").save(str(tmp_path / "other.json"))
    assert main(["replay", str(packed)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    tokenizer = ["--tokenizer", str(tmp_path / "other.json")]
    for command in ("replay", "state"):
        for state, arguments, expected in (
            (packed, ["--shards", manifest], "pass the tokenizer of the run (--tokenizer tokenizer.json"),
            (packed, ["--shards", manifest, *tokenizer], "pass the tokenizer of the run"),
            (packed, tokenizer, "--tokenizer has no effect, because it is for the rows of --shards"),
            (stored, ["--shards", manifest, *tokenizer], "--tokenizer has no effect, because the run read rows as"),
        ):
            assert main([command, str(state), *arguments]) == 2
            assert expected in capsys.readouterr().err
    edited = {**json.loads(packed.read_bytes()), "packing": "rows of paper"}
    packed.write_text(json.dumps(edited))
    assert main(["replay", str(packed), "--shards", manifest, *tokenizer]) == 2
    assert "the state's packing is 'rows of paper', which describes no PackText" in capsys.readouterr().err


@pytest.mark.parametrize("parse", [False, True])
def test_collate_packed_keeps_the_documents_apart(cache, tmp_path, parse):
    """By the end-of-text tokens, or, where a document may contain them, by the lengths that the row names."""
    texts = ["ab", f"c{END}d", "efghij"]
    paths = write_documents(tmp_path, {"source/a": [texts]})
    pack = PackText(byte_tokenizer(), 6, parse_special_tokens=parse)
    in_order = quiet(cache, ReadingConfig(shuffle_window=1))
    batch = collate_packed(
        list(AgentWeightedSampler(paths, pack=pack, reading=in_order, exhausted="stop")), end_token=END_ID
    )
    if parse:  # ab. c.d. | efghij (its end token is the remainder)
        assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2]
        assert batch["position_ids"][1].tolist() == [0, 0, 1, 2, 3, 4]
        assert batch["labels"][0].tolist()[3] == IGNORED_LABEL != batch["labels"][0].tolist()[4]
    else:  # the end token is text of many bytes
        assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2]
        assert batch["position_ids"][1:3].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_are_made_where_tensors_have_another_device_by_default(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """As with `torch.set_default_device("cuda")`: numpy cannot write to such a tensor."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = np.arange(6, dtype=np.uint16).reshape(2, 3)
    samples = [{"__index__": 0, "__domain__": "a", "__key__": "0", PACKED_MEMBER: row} for row in rows]
    of_rows = of_packed_rows(packed_tokens)
    assert of_rows is not None
    with torch.device("meta"):
        assert collate_packed(samples)["input_ids"].shape == rows.shape
        found = [of_rows(rows)["input_ids"], ShiftedTokens(length=3).of_rows(rows)["tokens"]]
    assert [tensor.tolist() for tensor in found] == [rows.tolist()] * 2

"""Messages whose remedy changes the data of a run: each names a way to resume, and the way works.

Each case starts a run, saves its state, lets something happen to the data until the message appears, and then does what
the message says: the run resumes at the sample where it was, with its counts and its ledger.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY
from shard_fixtures import rewritten
from text_shards import byte_tokenizer
from transformers import Trainer, TrainingArguments

from dmagent_loader import AgentWeightedSampler, PackText, ReadingConfig
from dmagent_loader.errors import (
    HOW_TO_RESUME,
    ConfigurationError,
    DamagedShardError,
    DecodeError,
    DMAgentError,
    EmptyShardError,
    ExhaustedError,
    InfluenceError,
    ShardLayoutError,
    ShardNotFoundError,
    StateError,
)
from dmagent_loader.integrations._evidence import LossProbe, _scorable
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.shards import ShardCollection
from dmagent_loader.testing import sample_ids, write_toy_shards
from dmagent_loader.transforms import collate_packed, packed_tokens

ROWS = {"source/web": 32, "target/math": 32}
CONSUMED = 12
Shards = dict[str, list[str]]


class Run:
    """A run of 12 samples, its shards, and its state."""

    def __init__(self, folder: Path, tokens: int | None = None) -> None:
        self.folder = folder
        self.shards: Shards = write_toy_shards(folder / "shards", ROWS, rows_per_shard=8, tokens=tokens)
        sampler = self.sampler()
        sample_ids(sampler, CONSUMED)
        self.state = json.loads(json.dumps(sampler.state_dict()))
        self.counts = sampler.achieved()

    def sampler(self, **settings: Any) -> AgentWeightedSampler:
        reading = ReadingConfig(cache_dir=self.folder / "cache", progress=False, **settings.pop("reading", {}))
        given = {"shards": self.shards, "samples_per_reweight": 8, "exhausted": "repeat", **settings}
        return AgentWeightedSampler(reading=reading, **given)  # type: ignore[arg-type]

    def exact(self, **settings: Any) -> AgentWeightedSampler:
        sampler = self.sampler(**settings)
        sampler.load_state_dict(self.state)
        return sampler

    def resumes(self, **settings: Any) -> None:
        """Does what every such message says: `load_state_dict(state, data='changed')`."""
        sampler = self.sampler(**settings)
        sampler.load_state_dict(self.state, data="changed")
        assert {name: n for name, n in sampler.achieved().items() if n} == {n: c for n, c in self.counts.items() if c}
        assert [index for index, _, _ in sample_ids(sampler, 60)] == list(range(CONSUMED, CONSUMED + 60))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def refused(error: type[DMAgentError], action: Callable[[], Any]) -> str:
    with pytest.raises(error) as found:
        action()
    message = str(found.value)
    assert message.count(HOW_TO_RESUME) == 1, message
    return message


def overwritten(shard: str, *, time: bool) -> None:
    """Changes a byte of the first row in place; with or without a new modification time."""
    status = os.stat(shard)
    data = bytearray(Path(shard).read_bytes())
    data[512] ^= 1
    Path(shard).write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 10**10 * time))


def warned(caplog: pytest.LogCaptureFixture) -> bool:
    return any(HOW_TO_RESUME in record.getMessage() for record in caplog.records)


# Shards that were overwritten, cut, lost


def test_a_row_that_changed_is_indexed_again(run: Run) -> None:
    shard = run.shards["source/web"][0]
    sampler = run.exact()
    overwritten(shard, time=False)
    message = refused(DamagedShardError, lambda: sample_ids(sampler, 200))
    found = re.search(r"remove its cached index (\S+) and open", message)
    assert found is not None
    os.unlink(found[1])
    run.resumes()


def test_a_shard_that_was_replaced_while_it_was_open_is_opened_again(run: Run) -> None:
    shard = run.shards["source/web"][0]
    sampler = run.exact()
    rewritten(shard, lambda key, members: {"txt": b"other " + key.encode()})
    os.utime(shard, (2e9, 2e9))
    assert "open the shards again" in refused(DamagedShardError, lambda: sample_ids(sampler, 200))
    run.resumes()


def test_a_table_of_indexes_with_another_number_of_rows_is_written_anew(run: Run) -> None:
    indexes = run.folder / "indexes"
    collection = ShardCollection.open(run.shards, cache_dir=run.folder / "cache", progress=False)
    collection.write_indexes(indexes)
    shutil.rmtree(run.folder / "cache")
    shard = Path(run.shards["source/web"][0])
    (table,) = indexes.rglob(f"{shard.parent.name}/shards.index")
    content = json.loads(table.read_text())
    content["shards"][shard.name]["rows"] -= 2
    table.write_text(json.dumps(content))
    sampler = run.sampler(reading={"indexes": indexes})
    message = refused(DamagedShardError, lambda: sample_ids(sampler, 200))
    assert "write the table anew" in message
    collection.write_indexes(indexes)
    shutil.rmtree(run.folder / "cache")
    run.resumes(reading={"indexes": indexes})


def test_a_shard_that_became_shorter_is_opened_again(run: Run) -> None:
    shard = run.shards["source/web"][0]
    sampler = run.exact()
    sample_ids(sampler, 60)
    with open(shard, "r+b") as file:
        file.truncate(2048)
    message = refused(DamagedShardError, lambda: sample_ids(sampler, 400))
    assert "restore" in message
    os.utime(shard, (2e9, 2e9))
    run.resumes(reading={"on_damage": "skip"})


def test_a_truncated_shard_is_skipped(run: Run) -> None:
    with open(run.shards["source/web"][0], "r+b") as file:
        file.truncate(5000)
    assert "on_damage='skip'" in refused(DamagedShardError, run.exact)
    run.resumes(reading={"on_damage": "skip"})


def test_a_shard_that_was_replaced_on_purpose_loses_its_entry_in_the_manifest(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folder, sizes = tmp_path / "shards", ("rows", "bytes", "sha256")
    listed = {
        name: {
            "shards": [
                {
                    "path": os.path.relpath(shard, folder),
                    "rows": 8,
                    "bytes": os.path.getsize(shard),
                    "sha256": hashlib.sha256(Path(shard).read_bytes()).hexdigest(),
                }
                for shard in shards
            ]
        }
        for name, shards in run.shards.items()
    }
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"schema": 1, "domains": listed}))
    rewritten(run.shards["source/web"][0], lambda key, members: {"txt": b"repaired"})
    for shards in (run.shards, str(manifest)):
        assert "take its rows, bytes and sha256 out of" in refused(
            DamagedShardError, lambda given=shards: run.exact(shards=given)
        )
    for entry in listed["source/web"]["shards"][:1]:
        for name in sizes:
            del entry[name]
    manifest.write_text(json.dumps({"schema": 1, "domains": listed}))
    run.resumes(shards=str(manifest))


def test_a_missing_shard_is_left_out(run: Run) -> None:
    os.unlink(run.shards["source/web"][1])
    assert "check the path, or leave it out" in refused(ShardNotFoundError, run.exact)
    del run.shards["source/web"][1]
    run.resumes()


def test_a_pattern_that_matches_nothing_any_more_is_taken_out(run: Run) -> None:
    run.shards["target/math"] = [f"{run.folder}/gone-*.tar"]
    assert "check the path, or leave it out" in refused(ShardNotFoundError, run.exact)
    del run.shards["target/math"]
    run.resumes()


# Shards and domains that cannot be read


def test_a_compressed_shard_is_unpacked(run: Run) -> None:
    shard = Path(run.shards["source/web"][0])
    packed = shard.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    shard.unlink()
    run.shards["source/web"][0] = str(packed)
    assert "gunzip" in refused(ShardLayoutError, run.exact)
    shard.write_bytes(gzip.decompress(packed.read_bytes()))
    run.shards["source/web"][0] = str(shard)
    run.resumes()


def test_a_shard_of_keys_that_return_is_sorted(run: Run) -> None:
    shard = Path(run.shards["source/web"][0])
    unsorted = shard.with_name("unsorted.tar")
    with tarfile.open(shard) as old, tarfile.open(unsorted, "w") as new:
        members = old.getmembers()
        for member in [*members, tarfile.TarInfo(members[0].name.replace(".txt", ".bin"))]:
            new.addfile(member, old.extractfile(member) if member in members else None)
    run.shards["source/web"][0] = str(unsorted)
    assert "--sort=name" in refused(ShardLayoutError, run.exact)
    with tarfile.open(unsorted) as old, tarfile.open(shard, "w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            new.addfile(member, old.extractfile(member))
    run.shards["source/web"][0] = str(shard)
    os.utime(shard, (2e9, 2e9))
    run.resumes()


def test_a_domain_without_rows_is_taken_out(run: Run) -> None:
    empty = write_toy_shards(run.folder / "empty", {"target/math": 0})
    run.shards.update(empty)
    assert "give the domain other shards or take it out" in refused(EmptyShardError, run.exact)
    del run.shards["target/math"]
    run.resumes()


def test_copies_are_listed_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    copy = f"{run.folder}/copy.tar"
    shutil.copy(run.shards["source/web"][0], copy)
    run.shards["source/web"].append(copy)
    with caplog.at_level(logging.WARNING):
        sampler = run.sampler()
    assert warned(caplog)
    sample_ids(sampler, CONSUMED)
    run.state, run.counts = json.loads(json.dumps(sampler.state_dict())), sampler.achieved()
    run.shards["source/web"].pop()
    run.resumes()


# Data that are used up


def test_a_used_up_domain_gets_more_shards_or_another_rule(run: Run) -> None:
    sampler = run.sampler(exhausted={"target/math": "error", "source": "repeat"})
    taken: list[Any] = []

    def read() -> None:
        for sample in sampler:
            taken.append(sample["__domain__"])

    assert "add shards" in refused(ExhaustedError, read)
    run.counts = dict(Counter(taken))
    run.state = json.loads(json.dumps(sampler.state_dict()))
    consumed = run.state["consumed"]
    more = write_toy_shards(run.folder / "more", {"target/math": 64}, rows_per_shard=8)["target/math"][4:]
    for shards, rule in ((more, "error"), ([], "repeat")):
        resumed = run.sampler(
            shards={**run.shards, "target/math": [*run.shards["target/math"], *shards]},
            exhausted={"target/math": rule, "source": "repeat"},
        )
        resumed.load_state_dict(run.state, data="changed")
        assert [index for index, _, _ in sample_ids(resumed, 40)] == list(range(consumed, consumed + 40))


def test_a_run_that_has_ended_goes_on_with_more_data(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    sampler = run.sampler(exhausted="stop")
    whole = sample_ids(sampler)
    with caplog.at_level(logging.WARNING):
        assert sample_ids(sampler) == []
    assert warned(caplog)
    run.state = json.loads(json.dumps(sampler.state_dict()))
    for settings in ({"exhausted": "repeat"}, {"exhausted": "stop", "shards": {**run.shards, **_more(run)}}):
        resumed = run.sampler(**settings)
        resumed.load_state_dict(run.state, data="changed")
        assert [index for index, _, _ in sample_ids(resumed, 20)] == list(range(len(whole), len(whole) + 20))


class Weight(torch.nn.Module):
    """The smallest model that a Trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.weight * 1.0}


def test_a_run_of_a_trainer_that_has_ended_goes_on_with_more_data(tmp_path: Path) -> None:
    run = Run(tmp_path, tokens=8)

    def train(resume: bool) -> AgentWeightedSampler:
        sampler = run.sampler(exhausted="stop", transform=packed_tokens)
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=100, save_steps=100, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(Weight(), arguments, train_dataset=sampler, callbacks=[DataMixingCallback(sampler)])
        trainer.train(resume_from_checkpoint=resume)
        return sampler

    ended = train(False)
    assert "with more data or exhausted='repeat'" in refused(StateError, lambda: train(True))
    state = json.loads(json.dumps(ended.state_dict()))
    for settings in ({"exhausted": "repeat"}, {"exhausted": "stop", "shards": {**run.shards, **_more(run, tokens=8)}}):
        resumed = run.sampler(transform=packed_tokens, **settings)
        resumed.load_state_dict(state, data="changed")
        first = state["consumed"]
        assert [index for index, _, _ in sample_ids(resumed, 20)] == list(range(first, first + 20))


def _more(run: Run, tokens: int | None = None) -> Shards:
    more = write_toy_shards(run.folder / "more", dict.fromkeys(ROWS, 64), rows_per_shard=8, tokens=tokens)
    return {name: [*run.shards[name], *shards[4:]] for name, shards in more.items()}


def test_more_ranks_than_rows_need_more_data(tmp_path: Path) -> None:
    run = Run(tmp_path)
    refused(ConfigurationError, lambda: run.sampler(rank=0, world_size=65))
    run.shards.update(_more(run))
    sampler = run.sampler(rank=0, world_size=65)
    sampler.load_state_dict(run.state, data="changed")
    first = run.state["consumed"]
    assert first <= next(iter(sampler))["__index__"] < first + 65


# Rows that cannot be used


def test_a_bad_row_is_skipped_or_repaired(run: Run) -> None:
    shard = run.shards["source/web"][0]
    shutil.copy(shard, f"{shard}.whole")
    rewritten(shard, lambda key, members: {"txt": b"\xe9"} if key.endswith("3") else members)
    os.utime(shard, (2e9, 2e9))
    sampler = run.sampler()
    sampler.load_state_dict(run.state, data="changed")
    message = refused(DecodeError, lambda: sample_ids(sampler, 300))
    assert "on_bad_row='skip'" in message
    run.resumes(on_bad_row="skip", reading={"max_bad_rows": 0.2})
    run.state = json.loads(json.dumps(sampler.state_dict()))
    os.replace(f"{shard}.whole", shard)
    resumed = run.sampler()
    resumed.load_state_dict(run.state, data="changed")
    assert len(sample_ids(resumed, 100)) == 100


def test_an_error_of_the_transform_says_the_same(run: Run) -> None:
    def transform(sample: Mapping[str, Any]) -> Any:
        raise KeyError("text")

    with pytest.raises(KeyError) as error:
        sample_ids(run.exact(transform=transform))
    assert HOW_TO_RESUME in "".join(error.value.__notes__)


def test_a_domain_of_bad_rows_only_gets_other_shards(run: Run) -> None:
    for shard in run.shards["target/math"]:
        rewritten(shard, lambda key, members: {"txt": b"\xe9"})
        os.utime(shard, (2e9, 2e9))
    settings: dict[str, Any] = {"on_bad_row": "skip", "reading": {"max_bad_rows": 1.0}}
    sampler = run.sampler(**settings)
    sampler.load_state_dict(run.state, data="changed")
    assert "give it other shards" in refused(DecodeError, lambda: sample_ids(sampler, 100))
    run.shards["target/math"] = write_toy_shards(run.folder / "other", {"target/math": 16})["target/math"]
    run.resumes(**settings)


def test_rows_that_are_not_packed_alike_are_written_again(tmp_path: Path) -> None:
    text = Run(tmp_path / "text")
    refused(DecodeError, lambda: collate_packed(list(islice(text.exact(decode="lazy"), 4))))
    packed = Run(tmp_path / "packed", tokens=8)
    longer = write_toy_shards(tmp_path / "longer", {"target/math": 32}, tokens=9)
    packed.shards.update(longer)
    sampler = packed.sampler(decode="lazy")
    sampler.load_state_dict(packed.state, data="changed")
    refused(DecodeError, lambda: collate_packed(list(islice(sampler, 8))))
    packed.shards.update(write_toy_shards(tmp_path / "again", {"target/math": 32}, tokens=8))
    packed.resumes(decode="lazy")


def test_domains_too_small_to_measure_influence_get_more_rows(run: Run) -> None:
    refused(InfluenceError, lambda: _scorable({"source/web": []}))
    run.shards.update(_more(run))
    run.resumes()


def test_domains_without_a_token_to_predict_get_other_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, tokens=1)
    sampler = run.exact(transform=packed_tokens)
    refused(InfluenceError, lambda: LossProbe(sampler, None)._read())
    run.shards = write_toy_shards(run.folder / "longer", ROWS, tokens=8)
    run.resumes(transform=packed_tokens)


def test_documents_that_cannot_be_packed_are_left_out_or_repaired(run: Run) -> None:
    rewritten(run.shards["source/web"][0], lambda key, members: {"txt": b"\xe9"} if key.endswith("3") else members)
    os.utime(run.shards["source/web"][0], (2e9, 2e9))
    pack = PackText(byte_tokenizer(), 8)
    assert "on_bad_row='skip'" in refused(DecodeError, lambda: run.sampler(pack=pack))
    run.resumes(pack=pack, on_bad_row="skip", reading={"max_bad_rows": 0.2})


def test_rows_longer_than_a_shard_become_shorter(run: Run) -> None:
    refused(EmptyShardError, lambda: run.sampler(pack=PackText(byte_tokenizer(), 10_000)))
    run.resumes(pack=PackText(byte_tokenizer(), 16))


# All of them


USES = {
    "_loading/bad_rows.py": 3,
    "_loading/feed.py": 2,
    "integrations/_evidence.py": 2,
    "integrations/huggingface.py": 1,
    "mixture/segment.py": 2,
    "shards/checks.py": 1,
    "shards/collection.py": 2,
    "shards/index/catalogue.py": 2,
    "shards/packed/rows.py": 2,
    "shards/sources/remote.py": 1,
    "transforms/packed.py": 2,
}
"""Messages that end in `HOW_TO_RESUME`, by file. Each has its case above."""


def test_every_such_message_has_its_case_here() -> None:
    """Whoever writes another one adds its case, and the number."""
    package = REPOSITORY / "dmagent_loader"
    found = {}
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "HOW_TO_RESUME"]
        if names and path.name != "errors.py":
            found[path.relative_to(package).as_posix()] = len(names)
    found["_loading/bad_rows.py"] -= 1  # one removes it from a message that has it already
    found.pop("shards/inputs/archives.py")  # the same
    assert found == USES

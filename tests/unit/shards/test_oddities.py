"""What is odd about the rows of a domain is said when its shards are opened, also when their indexes are cached."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, ShardLayoutError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.inventory import RowKind, inventory_text, parse_inventory
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.sources.local import open_source

WriteTar = Callable[..., Path]
TWENTY = [(f"{n:03d}.{end}", b"x") for n in range(20) for end in ("json", "txt")]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Opens shards, and returns the warnings."""

    def opened(shards: dict[str, list[Path]], **settings: object) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ShardCollection.open(shards, progress=False, **settings)  # type: ignore[arg-type]
        return [record.getMessage() for record in caplog.records]

    return opened


def keys(collection: ShardCollection) -> list[str]:
    return [collection.read(0, 0, row).key for row in range(int(collection.shard_rows(0)[0]))]


def test_a_file_beside_the_rows_is_named_at_every_open(write_tar: WriteTar, said: Callable[..., list[str]]) -> None:
    shards = {
        "source/plain": [write_tar("plain.tar", TWENTY)],
        "source/a": [write_tar("a.tar", [*TWENTY, ("README.md", b"about")]), write_tar("b.tar", TWENTY[:10])],
    }
    for _ in range(2):
        lines = said(shards)
        assert [line.split(" (first")[0] for line in lines] == [
            "domain 'source/a': 1 of 26 rows has no 'json', which nearly all have",
            "domain 'source/a': 1 of 26 rows has no 'txt', which nearly all have",
        ]
        assert f"row 'README' of {shards['source/a'][0]}, with md" in lines[0]


@pytest.mark.parametrize(
    ("extra", "missing"),
    [([("Thumbs.db", b"x")], 1), ([("020.json", b"x")], 1), ([("020.txt", b"x"), ("021.json", b"x")], 1), ([], 0)],
)
def test_rows_that_lack_a_member_are_counted(
    write_tar: WriteTar, said: Callable[..., list[str]], extra: list[tuple[str, bytes]], missing: int
) -> None:
    lines = [line for line in said({"source/a": [write_tar("a.tar", [*TWENTY, *extra])]}) if "'txt'" in line]
    assert len(lines) == missing
    assert all(f"1 of {20 + len(extra)} rows has no 'txt'" in line for line in lines)


def test_a_shard_that_is_unlike_the_others_is_named(write_tar: WriteTar, said: Callable[..., list[str]]) -> None:
    """All its rows are alike, so the shard itself shows nothing."""
    shards = [write_tar(f"{n}.tar", [(f"{n}-{row}.txt", b"x") for row in range(9)]) for n in range(8)]
    other = write_tar("other.tar", [(f"{row}.text", b"x") for row in range(9)])
    (line,) = said({"source/a": [*shards, other]})
    assert f"9 of 81 rows have no 'txt', which nearly all have (first: every row of {other}, with text)" in line


def test_rows_that_differ_by_design_are_no_oddity(write_tar: WriteTar, said: Callable[..., list[str]]) -> None:
    members = [(f"{n:03d}.{'jpg' if n % 3 else 'png'}", b"x") for n in range(30)]
    members += [(f"{n:03d}.txt", b"x") for n in range(30) if n % 2]
    assert not said({"source/a": [write_tar("a.tar", sorted(members))], "source/b": [write_tar("b.tar", TWENTY)]})


def test_files_that_become_one_row_are_named_with_the_remedy(
    write_tar: WriteTar, said: Callable[..., list[str]]
) -> None:
    """Keys end at the first dot: a whole corpus became one row, without a word."""
    path = write_tar("a.tar", [(f"arxiv.2101.{n:05d}.txt", b"%d" % n) for n in range(200)])
    for _ in range(2):
        (line,) = said({"source/a": [path]})
        assert "1 of 1 rows is made of a dozen files or more of one kind, *.txt" in line
        assert "key_ends_at='last-dot'" in line
    assert not said({"source/a": [path]}, key_ends_at="last-dot")
    collection = ShardCollection.open({"source/a": path}, key_ends_at="last-dot", progress=False)
    assert collection.num_rows.tolist() == [200]
    assert collection.read(0, 0, 7).key == "arxiv.2101.00007"
    assert {name: bytes(data) for name, data in collection.read(0, 0, 7).members.items()} == {"txt": b"7"}
    again = ShardCollection.open({"source/a": path}, progress=False)
    assert again.num_rows.tolist() == [1], "the indexes of both kinds of keys lie side by side"


def test_samplers_and_the_command_take_the_end_of_keys(write_tar: WriteTar, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar("a.tar", [(f"arxiv.2101.{n:05d}.txt", b"%d" % n) for n in range(20)])
    reading = ReadingConfig(key_ends_at="last-dot", progress=False)
    sampler = AgentWeightedSampler({"source/a": str(path)}, samples_per_reweight=10, reading=reading)
    assert {sample["__key__"] for sample in islice(sampler, 20)} == {f"arxiv.2101.{n:05d}" for n in range(20)}
    assert main(["index", str(path), "--key-ends-at", "last-dot", "--no-progress"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:3] == ["20", "20"]
    with pytest.raises(ConfigurationError, match="key_ends_at is 'dot'"):
        ReadingConfig(key_ends_at="dot")  # type: ignore[arg-type]


def test_commands_that_read_text_take_the_end_of_keys(
    tmp_path: Path, write_tar: WriteTar, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warning named a remedy that they did not have."""
    path = write_tar("a.tar", [(f"arxiv.2101.{n:05d}.txt", b"document %d" % n) for n in range(20)])
    for command in (
        ["shard", "--domain", f"source/a={path}", "--tar-member", "txt"],
        ["label", "--shards", f"source/a={path}"],
        ["inspect", f"source/a={path}"],
    ):
        command += ["--no-progress", "--output"]
        assert main([*command, str(tmp_path / f"{command[0]}-first.html")]) == 2
        assert main([*command, str(tmp_path / f"{command[0]}-last.html"), "--key-ends-at", "last-dot"]) == 0
        assert "20" in capsys.readouterr().out


def test_members_that_are_packed_stay_together_at_the_last_dot(write_tar: WriteTar) -> None:
    path = write_tar("a.tar", [("v1.0.json.gz", b"x"), ("v1.0.txt", b"y"), ("v1.1.TXT", b"z")])
    collection = ShardCollection.open({"source/a": path}, key_ends_at="last-dot", progress=False)
    assert keys(collection) == ["v1.0", "v1.1"]
    assert list(collection.read(0, 0, 0).members) == ["json.gz", "txt"]


def test_too_many_extensions_name_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"
    with tarfile.open(path, "w") as tar:
        for number in range((1 << 16) + 1):
            tar.addfile(tarfile.TarInfo(f"arxiv.{number}.txt"))
    with pytest.raises(ShardLayoutError, match=r"key_ends_at='last-dot'"):
        ShardCollection.open({"source/a": path}, progress=False)


def test_another_place_for_the_end_of_keys_is_refused(twenty: Path) -> None:
    with pytest.raises(ConfigurationError, match="key_ends_at='dot'"):
        ShardCollection.open({"source/a": twenty}, key_ends_at="dot")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hidden_files_are_left_out_and_counted(
    write_tar: WriteTar, said: Callable[..., list[str]], format: int
) -> None:
    """`._x` twice in a folder was even refused, as a key that comes back."""
    rows = [(f"data/{n:03d}.txt", b"x") for n in range(4)]
    hidden = [("data/.DS_Store", b"h"), ("data/._000.txt", b"h"), ("data/._001.txt", b"h"), (".gitkeep", b"")]
    members = [hidden[0], rows[0], hidden[1], rows[1], hidden[2], rows[2], hidden[3], rows[3]]
    shards = {"source/a": [write_tar("a.tar", members, format=format), write_tar("b.tar", [("b.txt", b"y")])]}
    for _ in range(2):
        (line,) = said(shards)
        assert line.startswith("domain 'source/a': 4 hidden files")
        assert f"left out of 1 of its shards (first: {shards['source/a'][0]})" in line
    collection = ShardCollection.open(shards, progress=False)
    assert keys(collection) == [f"data/{n:03d}" for n in range(4)]


def kinds_of(path: Path) -> list[RowKind]:
    index = build_index(str(path), open_source(str(path)), path.stat().st_size)
    return list(parse_inventory(inventory_text(index)).kinds)


def test_kinds_of_rows(write_tar: WriteTar) -> None:
    assert kinds_of(write_tar("a.tar", TWENTY)) == [RowKind(extensions=("json", "txt"))]
    swapped = [("0.txt", b"x"), ("0.json", b"x"), ("1.json", b"x"), ("1.txt", b"x")]
    assert kinds_of(write_tar("a.tar", swapped)) == [RowKind(extensions=("json", "txt"))], "their order says nothing"
    assert kinds_of(write_tar("a.tar", [*swapped, ("2.txt", b"x"), ("3.txt", b"x")])) == [
        RowKind(extensions=("json", "txt"), rows=2, key="0"),
        RowKind(extensions=("txt",), rows=2, key="2"),
    ]
    frames = [(f"{row}.{frame:02d}.jpg", b"x") for row in range(3) for frame in range(12 + row)]
    assert kinds_of(write_tar("a.tar", frames)) == [RowKind(extensions=("*.jpg",))]
    assert kinds_of(write_tar("a.tar", [])) == [RowKind(extensions=())]
    every = [(f"{row}.e{row}", b"x") for row in range(100)]
    assert len(kinds_of(write_tar("a.tar", every))) == 16

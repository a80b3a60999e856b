"""From patterns to shards."""

from __future__ import annotations

import traceback
from pathlib import Path

import fsspec
import pytest
import webdataset
from shard_fixtures import WriteTar

from dmagent_loader.errors import ConfigurationError, DMAgentError, ShardNotFoundError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources.patterns import expand_domains, expand_shards
from dmagent_loader.shards.sources.remote import filesystem_of
from dmagent_loader.shards.sources.urls import (
    base_name,
    display_text,
    display_url,
    is_local,
    local_path,
    without_signature,
)


@pytest.mark.parametrize(
    ("url", "identity"),
    [
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("https://host/a.tar?X-Amz-Date=1&X-Amz-Signature=f", "https://host/a.tar"),
        ("https://host/a.tar?anything=at&all", "https://host/a.tar"),
        ("https://host/a.tar?versionId=3&X-Amz-Signature=f", "https://host/a.tar?versionId=3"),
        ("https://host/a.tar?X-Goog-Signature=f&generation=7", "https://host/a.tar?generation=7"),
        ("https://host/get?file=a.tar&sv=2024&sig=f&se=2026", "https://host/get?file=a.tar"),
        ("https://host/get?file=a.tar&Expires=1&Signature=f&Key-Pair-Id=k", "https://host/get?file=a.tar"),
        ("https://host/get?serial=a&seed=b", "https://host/get?serial=a&seed=b"),
        ("https://host/get?X-Amz-Signature=f", "https://host/get"),
    ],
)
def test_a_shard_is_known_by_its_url_without_the_signature(url: str, identity: str) -> None:
    """Catches one shard for each signature, and one shard for all that a query names."""
    assert without_signature(url) == identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b.tar", "odd{1..2}.tar", "x y%.tar"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(urls: list[str]) -> list[str]:
    return [base_name(url) for url in urls]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{b,a-001}.tar", ["b.tar", "a-001.tar"]),
        ("a-*.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-00[12].tar", ["a-001.tar", "a-002.tar"]),
        ("odd{1..2}.tar", ["odd{1..2}.tar"]),
        ("", ["a-000.tar", "a-001.tar", "a-002.tar", "b.tar", "odd{1..2}.tar", "x y%.tar"]),
    ],
)
def test_local_patterns(folder: Path, pattern: str, expected: list[str]) -> None:
    assert names(expand_shards("d", f"{folder}/{pattern}")) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "s3://b/x-{000..003}.tar",
        "gs://b/{a,b}/x-{1..2}.tar",
        "http://h/a.tar::http://h/b-{0..1}.tar",
        "memory://x-{8..11}.tar",
    ],
)
def test_braces_expand_as_in_webdataset(pattern: str) -> None:
    assert expand_shards("d", pattern) == webdataset.shardlists.expand_urls(pattern)


def test_file_urls_and_paths_and_lists_may_be_mixed(folder: Path) -> None:
    urls = expand_shards("d", [f"file://{folder}/a-000.tar", folder / "b.tar", "s3://bucket/c.tar"])
    assert names(urls) == ["a-000.tar", "b.tar", "c.tar"]
    assert local_path(f"file://{folder}/x%20y%25.tar") == f"{folder}/x y%.tar"


@pytest.mark.parametrize("pattern", ["nothing-{000..001}.tar", "nothing-*.tar", "a-{000..003}.tar"])
def test_a_pattern_with_missing_shards_names_domain_and_pattern(folder: Path, pattern: str) -> None:
    """The last one lacks only a-003: catches an expansion that keeps what exists and drops the rest in silence."""
    with pytest.raises(ShardNotFoundError, match="'source/web'") as error:
        expand_shards("source/web", f"{folder}/{pattern}")
    assert pattern in str(error.value)


def test_no_shards_at_all(tmp_path: Path) -> None:
    with pytest.raises(ShardNotFoundError, match="'d' lists no shards"):
        expand_shards("d", [])
    with pytest.raises(ShardNotFoundError, match=r"holds no \*\.tar"):
        expand_shards("d", tmp_path)


@pytest.mark.parametrize("remote", [False, True])
def test_a_glob_matches_the_same_shards_after_their_indexes_were_written_beside_them(
    remote: bool, tmp_path: Path, write_tar: WriteTar
) -> None:
    folder = str(tmp_path / "globbed")
    for name in ("a", "b"):
        write_tar(f"globbed/{name}.tar", [("1.txt", name.encode())])
    if remote:
        fsspec.filesystem("memory").put(folder, "/globbed-shards", recursive=True)
        folder = "memory://globbed-shards"
    shards = [f"{folder}/a.tar", f"{folder}/b.tar"]
    for pattern in ("*", "[ab]*"):
        for key_ends_at in ("first-dot", "last-dot"):
            assert expand_shards("d", f"{folder}/{pattern}") == shards
            collection = ShardCollection.open({"d": f"{folder}/{pattern}"}, key_ends_at=key_ends_at, progress=False)
            collection.write_indexes()
    with pytest.raises(ShardNotFoundError, match="no shard matches"):
        expand_shards("d", f"{folder}/shards*")


@pytest.mark.parametrize("chain", ["", "simplecache::"])
def test_the_exact_name_of_a_file_in_a_store_wins_over_its_meaning_as_a_pattern(chain: str) -> None:
    """As with local files: catches the rows of part1 in place of those of part[1]."""
    memory, folder = fsspec.filesystem("memory"), f"{chain}memory://bracketed"
    memory.pipe({f"/bracketed/{name}": b"" for name in ("part[1].tar", "part1.tar", "part2.tar", "c[1]/a.tar")})
    assert expand_shards("d", f"{folder}/part[1].tar") == [f"{folder}/part[1].tar"]
    assert expand_shards("d", f"{folder}/part[2].tar") == [f"{folder}/part2.tar"]
    assert expand_shards("d", f"{folder}/part[12].tar") == [f"{folder}/part1.tar", f"{folder}/part2.tar"]
    assert expand_shards("d", f"{folder}/{{part2,part[1]}}.tar") == [f"{folder}/part2.tar", f"{folder}/part[1].tar"]


@pytest.mark.parametrize("pattern", ["pipe:cat a.tar", " pipe:curl -s http://x | tar x", "|cat a.tar"])
def test_shell_commands_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match="shell command"):
        expand_shards("d", pattern)


def test_a_shard_listed_twice_is_refused_even_under_two_names(folder: Path) -> None:
    (folder / "link.tar").symlink_to(folder / "b.tar")
    for second in ("b.tar", "link.tar", "./b.tar"):
        with pytest.raises(ConfigurationError, match=r"\.tar twice"):
            expand_shards("d", [f"{folder}/b.tar", f"{folder}/{second}"])


def test_a_shard_of_a_folder_listed_twice_is_refused(folder: Path) -> None:
    """A whole folder without links lists each file once: catches a check that is left out where it does not."""
    linked = folder / "of links"
    linked.mkdir()
    (linked / "c.tar").symlink_to(folder / "b.tar")
    (folder / "same").symlink_to(folder)
    for second in (".", "", "same", "./same/", "b.tar", "b*.tar", "of links", f"file://{folder}/b.tar"):
        other = second if "://" in second else f"{folder}/{second}"
        for both in ([str(folder), other], [other, str(folder)]):
            with pytest.raises(ConfigurationError, match=r"\.tar twice"):
                expand_shards("d", both)
    (folder / "same").unlink()
    with pytest.raises(ConfigurationError, match=r"\.tar twice"):
        expand_shards("d", [str(folder), f"{folder}/."])
    (linked / "c.tar").unlink()
    (linked / "b.tar").write_bytes(b"")
    assert len(expand_shards("d", [str(folder), f"{linked}/"])) == 7
    (linked / "d.tar").symlink_to("b.tar")
    with pytest.raises(ConfigurationError, match=r"\.tar twice"):
        expand_shards("d", str(linked))


@pytest.mark.parametrize(("pattern", "first"), [(".", "./a-000.tar"), ("./", "./a-000.tar"), ("{}//", "{}//a-000.tar")])
def test_the_shards_of_a_folder_are_named_as_the_folder_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, first: str
) -> None:
    monkeypatch.chdir(folder)
    urls = expand_shards("d", pattern.format(folder))
    assert urls[0] == first.format(folder)
    with pytest.raises(ConfigurationError, match=r"\.tar twice"):
        expand_shards("d", [pattern.format(folder), "b.tar"])


def test_shards_in_the_root_are_not_those_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.isfile", lambda _: True)
    monkeypatch.chdir(tmp_path)
    for both in (["/a.tar", "a.tar"], ["a.tar", "/a.tar"]):
        assert expand_shards("d", both) == both
    monkeypatch.chdir("/")
    with pytest.raises(ConfigurationError, match=r"a\.tar twice"):
        expand_shards("d", ["/a.tar", "a.tar"])


PARTS = [f"https://host/get.tar?part={part}&X-Amz-Signature=f" for part in (1, 2)]


def test_shards_that_differ_only_in_the_query_of_a_tar_are_refused_in_one_domain_and_in_two() -> None:
    """Both have one identity: catches a check of each domain alone, after which both deliver the rows of one part."""
    reason = r"differ only in the query of https://host/get\.tar\?\.\.\. \(part\): .*get\?file=1\.tar"
    with pytest.raises(ConfigurationError, match=f"^domain 'source/a' lists shards whose URLs {reason}"):
        expand_shards("source/a", PARTS)
    with pytest.raises(ConfigurationError, match=f"^domains 'source/a' and 'target/b' list shards whose URLs {reason}"):
        ShardCollection.open({"source/a": PARTS[0], "target/b": PARTS[1]}, progress=False)


@pytest.mark.parametrize("pattern", ["https://host/get.tar", "https://host/get.tar?X-Amz-Signature=f"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_shard_without_a_query_is_not_taken_for_one_with_a_query_in_another_domain(
    pattern: str, is_first: bool
) -> None:
    """They would share indexes and blocks: catches a check of those with a query among themselves."""
    domains = {"source/a": ["https://host/1.tar", pattern], "target/b": "https://host/{get,set}.tar?part=2"}
    items = list(domains.items())
    with pytest.raises(ConfigurationError, match=r"list shards whose URLs differ only in the query of .* \(part\)"):
        list(expand_domains(dict(items if is_first else items[::-1])))


def test_a_shard_in_two_domains_is_the_same_whatever_its_signature() -> None:
    """That is a matter for a warning: catches a refusal of all URLs with a common path."""
    shards = {
        "source/a": ["https://host/a.tar?get&sig=f", "https://host/b.tar?versionId=1", "https://host/get?file=1"],
        "target/b": ["https://host/a.tar?sig=e&get", "https://host/b.tar?versionId=2", "https://host/get?file=2"],
        "target/c": ["https://host/c.tar"],
        "target/d": ["https://host/c.tar?x-id=GetObject&X-Amz-Signature=f"],  # as SDKs for JavaScript sign
    }
    assert dict(expand_domains(shards)) == shards


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/source/c#/a#1.tar", "a#1.tar"),
        ("s3://b/c#/000.tar", "000.tar"),
        ("simplecache::gs://b/a#1.tar?versionId=4", "a#1.tar"),
        ("file:///data/c#/a#1%23.tar", "a#1#.tar"),
        ("https://host/c%23/a%231.tar?sig=c/d#e", "a%231.tar"),
        ("https://host/a.tar#1.tar", "a.tar"),
    ],
)
def test_a_number_sign_is_a_part_of_a_name_except_in_what_a_web_server_receives(url: str, name: str) -> None:
    """Catches one name, and one index, for all keys that begin alike."""
    assert base_name(url) == name
    assert display_url(url).partition("?")[0].endswith(name) or is_local(url)


def test_a_local_file_with_a_number_sign_is_found_by_its_url(tmp_path: Path) -> None:
    (tmp_path / "a#1.tar").write_bytes(b"")
    url = f"file://{tmp_path}/a#1.tar"
    assert expand_shards("d", url) == [url]


def test_a_number_sign_in_the_url_of_a_web_server_is_refused() -> None:
    """The server would be asked for `a` three times."""
    with pytest.raises(ConfigurationError, match=r"'http://host/a' with a '#' .*: write %23"):
        expand_shards("d", "http://host/a#{0..2}.tar")
    assert expand_shards("d", "http://host/a%23{0..1}.tar") == ["http://host/a%230.tar", "http://host/a%231.tar"]
    assert expand_shards("d", "s3://b/a#{0..1}.tar") == ["s3://b/a#0.tar", "s3://b/a#1.tar"]


def test_the_host_of_a_url_may_be_an_ipv6_address() -> None:
    """Its colons join no patterns, its brackets are no wildcard, and fsspec, which would split it, gets it whole."""
    one, two = "[0000:0000:0000:0000:0000:0000:0000:0001]", "[2001:0db8:0000:0000:0000:0000:0000:0002]"
    pattern = "http://[::1]:8000/a-{0..1}.tar::https://u:p@[2001:db8::2]/b.tar::http://[1:2:3:4:5:6:7:8]/c.tar"
    urls = [f"http://{one}:8000/a-0.tar", f"http://{one}:8000/a-1.tar", f"https://u:p@{two}/b.tar"]
    assert expand_shards("d", pattern) == [*urls, "http://[1:2:3:4:5:6:7:8]/c.tar"]
    assert filesystem_of(urls[0])[1] == filesystem_of("http://[::1]:8000/a-0.tar")[1] == urls[0]
    assert expand_shards("d", "simplecache::http://[::1]/a.tar") == [f"simplecache::http://{one}/a.tar"]
    for pattern in ("http://[::1]/*.tar", "http://[::1]/[ab].tar"):
        with pytest.raises(ConfigurationError, match="has a wildcard"):
            expand_shards("d", pattern)
    with pytest.raises(ConfigurationError, match="is no URL"):
        expand_shards("d", "http://[1::2::3]/a.tar")


def test_unbalanced_braces_are_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="braces"):
        expand_shards("d", "s3://b/x-{000..003.tar")


def test_messages_do_not_show_secrets() -> None:
    shown = display_url("could not read https://user:pass@host/a.tar?X-Amz-Signature=abc sorry")
    assert shown == "could not read https://host/a.tar?... sorry"
    assert "pass" not in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a b.tar?X-Amz-Signature=SECRET", "https://host/a b.tar?..."),
        ("https://host/it's.tar?sig=SECRET", "https://host/it's.tar?..."),
        ("https://host/a.tar?rscd=attachment; filename=x&sig=SECRET", "https://host/a.tar?..."),
        ('https://host/a.tar?rscd="x y"&sig=SE CRET#f', "https://host/a.tar?..."),
        ("simplecache::https://u:SECRET@host/a\u00a0b.tar?SECRET", "simplecache::https://host/a\u00a0b.tar?..."),
        ("https://u:SE CR@ET@host:80/a@b.tar", "https://host:80/a@b.tar"),
        ("https://u:SEC/RET@host/a.tar", "https://host/a.tar"),
        ("s3://b/a.tar::https://u:SECRET@host/b.tar", "s3://b/a.tar::https://host/b.tar"),
        ("http://[u:SEC/RET@host/a.tar", "http://host/a.tar"),
        ("http://[::1]:80/a@b.tar", "http://[::1]:80/a@b.tar"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/n/a.tar", "s3://arn:aws:s3:eu-west-1:1:accesspoint/n/a.tar"),
        ("/data/what? a=b.tar", "/data/what? a=b.tar"),
        ("abfs://web-1@account.dfs.core.windows.net/a.tar", "abfs://web-1@account.dfs.core.windows.net/a.tar"),
        ("az://u:SECRET@account.blob.core.windows.net/a.tar", "az://account.blob.core.windows.net/a.tar"),
        ("abfs://web@u:SECRET@account.dfs.core.windows.net/a.tar", "abfs://account.dfs.core.windows.net/a.tar"),
    ],
)
def test_a_url_is_shown_whole_but_for_its_secrets(url: str, shown: str) -> None:
    """Blanks and quotes may be in names: catches a search for the end of a URL that is known."""
    assert display_url(url) == shown
    assert display_url(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("404, message='x', url='https://u:SECRET@h/a.tar?sig=SECRET'", "404, message='x', url='https://h/a.tar?...'"),
        ("no https://h/it's a.tar?sig=SECRET, sorry", "no https://h/it's a.tar?..., sorry"),
        ("https://h/a.tar?rscd=attachment; filename=x&sig=SECRET sorry", "https://h/a.tar?... sorry"),
        ("(https://h/a?s=SECRET)\nand https://u:SECRET@h/b?s=SECRET", "(https://h/a?..."),
        ("of https://u:SE CRET@h/a.tar: no", "of https://h/a.tar: no"),
        ("of https://u:SEC/RET@h/a.tar#SECRET: no", "of https://h/a.tar no"),
        ("is this https://h/a b.tar, or not", "is this https://h/a b.tar, or not"),
        (
            "of abfs://web@account.dfs.core.windows.net/a.tar: no",
            "of abfs://web@account.dfs.core.windows.net/a.tar: no",
        ),
    ],
)
def test_no_secret_stays_in_a_text(text: str, shown: str) -> None:
    assert display_text(text) == shown


@pytest.mark.parametrize(
    "pattern",
    ["https://h/{a.tar?sig=SECRET", "https://h/{0..99999999}.tar?sig=SECRET", "pipe:curl https://h/a.tar?s=SECRET",
     "https://u:SECRET@h\u2100/a.tar", "/nowhere::https://h/a.tar?sig=SECRET", "https://h/*.tar?sig=SECRET"],
)  # fmt: skip
def test_a_pattern_that_is_refused_is_shown_without_secrets(pattern: str) -> None:
    with pytest.raises(DMAgentError) as error:
        expand_shards("d", pattern)
    messages = [line for line in traceback.format_exception(error.value) if "SECRET" in line]
    assert messages == []


@pytest.mark.parametrize(
    "shards",
    [None, 5, [None], [b"/x/a.tar"], "http://[x/a.tar", "s3://x/{0..99999999999}.tar", "/x/{0..9999}{0..9999}.tar"],
)
def test_what_cannot_be_a_list_of_shards_is_refused_at_once(shards: object) -> None:
    with pytest.raises(ConfigurationError, match="domain 'source/a'"):
        expand_shards("source/a", shards)  # type: ignore[arg-type]

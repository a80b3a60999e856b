"""Question files: what is read, and that every fault is named by file, line and column."""

from __future__ import annotations

import gzip
import json

import pytest

from dmagent_loader.environment import Environment
from dmagent_loader.errors import EnvironmentDataError

GOOD = json.dumps({"question": "q", "answer": "a", "id": 7}).encode()


def load(paths, **settings):
    return Environment.from_files({"x": paths}, lambda text: list(text.encode()), progress=False, **settings)


def test_plain_and_gzipped_files_are_read_in_order_and_blank_lines_skipped(tmp_path):
    plain, packed = tmp_path / "one.jsonl", tmp_path / "two.jsonl.gz"
    # A line separator inside a text is no end of line, though str.splitlines() would split there.
    rows = [{"question": f"q{i}\u2028", "answer": "naïve"} for i in range(4)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    plain.write_bytes(b"\n".join([lines[0], b"", lines[1], b""]))
    packed.write_bytes(gzip.compress(b"\r\n".join(lines[2:])))

    questions = load([str(plain), packed]).questions["x"]

    assert [q.question for q in questions] == [row["question"] for row in rows]
    assert questions[1].origin == f"line 3 of {plain}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "q"}', r"line 2 of .*faulty\.jsonl has no column 'answer' \(its columns: 'question'\)"),
        (b'{"prompt": "q", "answer": "a"}', r"line 2 of .*faulty\.jsonl has no column 'question'"),
        (b"{}", r"line 2 of .* has no column 'question' \(its columns: none\)"),
        (b'{"question": "q", "answer": 5}', r"column 'answer' in line 2 of .* is 5: it must be text"),
        (b'{"question": null, "answer": "a"}', r"column 'question' in line 2 of .* is None"),
        (b'{"question": "q", "answer": "\\ud800"}', r"column 'answer' in line 2 of .* surrogate"),
        (b'{"question": "q", ', r"line 2 of .* is not JSON"),
        (b"[" * 100_000, r"line 2 of .* is not JSON"),
        (b'["q", "a"]', r"line 2 of .* is \['q', 'a'\], not a JSON object"),
        (b'{"question": "\xff", "answer": "a"}', r"line 2 of .* is not UTF-8"),
        (b'{"question": "q", "answer": ""}', r"the answer in line 2 of .* has no tokens"),
        (b'{"question": "", "answer": "a"}', r"the question in line 2 of .* has no tokens.*prefix_token_id"),
    ],
)
def test_faulty_row_is_named_by_file_line_and_column(tmp_path, line, message):
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")

    with pytest.raises(EnvironmentDataError, match=message):
        load(path, separator="")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_file_without_questions_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)

    with pytest.raises(EnvironmentDataError, match=r"empty\.jsonl holds no questions"):
        load(path)


def test_missing_file_and_missing_list_are_refused(tmp_path):
    with pytest.raises(EnvironmentDataError, match=r"there is no question file .*absent\.jsonl"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(EnvironmentDataError, match="list of question files is empty"):
        load([])


@pytest.mark.parametrize("damage", ["cut", "not gzip", "flipped", "directory"])
def test_file_that_cannot_be_read_to_its_end_is_refused(tmp_path, damage):
    """Catches: keeping the rows before the damage, which would change the question set silently."""
    path = tmp_path / "damaged.jsonl.gz"
    packed = gzip.compress(b"\n".join([GOOD] * 500))
    if damage == "directory":
        path.mkdir()
    else:
        flipped = packed[:-12] + bytes([packed[-12] ^ 0xFF]) + packed[-11:]
        path.write_bytes({"cut": packed[:-9], "not gzip": GOOD, "flipped": flipped}[damage])

    with pytest.raises(EnvironmentDataError, match=r"damaged\.jsonl\.gz cannot be read"):
        load(path)


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", "b", "c"), 3])
def test_entry_that_is_no_pair_is_refused(pair):
    with pytest.raises(EnvironmentDataError, match=r"pair 1 of field 'x' is .*give \(question, answer\)"):
        Environment.from_pairs({"x": [("q", "a"), pair]}, lambda text: list(text.encode()))

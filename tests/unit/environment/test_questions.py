"""Question files: what is read, and that every fault is named by file, line and column."""

from __future__ import annotations

import gzip
import json

import pytest

from dmagent_loader.environment import Environment, EnvironmentSettings
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


def test_byte_order_mark_is_ignored(tmp_path):
    """Editors on Windows write one, and `dmagent shard` ignores it too."""
    path = tmp_path / "one.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD)
    assert [q.question for q in load(path).questions["x"]] == ["q", "q"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "q"}', r"line 2 of .*faulty\.jsonl has no column 'answer' \(its columns: 'question'\)"),
        (b'{"prompt": "q", "answer": "a"}', r"line 2 of .*faulty\.jsonl has no column 'question'"),
        (b"{}", r"line 2 of .* has no column 'question' \(its columns: none\)"),
        (b'{"question": "q", "answer": 5}', r"column 'answer' in line 2 of .* is 5: it must be text"),
        (b'{"question": null, "answer": "a"}', r"column 'question' in line 2 of .* is None"),
        (b'{"question": "q", "answer": "a", "n": ' + b"1" * 5000 + b"}", r"line 2 of .* is not JSON"),
        (b'{"question": "q", "answer": "\\ud800"}', r"column 'answer' in line 2 of .* surrogate"),
        (b'{"question": "q", ', r"line 2 of .* is not JSON"),
        (b"[" * 100_000, r"line 2 of .* is not JSON"),
        (b'{"question": "q", "answer": "a", "answer": "b"}', r"line 2 of .* \(the name 'answer' comes twice\)"),
        (b'["q", "a"]', r"line 2 of .* is \['q', 'a'\], not a JSON object"),
        (b'{"question": "\xff", "answer": "a"}', r"line 2 of .* is not UTF-8"),
        (b'{"question": "q", "answer": ""}', r"the answer in line 2 of .* is empty"),
        (b'{"question": "", "answer": "a"}', r"the question in line 2 of .* has no tokens.*prefix_token_id"),
    ],
)
def test_faulty_row_is_named_by_file_line_and_column(tmp_path, line, message):
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")

    with pytest.raises(EnvironmentDataError, match=message):
        load(path, separator="")


CHOICES = {"question": "2 + 2? A 3 B 4", "answer": "B", "stem": "2 + 2?", "choices": ["3", "4"], "answer_index": 1}


def asked(tmp_path, *rows, cloze):
    path = tmp_path / "choices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [(q.question, q.answer) for q in load(path, cloze=cloze).questions["x"]]


def test_cloze_asks_the_stem_and_the_right_choice_without_the_list(tmp_path):
    """Rows without choices, and files that mix both kinds, stay as they are."""
    plain = {"question": "why", "answer": "because"}
    assert asked(tmp_path, CHOICES, plain, cloze=True) == [("2 + 2?", "4"), ("why", "because")]
    assert asked(tmp_path, CHOICES, plain, cloze=False) == [("2 + 2? A 3 B 4", "B"), ("why", "because")]
    assert not EnvironmentSettings().cloze


def test_cloze_without_a_stem_asks_the_question(tmp_path):
    """HellaSwag's questions hold no list."""
    row = {key: value for key, value in CHOICES.items() if key != "stem"}
    assert asked(tmp_path, row, cloze=True) == [("2 + 2? A 3 B 4", "4")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_index": 2}, r"line 1 of .* has choices \['3', '4'\] and answer_index 2: .*counted from 0"),
        ({"answer_index": -1}, "answer_index -1"),
        ({"answer_index": None}, "answer_index None"),
        ({"answer_index": "1"}, "answer_index '1'"),
        ({"choices": "34"}, "has choices '34'"),
        ({"choices": [3, 4]}, r"column 'answer' in line 1 of .* is 4: it must be text"),
        ({"stem": 7}, r"column 'question' in line 1 of .* is 7"),
    ],
)
def test_faulty_choices_are_named(tmp_path, change, message):
    """Catches: an index from the end, which Python would take."""
    with pytest.raises(EnvironmentDataError, match=message):
        asked(tmp_path, {**CHOICES, **change}, cloze=True)


def test_cloze_changes_the_fingerprint(tmp_path):
    """Feedback of the two is not comparable."""
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps(CHOICES), encoding="utf-8")
    assert load(path, cloze=True).fingerprint != load(path, cloze=False).fingerprint


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

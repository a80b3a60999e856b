"""Decoders: the allow-list, and what must not pass it."""

from __future__ import annotations

import gzip
import io
import pickle
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dmagent_loader.errors import ConfigurationError, DecodeError
from dmagent_loader.shards import Decoder, RawSample, make_decoder
from dmagent_loader.shards.decode import MAX_NPY_HEADERS, decode_npy


def sample(**members: bytes) -> RawSample:
    return RawSample("key", {name.replace("__", "."): memoryview(bytearray(data)) for name, data in members.items()})


def npy(array: np.ndarray[Any, Any], **settings: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **settings)
    return stream.getvalue()


def test_each_allowed_extension() -> None:
    values = Decoder()(
        sample(
            txt="ü".encode(),
            seg__text=b"t",
            json=b'{"a": [1]}',
            jsonl=b'{"a": 1}\n\n{"b": "\xe2\x80\xa8"}\n',
            cls=b"5",
            id=b" 12\n",
            bin=b"\x00\xff",
            unknown=b"raw",
            npy=npy(np.arange(3)),
            a__b__json__gz=gzip.compress(b"[1, 2]"),
            safetensors=safetensors.numpy.save({"x": np.ones(2, np.float32)}),
        )
    )
    assert values["npy"].tolist() == [0, 1, 2]
    assert values["safetensors"]["x"].tolist() == [1, 1]
    assert {name: value for name, value in values.items() if name not in ("npy", "safetensors")} == {
        "txt": "ü",
        "seg.text": "t",
        "json": {"a": [1]},
        "jsonl": [{"a": 1}, {"b": "\u2028"}],
        "cls": 5,
        "id": 12,
        "bin": b"\x00\xff",
        "unknown": b"raw",
        "a.b.json.gz": [1, 2],
    }
    assert type(values["bin"]) is type(values["unknown"]) is bytes


class Exploit:
    """Sets a flag when it is unpickled."""

    exploded = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Exploit, "exploded", True))


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "pt", "x__pkl", "pkl__gz"])
def test_formats_that_execute_code_are_refused_and_nothing_runs(extension: str) -> None:
    data = pickle.dumps(Exploit())
    with pytest.raises(DecodeError, match=r"execute code.*decode=\{'p"):
        Decoder()(sample(**{extension: gzip.compress(data) if extension.endswith("gz") else data}))
    assert not Exploit.exploded


@pytest.mark.parametrize("extension", ["npy", "npz"])
def test_object_arrays_are_refused_and_nothing_runs(extension: str) -> None:
    stream = io.BytesIO()
    array = np.array([Exploit()], dtype=object)
    if extension == "npy":
        np.save(stream, array, allow_pickle=True)
    else:
        np.savez(stream, a=array)
    with pytest.raises(DecodeError):
        Decoder()(sample(**{extension: stream.getvalue()}))
    assert not Exploit.exploded


@pytest.mark.parametrize("extension", ["ten", "mp", "cbor"])
def test_formats_without_a_decoder_say_so(extension: str) -> None:
    with pytest.raises(DecodeError, match="no built-in decoder"):
        Decoder()(sample(**{extension: b"x"}))


def test_own_decoders_come_first_by_whole_extension_then_last_part() -> None:
    decode = make_decoder({"pkl": pickle.loads, "seg.txt": lambda data: "whole", "TXT": lambda data: data.upper()})
    values = decode(sample(pkl=pickle.dumps([1]), seg__txt=b"a", other__txt=b"b", cls=b"1"))
    assert values == {"pkl": [1], "seg.txt": "whole", "other.txt": b"B", "cls": 1}


def test_decode_settings() -> None:
    assert make_decoder(None)(sample(txt=b"x")) == {"txt": b"x"}
    assert make_decoder("default")(sample(txt=b"x")) == {"txt": "x"}
    assert make_decoder(lambda raw: {"key": raw.key})(sample(txt=b"x")) == {"key": "key"}
    for wrong in ("pil", 3):
        with pytest.raises(ConfigurationError, match="is no decoder"):
            make_decoder(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("txt", b"\xff\xfe"),
        ("json", b"{"),
        ("jsonl", b'{"a": 1}\n{'),
        ("cls", b"seven"),
        ("npy", b""),
        ("npy", b"not an array at all"),
        ("npy", npy(np.arange(5))[:-1]),
        ("npy", npy(np.arange(5)) + b"x"),
        ("npy", npy(np.arange(5))[:20]),
        ("npz", b"PK"),
        ("safetensors", b"\xff" * 100),
        ("txt__gz", gzip.compress(b"text" * 100, mtime=0)[:-12]),
    ],
)
def test_malformed_members_are_errors_that_name_sample_and_member(extension: str, data: bytes) -> None:
    with pytest.raises(DecodeError, match=rf"member '{extension.replace('__', '.')}' of sample 'key'"):
        Decoder()(sample(**{extension: data}))


def test_a_header_that_declares_a_terabyte_allocates_nothing() -> None:
    """Catches np.empty(shape) before the size of the data is looked at."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (137438953472,), }"
    data = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    with pytest.raises(DecodeError, match="1099511627776 bytes"):
        Decoder()(sample(npy=data + bytes(8)))


def test_gzip_files_one_after_the_other_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bgzip and ``cat a.gz b.gz`` write them; whoever stops at the end of the first loses the rest in silence."""
    parts = [gzip.compress(b"x" * 6_000), gzip.compress(b"y" * 4_000)]
    assert Decoder()(sample(txt__gz=b"".join(parts))) == {"txt.gz": "x" * 6_000 + "y" * 4_000}
    assert Decoder()(sample(txt__gz=parts[0] + bytes(99))) == {"txt.gz": "x" * 6_000}
    for tail in (parts[1][:-3], b"no gzip"):
        with pytest.raises(DecodeError, match=r"txt\.gz"):
            Decoder()(sample(txt__gz=parts[0] + tail))
    monkeypatch.setattr("dmagent_loader.shards.decode.MAX_UNPACKED_BYTES", 9_999)
    with pytest.raises(DecodeError, match="unpacks to more than 9999 bytes"):
        Decoder()(sample(txt__gz=b"".join(parts)))


def test_a_gzip_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmagent_loader.shards.decode.MAX_UNPACKED_BYTES", 10_000)
    assert Decoder()(sample(txt__gz=gzip.compress(b"x" * 10_000))) == {"txt.gz": "x" * 10_000}
    with pytest.raises(DecodeError, match="more than 10000"):
        Decoder()(sample(txt__gz=gzip.compress(b"x" * 10_001)))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(512, dtype=np.uint16),
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(3.5),
        np.zeros((0, 4)),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.arange(4, dtype=">i4"),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_npy_equals_numpy_and_is_writable(array: np.ndarray[Any, Any]) -> None:
    data = npy(array)
    for _ in range(2):
        decoded = decode_npy(bytearray(data))
        expected = np.load(io.BytesIO(data))
        assert decoded.dtype == expected.dtype
        assert np.array_equal(decoded, expected)
        assert decoded.flags.writeable


def test_npy_headers_do_not_pile_up() -> None:
    """Arrays of ever new shapes must not grow the table of known headers without end."""
    from dmagent_loader.shards import decode

    for length in range(MAX_NPY_HEADERS + 10):
        decode_npy(npy(np.zeros(length, np.uint8)))
    assert len(decode._npy_headers) <= MAX_NPY_HEADERS


def test_a_decoder_can_be_pickled() -> None:
    decode = pickle.loads(pickle.dumps(Decoder({"x": bytes.hex})))
    assert decode(sample(x=b"\x01", txt=b"t")) == {"x": "01", "txt": "t"}

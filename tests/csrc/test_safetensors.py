"""The reader of safetensors files, and files made to harm it."""

from __future__ import annotations

import gc
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mome_sdk import _core
from mome_sdk.errors import BundleError

TYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]


def stored(header: bytes | dict[str, object], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_files_of_the_safetensors_package_are_read_as_views(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t.{i}": rng.integers(0, 2, (i, 3, 2)).astype(t) for i, t in enumerate(TYPES)}
    tensors["scalar"] = np.array(3.5, np.float32)
    tensors['ünïcode \\ "\n'] = np.arange(5, dtype=np.float32)
    path = tmp_path / "ä.safetensors"
    save_file(tensors, path, {"what": "für\tTests 🧠", "empty": ""})
    found, metadata = _core.read_safetensors(path)
    assert metadata == {"what": "für\tTests 🧠", "empty": ""}
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert not found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="read-only"):
        found["scalar"][...] = 1


def test_views_outlive_the_mapping_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file({"a": np.arange(9999, dtype=np.float32)}, path)
    array = _core.read_safetensors(path)[0]["a"]
    path.unlink()
    gc.collect()
    assert array[-1] == 9998


def test_a_stored_member_of_a_zip_is_read_in_place(tmp_path: Path) -> None:
    save_file({"a": np.arange(7, dtype=np.float32)}, tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(tmp_path / "w", "weights.safetensors")
        member = archive.getinfo("weights.safetensors")
    offset = member.header_offset + 30 + len(member.filename)
    tensors, _ = _core.read_safetensors(tmp_path / "b.zip", offset=offset, size=member.file_size)
    np.testing.assert_array_equal(tensors["a"], np.arange(7))
    for wrong in ({"offset": -1}, {"offset": 10**9}, {"offset": 8, "size": 10**9}):
        with pytest.raises(BundleError, match=r"are wanted of .*, which has") as caught:
            _core.read_safetensors(tmp_path / "b.zip", **wrong)
        assert caught.value.code == "bundle.unreadable"


def test_a_file_may_hold_nothing_or_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(stored(b"{}   "))
    assert _core.read_safetensors(path) == ({}, {})
    path.write_bytes(stored({"a": tensor(0, 0, [0, 3]), "b": tensor(0, 4, [1])}, bytes(4)))
    tensors, _ = _core.read_safetensors(path)
    assert (tensors["a"].shape, tensors["b"].shape) == ((0, 3), (1,))


HOSTILE = {
    "empty file": (b"", "it has 0 bytes"),
    "half a length": (b"\x01\x00\x00", "it has 3 bytes"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "should have 100 bytes, 2"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "should have 18446744073709551615 bytes"),
    "header of no bytes": (stored(b""), "byte 0, .* '{'"),
    "array": (stored(b"[]"), "byte 0, .* '{'"),
    "cut header": (stored(b'{"a":{"dtype":"F32","sha'), "the end of a string"),
    "open object": (stored(b'{"a":{"dtype":"F32"'), "'}'"),
    "trailing comma": (stored(b'{"__metadata__":{},}'), "'\"'"),
    "something behind": (stored(b"{} {}"), "the end of the text"),
    "not UTF-8": (stored(b'{"__metadata__":{"a":"\xff"}}'), "UTF-8"),
    "overlong UTF-8": (stored(b'{"__metadata__":{"a":"\xc0\xaf"}}'), "UTF-8"),
    "cut UTF-8": (stored(b'{"__metadata__":{"a":"\xe2\x82"}}'), "UTF-8"),
    "surrogate in UTF-8": (stored(b'{"__metadata__":{"a":"\xed\xa0\x80"}}'), "UTF-8"),
    "control character": (stored(b'{"__metadata__":{"a":"\n"}}'), "control character"),
    "unknown escape": (stored(b'{"__metadata__":{"a":"\\x"}}'), "an escape sequence"),
    "escape at the end": (stored(b'{"__metadata__":{"a":"\\'), "an escape sequence"),
    "half a surrogate pair": (stored(b'{"__metadata__":{"a":"\\ud800!"}}'), "surrogate pair"),
    "second half alone": (stored(b'{"__metadata__":{"a":"\\udc00"}}'), "surrogate pair"),
    "pair with a letter": (stored(b'{"__metadata__":{"a":"\\ud800\\u0041"}}'), "surrogate pair"),
    "bad digits": (stored(b'{"__metadata__":{"a":"\\u00g0"}}'), "hexadecimal"),
    "cut digits": (stored(b'{"__metadata__":{"a":"\\u00'), "hexadecimal"),
    "number as metadata": (stored(b'{"__metadata__":{"a":1}}'), "'\"'"),
    "name twice": (
        stored(b'{"a":%(t)s,"a":%(t)s}' % {b"t": json.dumps(tensor(0, 4, [1])).encode()}, bytes(4)),
        "did not occur before",
    ),
    "field twice": (stored(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "did not occur before"),
    "metadata twice": (stored(b'{"__metadata__":{},"__metadata__":{}}'), "did not occur before"),
    "unknown field": (stored({"a": {**tensor(0, 4, [1]), "x": 1}}, bytes(4)), "unknown field 'x'"),
    "no shape": (stored({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "lacks"),
    "no type": (stored({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "lacks"),
    "no offsets": (stored({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "lacks"),
    "three offsets": (
        stored({"a": {**tensor(0, 4, [1]), "data_offsets": [0, 4, 4]}}, bytes(4)),
        "3 data offsets",
    ),
    "negative size": (stored({"a": tensor(0, 4, [-1])}, bytes(4)), "whole number"),
    "fraction": (stored(b'{"a":{"shape":[1.5]}}'), "']'"),
    "exponent": (stored(b'{"a":{"shape":[1e3]}}'), "']'"),
    "leading zero": (stored(b'{"a":{"shape":[01]}}'), "whole number"),
    "2^63": (stored(b'{"a":{"shape":[9223372036854775808]}}'), "whole number"),
    "no number": (stored(b'{"a":{"shape":[true]}}'), "whole number"),
    "sizes that overflow": (stored({"a": tensor(0, 4, [2**40, 2**40])}, bytes(4)), "overflows"),
    "sizes that overflow to zero": (stored({"a": tensor(0, 0, [2**62, 4])}), "overflows"),
    "too few bytes for the shape": (stored({"a": tensor(0, 4, [2])}, bytes(4)), "takes 8"),
    "too many bytes for the shape": (stored({"a": tensor(0, 8, [1])}, bytes(8)), "takes 4"),
    "end before begin": (stored({"a": tensor(4, 0, [1])}, bytes(4)), "bytes 4 to 0"),
    "beyond the file": (stored({"a": tensor(0, 8, [2])}, bytes(4)), "bytes 0 to 8"),
    "far beyond the file": (stored({"a": tensor(0, 2**62, [2**60])}, bytes(4)), "bytes 0 to"),
    "overlap": (
        stored({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
        "'b' has the bytes 4 to 12, where 8 were used",
    ),
    "same bytes twice": (
        stored({"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, bytes(8)),
        "bytes 0 to 8, where 8 were used",
    ),
    "gap": (
        stored({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)),
        "'b' has the bytes 8 to 12, where 4 were used",
    ),
    "unused bytes": (stored({"a": tensor(0, 4, [1])}, bytes(9)), "end at byte 4 of 9"),
    "deep nesting": (stored(b"{" * 1000), "'\"'"),
    "deep array": (stored(b'{"a":{"shape":' + b"[" * 10**6), "whole number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error(name: str, tmp_path: Path) -> None:
    content, text = HOSTILE[name]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=text) as caught:
        _core.read_safetensors(path)
    assert caught.value.code == "bundle.safetensors"
    assert str(path) in caught.value.message


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "f32", ""])
def test_a_type_that_nothing_computes_with_is_an_error(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(stored({"a": tensor(0, 4, [1], dtype)}, bytes(4)))
    with pytest.raises(BundleError, match=f"has the type '{dtype}'") as caught:
        _core.read_safetensors(path)
    assert caught.value.code == "bundle.dtype"


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_file({"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float16)}, path, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            _core.read_safetensors(path)


def test_every_flipped_byte_of_a_header_is_an_error_or_another_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_file({"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float16)}, path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for at in range(header):
        for bit in (0, 2, 5):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                tensors, _ = _core.read_safetensors(path)
            except BundleError:
                refused += 1
            else:
                assert sum(t.nbytes for t in tensors.values()) == len(whole) - header
    assert refused > 2 * header


def test_a_path_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path, text in [
        (tmp_path / "nothing", "cannot be opened: No such file"),
        (tmp_path, "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "No such file"),
    ]:
        with pytest.raises(BundleError, match=text) as caught:
            _core.read_safetensors(path)
        assert caught.value.code == "bundle.unreadable"


def test_a_large_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(stored({"a": tensor(0, 2**40, [2**38])}))
    os.truncate(path, path.stat().st_size + 2**40)
    tensors, _ = _core.read_safetensors(path)
    assert tensors["a"].shape == (2**38,)
    assert tensors["a"][-1] == 0

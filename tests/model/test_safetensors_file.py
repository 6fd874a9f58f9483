from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from coordinator.model.safetensors_file import MAX_HEADER, open_checkpoint, read_json, read_tensor
from protocol.errors import CrossdockError, ModelError


def write(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(prefix + text + data)
    return folder


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = open_checkpoint(tmp_path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        actual = read_tensor(found[name])
        assert actual.dtype == np.float32
        assert np.array_equal(actual, value.astype(np.float32))
        assert found[name].shape == value.shape


def test_bf16(tmp_path: Path) -> None:
    data = struct.pack("<3H", 0x3F80, 0xC040, 0x0001)
    write(tmp_path, {"t": entry("BF16", [3], [0, 6])}, data)
    assert read_tensor(open_checkpoint(tmp_path)["t"]).tolist() == [1.0, -3.0, 2.0**-133]


BAD = {
    "empty": (b"", b"", 0, "not JSON"),
    "header beyond the file": ({}, b"", 1 << 40, "truncated or damaged"),
    "header over the limit": ({}, b"", MAX_HEADER + 1, "truncated or damaged"),
    "no object": ([1], b"", None, "expected a JSON object, found list"),
    "deep nesting": (b"[" * 100_000, b"", None, "not JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", b"", None, "not JSON"),
    "entry no object": ({"t": 3}, b"", None, "expected dtype, shape and data_offsets"),
    "type": ({"t": entry("F8_E4M3")}, bytes(8), None, "'F8_E4M3': supported are F32, F16, BF16"),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "cannot be meant"),
    "negative shape": ({"t": entry(shape=[-1, -2])}, bytes(8), None, "cannot be meant"),
    "shape of bools": ({"t": entry(shape=[True, 2])}, bytes(8), None, "cannot be meant"),
    "huge shape": ({"t": entry(shape=[1 << 70])}, bytes(8), None, "cannot be meant"),
    "three offsets": ({"t": entry(offsets=[0, 8, 8])}, bytes(8), None, "cannot be meant"),
    "reversed offsets": ({"t": entry(offsets=[8, 0])}, bytes(8), None, "-8 bytes"),
    "size": ({"t": entry(shape=[3])}, bytes(8), None, "8 bytes for shape .* expected 12"),
    "beyond": ({"t": entry(offsets=[8, 16])}, bytes(8), None, "truncated"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), None, "tensor b begins .* inside a"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name: str, tmp_path: Path) -> None:
    header, data, length, pattern = BAD[name]
    with pytest.raises(ModelError, match=pattern):
        open_checkpoint(write(tmp_path, header, data, length))


def test_truncated_after_opening(tmp_path: Path) -> None:
    tensor = open_checkpoint(write(tmp_path, {"t": entry()}, bytes(8)))["t"]
    tensor.file.write_bytes(tensor.file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="7 of 8 bytes"):
        read_tensor(tensor)
    tensor.file.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        read_tensor(tensor)


def test_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    for weight_map, pattern in (
        ({}, "missing or empty"),
        ({"a": "../one.safetensors"}, "not the plain name"),
        ({"a": "/etc/passwd"}, "not the plain name"),
        ({"a": "two.safetensors"}, "two.safetensors: cannot be read"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor b is missing"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=pattern):
            open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_read_json(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json", optional=True) == {}
    with pytest.raises(ModelError, match="is missing"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_flipped_bytes(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    data = bytearray(save({"one": np.ones(3, np.float32), "two": np.ones((2, 2), np.float16)}))
    for place, value in flips:
        data[place % len(data)] = value
    (folder / "model.safetensors").write_bytes(bytes(data))
    try:
        for tensor in open_checkpoint(folder).values():
            read_tensor(tensor)
    except CrossdockError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message

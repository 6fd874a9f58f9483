from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U64,
    array,
    gguf,
    info,
    kv,
    kv_u32,
    string,
    valid,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import ModelFile, open_model, weight_bytes
from coordinator.model.gguf_header import read_header
from coordinator.model.params import read_params
from coordinator.model.tokens import Tokenizer
from protocol.dtypes import DType
from protocol.errors import CrossdockError, ModelError

HUGE = 1 << 62


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def test_valid_file(tmp_path: Path) -> None:
    data = valid()
    model = open_model(write(tmp_path, data))
    assert model.nbytes == len(data)
    assert model.alignment == 32
    assert model.metadata == {
        "general.architecture": "llama",
        "general.name": "Zwerg ☃",
        "llama.block_count": 1,
        "a.float": 0.5,
        "a.double": 0.1,
        "a.signed": -7,
        "a.flag": True,
        "an.array": [-1, 0, 1],
        "some.strings": ["a", ""],
        "no.strings": [],
    }
    assert model.metadata["a.flag"] is True
    assert list(model.weights) == ["first.weight", "second.weight"]  # file order
    first, second = model.weights.values()
    assert (first.dtype, first.ne, first.nbytes) == (DType.F32, (8, 4, 1, 1), 128)
    assert (second.dtype, second.ne, second.nbytes) == (DType.Q8_0, (32, 2, 1, 1), 68)
    assert second.offset == first.offset + 128 == len(data) - 68
    assert weight_bytes(model, "second.weight") == data[-68:]


def test_agrees_with_the_gguf_library(ref_model: ModelFile) -> None:
    reader = GGUFReader(ref_model.path)
    assert {tensor.name for tensor in reader.tensors} == set(ref_model.weights)
    for tensor in reader.tensors:
        ours = ref_model.weights[tensor.name]
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert int(ours.dtype) == int(tensor.tensor_type)
        assert list(ours.ne[: len(tensor.shape)]) == tensor.shape.tolist()
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert ref_model.metadata[name] == field.contents()
            assert field.types[0] in GGUFValueType


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    data = bytearray(valid())
    first = open_model(write(tmp_path, bytes(data))).fingerprint
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    assert open_model(write(copy, bytes(data))).fingerprint == first
    for place in (len(data) - 1, len(data) - 196, data.index(b"Zwerg")):
        changed = bytearray(data)
        changed[place] ^= 1
        assert open_model(write(tmp_path, bytes(changed))).fingerprint != first


def test_every_truncation_is_one_clear_line() -> None:
    data = valid()
    for length in range(len(data)):
        with pytest.raises(ModelError) as caught:
            read_header(data[:length], "model.gguf")
        assert re.fullmatch(r"model\.gguf: [^\n]+", str(caught.value)), length


def test_truncated_file_names_tensor_and_bytes(tmp_path: Path) -> None:
    data = valid()
    with pytest.raises(ModelError) as caught:
        open_model(write(tmp_path, data[:-1]))
    assert str(caught.value) == (
        f"model.gguf: tensor second.weight ends at byte {len(data):,} but the file has {len(data) - 1:,} (truncated?)"
    )


ARCH = kv("general.architecture", STRING, string("llama"))
DAMAGED = {
    "magic": (gguf(magic=b"GGML"), "not a GGUF file"),
    "version 1": (gguf(version=1), "GGUF version 1"),
    "version 4": (gguf(version=4), "GGUF version 4"),
    "big endian": (gguf(version=3 << 24), "big-endian"),
    "huge tensor count": (gguf(n_infos=HUGE), "announces .* tensors"),
    "huge key count": (gguf(n_kvs=HUGE), "announces .* metadata keys"),
    "one tensor too many": (gguf([ARCH], [info("a", [8])], n_infos=2), r"truncated|tensor 1"),
    "huge key length": (gguf([string("k", HUGE)]), "metadata key 0 of 1 ends at byte"),
    "long key": (gguf([kv("k" * 2000, U8, b"\0")]), "the limit is 1,024"),
    "huge string length": (gguf([kv("k", STRING, string("v", HUGE))]), "'k' ends at byte"),
    "key twice": (gguf([ARCH, ARCH]), "occurs twice"),
    "key not UTF-8": (gguf([kv(b"\xff\xfe", U8, b"\0")]), "not UTF-8"),
    "value not UTF-8": (gguf([kv("k", STRING, string(b"\xc3\x28"))]), "not UTF-8"),
    "unknown value type": (gguf([kv("k", 13, b"\0" * 8)]), "unknown value type 13"),
    "unknown element type": (gguf([kv("k", ARRAY, array(99, 1, b"\0" * 8))]), "unknown value type 99"),
    "nested array": (gguf([kv("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]), "array of arrays"),
    "huge array": (gguf([kv("k", ARRAY, array(U64, HUGE, b""))]), "'k' ends at byte"),
    "huge string array": (gguf([kv("k", ARRAY, array(STRING, 1 << 60, b""))]), "'k' ends at byte"),
    "bool of 2": (gguf([kv("k", BOOL, b"\2")]), "bool of value 2"),
    "alignment 0": (gguf([kv_u32("general.alignment", 0)]), "general.alignment is 0"),
    "alignment 33": (gguf([kv_u32("general.alignment", 33)]), "general.alignment is 33"),
    "alignment huge": (gguf([kv_u32("general.alignment", 1 << 31)]), "general.alignment"),
    "alignment float": (gguf([kv("general.alignment", F32, struct.pack("<f", 32))]), "general.alignment is 32.0"),
    "split": (gguf([kv_u32("split.count", 3)]), "one of 3 parts"),
    "rank 5": (gguf([], [info("a", [1, 1, 1, 1, 1])]), "5 dimensions"),
    "huge rank": (gguf([], [info("a", [1], n_dims=0xFFFFFFFF)]), "dimensions"),
    "extent 0": (gguf([], [info("a", [8, 0])]), "extents"),
    "extents overflow": (gguf([], [info("a", [1 << 40, 1 << 40])]), "extents"),
    "extents wrap to 0": (gguf([], [info("a", [1 << 32, 1 << 32])]), "extents"),
    "partial block": (gguf([], [info("a", [33], 8)]), "multiple of 32"),
    "partial K block": (gguf([], [info("a", [128], 14)]), "multiple of 256"),
    "unsupported type": (gguf([], [info("a", [256], 16)]), r"type 16 \(IQ2_XXS\)"),
    "integer weight": (gguf([], [info("a", [8], 26)]), r"type 26 \(I32\)"),
    "read-only Q8_1": (gguf([], [info("a", [32], 9)]), r"type 9 \(Q8_1\)"),
    "unknown type": (gguf([], [info("a", [256], 1000)]), r"type 1000 \(unknown\)"),
    "removed type": (gguf([], [info("a", [32], 4)]), r"type 4 \(unknown\)"),
    "misaligned": (gguf([], [info("a", [8], 0, 16)]), "not a multiple of 32"),
    "offset beyond": (gguf([], [info("a", [8], 0, 1 << 40)]), "truncated"),
    "offset wraps": (gguf([], [info("a", [8], 0, (1 << 64) - 32)]), "truncated"),
    "overlap": (gguf([], [info("a", [64]), info("b", [64], 0, 32)]), "inside tensor a"),
    "same place": (gguf([], [info("a", [8]), info("b", [8])]), "inside tensor a"),
    "name twice": (gguf([], [info("a", [8]), info("a", [8], 0, 32)]), "occurs twice"),
    "empty name": (gguf([], [info("", [8])]), "printable"),
    "control characters": (gguf([], [info("a\n\x1b[2J", [8])]), "printable"),
    "long name": (gguf([], [info("n" * 64, [8])]), "the limit is 63"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path: Path, name: str) -> None:
    data, pattern = DAMAGED[name]
    with pytest.raises(ModelError, match=pattern) as caught:
        open_model(write(tmp_path, data))
    line = str(caught.value)
    assert line.startswith("model.gguf: ")
    assert line.isprintable()
    assert len(line) < 400


def test_array_limit_counts_all_arrays() -> None:
    big = kv("k", ARRAY, array(U8, 5_000_000, bytes(5_000_000)))
    assert len(read_header(gguf([big]), "f").metadata["k"]) == 5_000_000  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="more than 8,000,000"):
        read_header(gguf([big, big.replace(b"k", b"j", 1)]), "f")


def test_missing_folder_and_odd_files(tmp_path: Path) -> None:
    for path, pattern in (
        (tmp_path / "none.gguf", "No such file"),
        (tmp_path, "Is a directory"),
        (write(tmp_path, b""), "0 bytes are too few"),
    ):
        with pytest.raises(ModelError, match=pattern):
            open_model(path)


def test_weight_bytes_of_a_changed_file(tmp_path: Path) -> None:
    model = open_model(write(tmp_path, valid()))
    with pytest.raises(ModelError, match="tensor no is missing"):
        weight_bytes(model, "no")
    model.path.write_bytes(valid()[:-10])
    with pytest.raises(ModelError, match="58 of 68 bytes"):
        weight_bytes(model, "second.weight")
    model.path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        weight_bytes(model, "second.weight")


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(0, 255)), min_size=1, max_size=6)


@given(FLIPS)
@settings(max_examples=200, deadline=None)
def test_flipped_bytes_of_a_small_file(flips: list[tuple[int, int]]) -> None:
    data = bytearray(valid())
    for place, value in flips:
        data[place % len(data)] = value
    try:
        header = read_header(bytes(data), "f")
    except CrossdockError:
        return
    for weight in header.weights.values():
        assert 0 < weight.offset <= weight.offset + weight.nbytes <= len(data)


@given(FLIPS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_flipped_bytes_of_a_model(ref_model: ModelFile, tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """Whatever a header says, opening and setting up the model ends well or with one of our errors."""
    data = bytearray(ref_model.path.read_bytes())
    header = min(weight.offset for weight in ref_model.weights.values())
    for place, value in flips:
        data[place % header] = value
    try:
        model = open_model(write(tmp_path, bytes(data)))
        read_params(model)
        tokenizer = Tokenizer.from_metadata(model.metadata)
        prompt = ChatTemplate.from_metadata(model.metadata, tokenizer).render([Message("user", "Hi", 1)])
        tokenizer.decode(tokenizer.encode(prompt.text, parse_special=True))
    except CrossdockError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line

"""ggml's tensor types: ids, block sizes and row sizes."""

from __future__ import annotations

from enum import IntEnum

from protocol.errors import ModelError


class DType(IntEnum):
    """A tensor's element type. The values are ggml's `enum ggml_type`, as they stand in GGUF files."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    BF16 = 30

    @property
    def block(self) -> int:
        """Elements per block: 1 for plain types, 32 or 256 for quantised ones."""
        return _BLOCKS[self][0]

    @property
    def block_nbytes(self) -> int:
        """Bytes per block."""
        return _BLOCKS[self][1]

    @property
    def quantised(self) -> bool:
        """True when several elements share a block."""
        return self.block > 1

    @property
    def label(self) -> str:
        """ggml's name: `f32`, `q4_0`, `q4_K`."""
        return self.name.replace("Q", "q") if self.quantised else self.name.lower()

    def row_nbytes(self, n: int) -> int:
        """Bytes of `n` elements in a row; `n` must be a multiple of the block (checked by the caller's reader)."""
        block, nbytes = _BLOCKS[self]
        assert n % block == 0, (self, n)
        return n // block * nbytes


_BLOCKS: dict[DType, tuple[int, int]] = {
    DType.F32: (1, 4), DType.F16: (1, 2), DType.BF16: (1, 2), DType.F64: (1, 8),
    DType.I8: (1, 1), DType.I16: (1, 2), DType.I32: (1, 4), DType.I64: (1, 8),
    DType.Q4_0: (32, 18), DType.Q4_1: (32, 20), DType.Q5_0: (32, 22), DType.Q5_1: (32, 24),
    DType.Q8_0: (32, 34), DType.Q8_1: (32, 36),
    DType.Q2_K: (256, 84), DType.Q3_K: (256, 110), DType.Q4_K: (256, 144), DType.Q5_K: (256, 176),
    DType.Q6_K: (256, 210), DType.Q8_K: (256, 292),
}  # fmt: skip

_BY_LABEL = {dtype.label.lower(): dtype for dtype in DType}


def dtype_of(label: str) -> DType:
    """The type of ggml's name, in any case (`"q8_0"`, `"Q4_K"`).

    Raises ModelError for a name that is none of ours.
    """
    try:
        return _BY_LABEL[label.lower()]
    except KeyError:
        raise ModelError(f"unknown tensor type {label!r}: expected one of {', '.join(_BY_LABEL)}") from None

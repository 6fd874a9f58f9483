"""Are these the same bytes? A digest of a model file's header and of both ends of each tensor."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import ProtocolError

EDGE_NBYTES = 4096
"""Bytes of each end of a tensor that enter the digest."""

Ranges = npt.NDArray[np.int64]


def ranges_of(header_nbytes: int, tensors: list[tuple[int, int]]) -> Ranges:
    """[n, 2] first and behind-last bytes to hash, from the header's size and (offset, nbytes) of each tensor."""
    rows = [(0, header_nbytes)]
    for offset, nbytes in tensors:
        end = offset + nbytes
        rows += [(offset, min(offset + EDGE_NBYTES, end)), (max(offset, end - EDGE_NBYTES), end)]
    return np.array(rows, np.int64)


def digest(data: Any, ranges: Ranges) -> str:
    """BLAKE2b (16 bytes, hex) of the size of `data` (a buffer of bytes) and of its `ranges`.

    Raises ProtocolError for a range outside.
    """
    state = hashlib.blake2b(len(data).to_bytes(8, "little"), digest_size=16)
    for start, end in ranges.tolist():
        if not 0 <= start <= end <= len(data):
            raise ProtocolError(f"digest: bytes [{start}, {end}) of a file of {len(data)}")
        state.update(data[start:end])
    return state.hexdigest()

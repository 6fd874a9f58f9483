"""The executor's table: one row of 64-bit words per kernel call, the same for every kernel.

A kernel is a numba `cfunc` of signature `void(int64 row, int64 ith, int64 nth)`: `row` is the address of its row,
`ith` of `nth` threads is calling. It reads operands from the row, writes its share of the result and returns; it
never allocates, waits or raises. Which share a thread takes must not change a single bit of the result.
"""

from __future__ import annotations

KERNEL = 0  # address of the kernel
FLAGS = 1  # BARRIER, ALONE, REPEAT; above them, from bit EARLIER on, the row that a REPEAT repeats
WORK = 2  # address of scratch memory shared by the threads, 64-byte aligned
WORK_NBYTES = 3
AUX = 4  # four words for the stage's own use
PARAMS = 8  # op_params: sixteen 32-bit words in eight
DST = 16  # operands, OPERAND words each
SRC = (26, 36, 46, 56, 66, 76)
WORDS = 88
NBYTES = WORDS * 8

ADDRESS, DTYPE, NE, NB, OPERAND = 0, 1, 2, 6, 10
"""Within an operand: address (0: absent), dtype, ne[4] in elements, nb[4] in bytes."""

BARRIER = 1
"""In FLAGS: all threads have to be through with this row before the next one starts."""
ALONE = 2
"""In FLAGS: too small to be shared; the first thread runs it."""
REPEAT = 4
"""In FLAGS: nothing to do where the row that it repeats was run in the same job; else run it, between two barriers."""
EARLIER = 8

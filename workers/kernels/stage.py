"""What an op becomes for the executor: stages, one table row each, and the kernels they call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.dtypes import DType
from workers.kernels.features import configure_cache

configure_cache()

from numba import cfunc, types  # noqa: E402  (where numba caches is settled above)

Dims = tuple[int, int, int, int]

SIGNATURE = types.void(types.int64, types.int64, types.int64)
"""Of every kernel: address of its row (kernels/row.py), index of the calling thread, number of threads."""

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
"""For `njit` of functions that kernels call: numpy's error model, since a kernel can raise nothing."""


class Operand(NamedTuple):
    """A tensor as a kernel sees it: extents in elements, strides in bytes, innermost first."""

    dtype: DType
    ne: Dims
    nb: Dims


class Kernel:
    """A function that becomes machine code, or is loaded from numba's cache, when its address is first asked for."""

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self.name = function.__name__
        self._function = function
        self._compiled: object = None

    def address(self) -> int:
        """Address of the native code, valid as long as the process lives."""
        if self._compiled is None:
            self._compiled = cfunc(SIGNATURE, cache=True, error_model="numpy")(self._function)
        return int(self._compiled.address)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


KERNELS: list[Kernel] = []
"""Every kernel of the modules imported so far: what there is to compile ahead of time."""


def kernel(function: Callable[[int, int, int], None]) -> Kernel:
    """Decorate `f(row, ith, nth)`: a kernel that compiles on first use.

    Define the function at a module's top level. numba finds it in its cache by name, line and closure, and a closure
    over intrinsics differs in every process: what varies between kernels is better a constant argument of an inlined
    function (see matquants.py).
    """
    made = Kernel(function)
    KERNELS.append(made)
    return made


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the executor's table: a kernel that all threads call once.

    `work_nbytes` is the scratch memory the op needs for the number of threads it was asked for; all stages of an op
    get the same scratch. With `barrier` every thread has to be through before the next row starts. `aux` are up to
    four words for row word AUX.
    """

    kernel: Kernel
    work_nbytes: int = 0
    barrier: bool = True
    aux: tuple[int, ...] = field(default=())

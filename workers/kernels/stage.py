"""What an op becomes for the executor: stages, one table row each, and the kernels they call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from protocol.dtypes import DType
from workers.kernels import image
from workers.kernels.jit import cfunc, types

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
    """A function that becomes machine code when its address is first asked for: from the image, numba or its cache."""

    signature = SIGNATURE

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.key = f"{function.__module__}.{function.__name__}"
        self._function = function
        self._compiled: Any = None

    def address(self) -> int:
        """Address of the native code, valid as long as the process lives."""
        return image.address(self.key) or int(self.compiled().address)

    def compiled(self) -> Any:
        """numba's compiled function. An image has none."""
        assert not image.loaded(), f"{self.key}: the image has no such kernel"
        if self._compiled is None:
            self._compiled = cfunc(self.signature, cache=True, error_model="numpy")(self._function)
        return self._compiled

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


class Entry(Kernel):
    """A compiled function that Python calls with 64-bit integers, without holding the GIL; it returns such a one."""

    def __init__(self, function: Callable[..., int], count: int) -> None:
        super().__init__(function)
        self.signature = types.int64(*[types.int64] * count)
        self._prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)
        self._bound: Callable[..., int] | None = None

    def __call__(self, *arguments: int) -> int:
        """Call it; compiled, or loaded, if that has not happened yet."""
        if self._bound is None:
            self._bound = self._prototype(self.address())
        return self._bound(*arguments)


KERNELS: list[Kernel] = []
"""Every kernel and entry of the modules imported so far: what there is to compile ahead of time."""


def kernel(function: Callable[[int, int, int], None]) -> Kernel:
    """Decorate `f(row, ith, nth)`: a kernel that compiles on first use.

    Define the function at a module's top level. numba finds it in its cache by name, line and closure, and a closure
    over intrinsics differs in every process: what varies between kernels is better a constant argument of an inlined
    function (see matquants.py).
    """
    made = Kernel(function)
    KERNELS.append(made)
    return made


def entry(count: int) -> Callable[[Callable[..., int]], Entry]:
    """Decorate `f(*integers) -> integer` with `count` arguments: a function for Python, under the rules of `kernel`."""

    def decorate(function: Callable[..., int]) -> Entry:
        made = Entry(function, count)
        KERNELS.append(made)
        return made

    return decorate


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the executor's table: a kernel that all threads call once.

    `work_nbytes` is the scratch memory the op needs for the number of threads it was asked for; all stages of an op
    get the same scratch, of which the first `makes` bytes are written for the op's other stages, or the first `takes`
    bytes read that they have written; the rest is shared out to the threads. `aux` are up to four words for row word
    AUX.
    """

    kernel: Kernel
    work_nbytes: int = 0
    aux: tuple[int, ...] = field(default=())
    makes: int = 0
    takes: int = 0

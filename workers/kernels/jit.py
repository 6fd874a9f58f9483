"""What makes machine code of the kernels' modules: numba and LLVM, or stand-ins once an image has been loaded.

With an image nothing is compiled, and a second's worth of imports is saved. Modules of kernels take numba's names from
here alone; all that they decorate and emit with the stand-ins is another stand-in, which nobody may use.
"""

from __future__ import annotations

from typing import Any

from workers.kernels import image


class _Nothing:
    """Takes the place of anything: may be called, asked for attributes and derived from, and stays what it is."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _compiler() -> tuple[Any, Any, Any, Any]:
    """numba, its extensions' decorators, its helpers for code generation, and LLVM's intermediate representation."""
    if image.loaded():
        nothing = _Nothing()
        return nothing, nothing, nothing, nothing
    from workers.kernels.features import configure_cache

    configure_cache()

    import numba
    from llvmlite import ir
    from numba import extending
    from numba.core import cgutils

    return numba, extending, cgutils, ir


_numba, _extending, cgutils, ir = _compiler()
cfunc, njit, types = _numba.cfunc, _numba.njit, _numba.types
float32, float64, int16, int64 = _numba.float32, _numba.float64, _numba.int16, _numba.int64
intrinsic, models, register_model = _extending.intrinsic, _extending.models, _extending.register_model

"""Which ops have kernels with ggml's bits, and whether this machine can run them."""

from __future__ import annotations

from protocol.errors import CapacityError
from protocol.ops import Op
from workers.kernels import features
from workers.kernels.ggml import activation, attention, matmul, norm, rope, softmax

FAMILIES = {
    Op.MUL_MAT: matmul.stages,
    Op.RMS_NORM: norm.stages,
    Op.ROPE: rope.stages,
    Op.FLASH_ATTN_EXT: attention.stages,
    Op.SOFT_MAX: softmax.stages,
    Op.GLU: activation.stages,
    Op.UNARY: activation.stages,
}
"""Op -> the family that may have kernels for it. It is asked about operands that the default kernels take."""


def check_machine() -> None:
    """Raises CapacityError where the order in which ggml adds up is not this one."""
    missing = [name.upper() for name in features.KNOWN if name not in features.HAVE]
    if missing:
        raise CapacityError(f"--arithmetic ggml: expected a CPU with AVX2, FMA and F16C: {', '.join(missing)} missing")

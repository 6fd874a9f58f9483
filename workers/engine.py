"""The engine of workers that compute: kernels over the worker's arenas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.board import Board
from protocol.features import has
from protocol.messages import ProgramMessage
from protocol.program import Instruction, OperandRef, OpRecord
from workers.arena import Arenas
from workers.execute import Executor, ResolvedOp, Table, build_table
from workers.kernels.stage import Operand
from workers.kernels.table import EXACT
from workers.peers import Plane, SharedPlane
from workers.script import Script, Walker, script_of
from workers.shadow import Expectations


class KernelEngine:
    """Numba kernels on a team of threads; the same bytes for every number of threads."""

    def __init__(self, threads: int, arithmetic: str = EXACT) -> None:
        self.executor, self.arithmetic = Executor(threads), arithmetic

    def build(self, ops: Sequence[OpRecord], arenas: Arenas, *, overlaps: bool = False) -> Table:
        """The executor's table. Raises CapacityError where no kernel fits, or the CPU lacks the arithmetic."""
        resolved = [_resolve(op, arenas) for op in ops]
        return build_table(resolved, self.executor.threads, self.arithmetic, overlaps=overlaps)

    def run(self, built: Table, first: int, last: int) -> None:
        """Compute operations [first, last)."""
        self.executor.run(built, built.starts[first], built.starts[last])

    def script(
        self,
        message: ProgramMessage,
        instructions: Sequence[Instruction],
        arenas: Arenas,
        plane: Plane,
        built: Table,
        checks: Expectations | None,
        times: NDArray[np.int64] | None,
    ) -> Script | None:
        """The program as compiled code walks it; None with TAPs, or where peers are not heard of through doorbells."""
        if not isinstance(plane, SharedPlane) or not has("futex"):
            return None
        return script_of(message, instructions, arenas, plane, built, checks, times)

    def walker(self, board: Board, index: int) -> Walker:
        """Runs scripts for worker `index`."""
        return Walker(board, index, self.executor)

    def close(self) -> None:
        """End the threads."""
        self.executor.close()


def _resolve(op: OpRecord, arenas: Arenas) -> ResolvedOp:
    def bound(ref: OperandRef) -> tuple[int, Operand]:
        return arenas.address(ref.arena) + ref.offset, Operand(ref.dtype, ref.ne, ref.nb)

    return ResolvedOp(op.op, op.params, bound(op.dst), tuple(None if s is None else bound(s) for s in op.src))

"""What workers owe: answers to requests, each of the kind that its request asks for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from coordinator.runtime.control import Letter
from protocol import messages as m
from protocol.errors import CrossdockError, ProtocolError
from protocol.wire import Envelope


class Violation(CrossdockError):  # noqa: N818  (what strict ownership looks for)
    """A worker has met bytes that are not what the program expects (strict ownership)."""

    def __init__(self, worker: int, report: m.Violated) -> None:
        super().__init__(f"strict ownership has ended the run in step {report.step}")
        self.worker, self.report = worker, report


class Awaited:
    """The kinds of answers that are still to come from each worker, in order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._kinds: list[deque[type]] = [deque() for _ in names]

    def expect(self, worker: int, kind: type | None) -> None:
        """A request was sent that asks for this kind of answer, None: for none."""
        if kind is not None:
            self._kinds[worker].append(kind)

    def take(self, worker: int, letter: Letter) -> Envelope:
        """The answer. Raises what it says when it is `Failed`, Violation when it says so, ProtocolError when it is not
        the next one."""
        try:
            envelope = letter()
        except ProtocolError as error:
            raise ProtocolError(f"{self.names[worker]}: {error}") from None
        kinds = self._kinds[worker]
        expected = kinds.popleft() if kinds else None
        if type(envelope.message) is expected:
            return envelope
        if isinstance(envelope.message, m.Failed):
            raise envelope.message.error()
        if isinstance(envelope.message, m.Violated) and expected is m.Done:
            raise Violation(worker, envelope.message)
        wanted = expected.__name__ if expected else "nothing"
        raise ProtocolError(f"{self.names[worker]}: expected {wanted}, got {type(envelope.message).__name__}")

"""Another process at the other end of a mailbox; a module of its own, so that it has little to import."""

from __future__ import annotations

import time

from protocol import messages as m
from protocol.mailbox import Mailbox


def echo(path: str) -> None:
    """Answer every step until told to end."""
    box = Mailbox.attach(path, 1)
    assert box is not None
    while True:
        while not box.reader.wait(1.0):
            pass
        envelope = box.reader.take()
        if isinstance(envelope.message, m.Shutdown):
            return
        step = envelope.message.step
        if step % 50 == 0:
            time.sleep(0.002)  # so that the other side falls asleep
        box.writer.post(m.Done(0, step, 0, 0, 0, 0, 0, ()), envelope.buffers)

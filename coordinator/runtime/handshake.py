"""What a worker has to say first."""

from __future__ import annotations

from protocol.errors import ProtocolError
from protocol.messages import Hello
from protocol.version import MAJOR, MINOR


def check_hello(message: object, name: str) -> Hello:
    """The first message of the worker called `name`. Raises ProtocolError when it is none, or of another protocol."""
    if not isinstance(message, Hello):
        raise ProtocolError(f"expected a hello, got {type(message).__name__}")
    if (message.major, message.minor) != (MAJOR, MINOR):
        raise ProtocolError(f"speaks protocol {message.major}.{message.minor}: expected {MAJOR}.{MINOR}")
    if message.name != name:
        raise ProtocolError(f"calls itself {message.name[:40]!r}")
    return message

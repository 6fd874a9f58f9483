"""The protocol's version: peers of another major version refuse each other."""

from __future__ import annotations

MAJOR = 1
MINOR = 0
MAGIC = b"XDOK"

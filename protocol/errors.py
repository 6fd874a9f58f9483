"""Errors that are told to people: one line, a stable code, and the exit status of the program."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of `crossdock`, documented in README.md."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    MODEL = 3
    INPUT = 4
    CAPACITY = 5
    WORKER = 6
    PROTOCOL = 7
    FOUND = 8
    INTERRUPTED = 130


class CrossdockError(Exception):
    """Root of every error that the world (not our own fault) can cause.

    `str(error)` is one line that says what, where, expected and actual. `exit` is the program's exit status and
    `code` a stable name that travels over the wire.
    """

    exit: Exit = Exit.INTERNAL
    code: str = "internal"


class UsageError(CrossdockError):
    """A command line or configuration file that cannot be meant."""

    exit = Exit.USAGE
    code = "usage"


class ModelError(CrossdockError):
    """A model file that is missing, damaged or of a kind that is not supported."""

    exit = Exit.MODEL
    code = "model"


class InputError(CrossdockError):
    """An image, prompt or document that cannot be used."""

    exit = Exit.INPUT
    code = "input"


class CapacityError(CrossdockError):
    """Something does not fit: a device's memory, the context, a limit."""

    exit = Exit.CAPACITY
    code = "capacity"


class WorkerError(CrossdockError):
    """A worker process could not be started, died or stopped answering."""

    exit = Exit.WORKER
    code = "worker"


class ProtocolError(CrossdockError):
    """A message that breaks the protocol: wrong version, type, size or order."""

    exit = Exit.PROTOCOL
    code = "protocol"


class PlanError(CrossdockError):
    """A graph that cannot be planned on the given devices."""

    exit = Exit.INPUT
    code = "plan"


BY_CODE: dict[str, type[CrossdockError]] = {
    kind.code: kind
    for kind in (
        CrossdockError, UsageError, ModelError, InputError, CapacityError, WorkerError, ProtocolError, PlanError,
    )
}  # fmt: skip
"""From the code on the wire back to the class."""

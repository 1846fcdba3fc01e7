"""Errors that end a command with a message for its user, which Hydra prints without a traceback."""

from hydra.errors import CompactHydraException


class UsageError(CompactHydraException):
    """An error that the user can correct. A sweep continues with its next job."""


class WrongEnvironment(CompactHydraException, ValueError):
    """The environment describes processes that nobody has started."""


class DirectoryInUse(CompactHydraException):
    """Another run writes into the directory."""


class WorkerFailed(CompactHydraException):
    """A worker raised or died; the message holds its traceback."""

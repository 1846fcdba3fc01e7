"""What a command ends with that its user can understand: Hydra prints the message alone, without a traceback."""

from hydra.errors import CompactHydraException


class UsageError(CompactHydraException):
    """Something that the user can put right. A sweep goes on with its next job."""


class WrongEnvironment(CompactHydraException, ValueError):
    """The environment describes processes that nobody has started."""


class DirectoryInUse(CompactHydraException):
    """Another run writes into the directory."""


class WorkerFailed(CompactHydraException):
    """A worker raised or died; the message holds its traceback."""

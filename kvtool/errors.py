"""Everything that can go wrong for a user, each kind with the exit code that shell scripts see."""


class KvtoolError(Exception):
    """An error meant for the user: one sentence saying what, where and why.

    Args:
        message: What happened, to which file, layer or option, and why.
        hint: What the user can do about it, if anything is known to help.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(KvtoolError):
    """A checkpoint is damaged, incomplete, or not what its index says."""


class CalibrationError(KvtoolError):
    """Calibration met numbers that it cannot use, such as NaN in a layer."""


class UsageError(KvtoolError):
    """The request itself is wrong: an unknown path, an impossible rank, an existing output."""

    exit_code = 2


class RecipeError(KvtoolError):
    """A recipe does not follow its schema."""

    exit_code = 3


class PlanError(KvtoolError):
    """A plan is damaged, contradicts itself, or cannot be used as asked."""

    exit_code = 3


class UnsupportedModelError(KvtoolError):
    """The model, or what the target engine can express of it, is outside what kvtool supports."""

    exit_code = 4


class ResourceError(KvtoolError):
    """Not enough memory or disk, found out before the work started."""

    exit_code = 5


class GateError(KvtoolError):
    """A measured quality is worse than the user allowed."""

    exit_code = 6

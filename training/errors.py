"""The errors that training raises on wrong input."""


class TrainingError(Exception):
    """Base of every error of this package; the message names the value, the limit and the fix."""


class TrainingConfigError(TrainingError, ValueError):
    """A setting is outside its range, or two settings contradict each other."""


class TrainingDataError(TrainingError, OSError):
    """The photographs cannot be found or read, or are too small."""


class CheckpointError(TrainingError, OSError):
    """A checkpoint is missing, or belongs to a run with other settings."""


def require(condition: bool, message: str) -> None:
    """Raise `TrainingConfigError(message)` unless `condition` holds."""
    if not condition:
        raise TrainingConfigError(message)

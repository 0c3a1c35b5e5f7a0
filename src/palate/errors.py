"""What can go wrong by a user's doing. Surprises are not caught: they crash with their own traceback.

Every message says where, what was found, what was expected, and what to do.
"""


class PalateError(Exception):
    """An error that the person at the keyboard can repair; printed without a traceback."""


class ConfigError(PalateError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(PalateError, ValueError):
    """A record is missing, malformed, or cannot be trained on. The message begins with ``file:line``."""


class ModelError(PalateError, RuntimeError):
    """A model folder, tokenizer or chat template cannot play the role it was given, or became NaN."""


class FeedbackError(PalateError, ValueError):
    """A judgement, ranking or annotator's record contradicts itself or its task."""


class RunError(PalateError, OSError):
    """A run's folder cannot be written, resumed, or belongs to another run."""

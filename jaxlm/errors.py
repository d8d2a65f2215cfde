"""Errors a person can act on, and the exit code that each gives a program."""


class UserError(ValueError):
    """Base: the message says what was given, where, the rule and what to type. Programs print no traceback."""

    exit_code = 1


class ConfigError(UserError):
    """Bad usage or config: everything that is wrong, in one message."""

    exit_code = 2


class DataError(UserError):
    """Missing, broken or unsuitable data."""

    exit_code = 3


class CheckpointError(UserError):
    """No checkpoint, a broken one, or one that does not fit the config."""

    exit_code = 4


class NumericsError(UserError):
    """The loss or the gradients stayed non-finite."""

    exit_code = 5

"""Errors of the user's making: the command line prints them as one line, without a traceback."""


class UserError(Exception):
    """Something the user gave, or the user's disk, does not allow to go on."""


class SharedError(UserError):
    """One that all processes of a run raise alike: the first one reports it."""

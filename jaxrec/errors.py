"""The one exception that the user of a command is meant to read."""


class UserError(Exception):
    """Bad input, told in one line: what was given, what is wanted, what to do.

    The command prints the message without a traceback and exits with code 2; in Python it is
    an ordinary exception.
    """

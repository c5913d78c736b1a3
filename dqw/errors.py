"""The one exception a user's mistake raises."""


class UserError(Exception):
    """A mistake in what the user gave: the message is one sentence with the place and the cure.

    The command line prints it as `Error: …` and exits with 1; no traceback is shown.
    """

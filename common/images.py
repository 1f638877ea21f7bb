"""Pictures and videos in and out, and the error for what a user can cause."""


class UserError(ValueError):
    """Wrong usage or bad input: the message names the file or flag, says what was wrong and what to type.

    Commands print it as one line and end with status 2; any other exception is a bug of ours and keeps its traceback."""

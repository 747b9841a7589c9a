"""The one exception that users see."""


class InputError(ValueError):
    """Input that cannot be used: one line that names the file, the field and what was expected.

    The scripts print it as `error: ...` and exit with code 2.
    """

    def __init__(self, message: str):
        # Names come out of files that may be damaged or hostile: a line break, a terminal escape
        # or a megabyte of text in one must not reach the user's screen.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message if len(message) <= 2000 else message[:2000] + " ...")

"""Errors that a user can cause or fix; the command line prints each as one line."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, what is allowed, and what was given."""


class Incomplete(RuntimeError):
    """Work that stopped for a reason outside the program (disk full, lost worker)."""


def first_line(error: BaseException) -> str:
    """The first line of another package's error message, at most 400 characters.

    The error's class name if the message is empty.
    """
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return shortened(said, 400)


def shortened(text: str, most: int) -> str:
    """The text, cut between words and ended by dots if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."

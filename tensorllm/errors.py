"""Errors that a user can cause or fix; the command line prints each as one line."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, what is allowed, and what was given."""


class Incomplete(RuntimeError):
    """Work that stopped for a reason outside the program (disk full, lost worker)."""


def first_line(error: BaseException) -> str:
    """The first line of another package's error message, at most 400 characters.

    With the next line if the first only announces it. The error's class name if the message is
    empty or only a key.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    if isinstance(error, KeyError):
        said = f"{type(error).__name__}: {said}"
    return shortened(said, 400)


def shortened(text: str, most: int) -> str:
    """The text, cut between words and ended by dots if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."

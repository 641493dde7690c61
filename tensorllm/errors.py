"""The errors a user can cause. The command line prints them as one line and exits with 2."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, the allowed range, and what came."""


class Incomplete(RuntimeError):
    """The work stopped half-way for a reason outside the program (disk full, lost worker)."""


def first_line(error: BaseException) -> str:
    """The first line of what another package's error says, at most 400 characters of it; the next
    one too where it only announces that, and its kind where it says nothing, or only a key."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    if isinstance(error, KeyError):
        said = f"{type(error).__name__}: {said}"
    return shortened(said, 400)


def shortened(text: str, most: int) -> str:
    """The text, cut between words with dots behind where it has more characters than that."""
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."

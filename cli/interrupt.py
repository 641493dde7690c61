"""Ctrl-C, and a one-line message about what it leaves behind."""

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed, and what the running command would leave behind."""

    pressed = False
    leaves: Callable[[], str]

    def listen(self) -> None:
        """Record Ctrl-C from now on, as some libraries turn it into errors of their own."""
        self.pressed = False
        self.leaves = lambda: "nothing was written"
        with suppress(ValueError):  # not the main thread: signals belong to the caller
            signal.signal(signal.SIGINT, self._press)

    def keeps(self, folder: Path | None, option: str) -> None:
        """Say that the command keeps its state in the folder of an option, if that is given."""
        self.leaves = lambda: _left(folder, option)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt


def _left(folder: Path | None, option: str) -> str:
    if folder is None:
        return f"nothing was kept: with {option} FOLDER the same command would go on"
    beside = [path for path in folder.parent.glob(f".{folder.name}.*") if path.is_dir()]
    if folder.exists() or beside:  # incomplete folders have hidden names
        return f"run the same command again: it goes on from what is in {folder}"
    return "run the same command again: nothing was finished yet, it begins anew"


INTERRUPT = Interrupt()

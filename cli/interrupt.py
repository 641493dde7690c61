"""Ctrl-C: what it leaves behind, told in one line."""

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed, and what the command under way would leave."""

    pressed = False
    leaves = ""

    def listen(self) -> None:
        """From now on, Ctrl-C is remembered: some libraries turn it into errors of their own."""
        self.pressed = False
        self.leaves = "nothing was written"
        with suppress(ValueError):  # not the main thread: whoever called has the signals
            signal.signal(signal.SIGINT, self._press)

    def keeps(self, folder: Path | None, option: str) -> None:
        """The command keeps its state in the folder of an option, if that is given."""
        if folder is None:
            self.leaves = f"nothing was kept: with {option} FOLDER the same command would go on"
        else:
            self.leaves = f"run the same command again: it goes on from what is in {folder}"

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt


INTERRUPT = Interrupt()

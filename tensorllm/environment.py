"""What a reported number was made with: versions, hardware, command."""

import os
import platform
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "tensorllm",
    "torch",
    "transformers",
    "lightning",
    "tensorly",
    "datasets",
    "safetensors",
)


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process, ready for JSON."""
    return {
        "versions": {"python": platform.python_version()} | versions(),
        "hardware": hardware(),
        "command": command(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = _version(name)
        except PackageNotFoundError:  # run from a source tree that was never installed
            found[name] = "not installed"
    return found


@cache
def _version(name: str) -> str:
    """A package's version; cached, as reading it takes as long as compressing a small matrix."""
    return version(name)


def hardware() -> str:
    """One line: processor, cores in use, and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"{_processor()}, {cores()} cores, {torch.get_num_threads()} threads"
    return ", ".join([cpu, *gpus])


def cores() -> int:
    """Processor cores that this process may use; all of the machine's if that is not known."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command() -> str:
    """The command line as it could be typed again, but for bytes that are not UTF-8."""
    return printable(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def printable(name: str) -> str:
    """The name of a file, with marks in place of bytes that are not UTF-8, for records of it."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def name_in_utf8(file: Any) -> str:
    """The name of an open file, for libraries that open names in UTF-8 only."""
    name = str(file.name)
    return name if printable(name) == name else f"/dev/fd/{file.fileno()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

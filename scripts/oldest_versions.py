"""Requirements for test_oldest.sh: what users install at its lower bounds, tools as every day."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("dev", "docs")  # extras whose versions are no promise to users


def lines(project: dict[str, object], everyday: Sequence[str]) -> Iterator[str]:
    """One requirement a line, base and extras first."""
    extras = dict(project["optional-dependencies"])  # type: ignore[call-overload]
    tools = [line for extra in TOOLS for line in extras.pop(extra)]
    for line in [*project["dependencies"], *(x for some in extras.values() for x in some)]:
        yield line.split(",")[0].replace(">=", "==")
    pinned = {re.split("==", line)[0].lower(): line for line in everyday if "==" in line}
    for line in tools:
        name = re.split(r"[\[><=]", line)[0].lower()
        if name != "tensorllm":
            yield pinned.get(name, line)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everyday = (ROOT / "constraints.txt").read_text().splitlines()
    print("\n".join(lines(project, everyday)), "setuptools>=77", sep="\n")


if __name__ == "__main__":
    main()

"""What `make mutants` found, from mutants/ into docs/results/mutants.json.

For each module the mutants that were tried and killed, and of each survivor the lines that differ.
One that no test reaches has survived; one that computed until it was ended is killed. A mutant that
was never tried counts as untried, so that a part of a run can be told; a module of which none was
tried keeps what the file has of it.
"""

import argparse
import difflib
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "mutants.json"
FUNCTION = r"^( *)def (\w*__mutmut_\w+)\(.*?(?=^\1(?:def |@|class )|^[^\s)]|\Z)"
SURVIVED, UNTRIED = (0, 5, 33), None  # exit codes of the tests; 5 and 33: there are none


def modules(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each mutated module with its counts and survivors."""
    for meta in sorted((folder / "tensorllm").rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        if not codes:
            continue
        source = meta.with_suffix("")
        bodies = {m[2]: m[0] for m in re.finditer(FUNCTION, source.read_text(), re.M | re.S)}
        survivors = [key.rpartition(".")[2] for key, code in codes.items() if code in SURVIVED]
        untried = sum(code is UNTRIED for code in codes.values())
        yield (
            str(source.relative_to(folder)),
            {
                "mutants": len(codes),
                "untried": untried,
                "killed": len(codes) - untried - len(survivors),
                "survived": len(survivors),
                "survivors": {name: changed(bodies, name) for name in survivors},
            },
        )


def changed(bodies: dict[str, str], name: str) -> list[str]:
    """The lines of a function before and after its mutation."""
    function, _, number = name.partition("__mutmut_")
    both = (
        bodies[f"{function}__mutmut_{which}"].replace(f"__mutmut_{which}(", "(").splitlines()
        for which in ("orig", number)
    )
    return [
        f"{line[0]} {line[1:].strip()}"
        for line in list(difflib.unified_diff(*both, n=0, lineterm=""))[2:]
        if line[0] in "+-" and line[1:].strip()
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=Path, default=ROOT / "mutants")
    options.add_argument("--out", type=Path, default=RESULTS)
    args = options.parse_args()
    before = json.loads(args.out.read_text())["modules"] if args.out.is_file() else {}
    found = {
        name: before.get(name, one) if one["untried"] == one["mutants"] else one
        for name, one in modules(args.folder)
    }
    args.out.write_text(
        json.dumps({"mutmut": version("mutmut"), "modules": found}, indent=1) + "\n"
    )
    for name, one in found.items():
        counts = ", ".join(f"{one[key]} {key}" for key in ("killed", "survived", "untried"))
        print(f"{name}: {one['mutants']} mutants, {counts}")


if __name__ == "__main__":
    main()

"""How every benchmark says what it measured: a part of docs/results/NAME.json, and a table.

    args = parser(__doc__).parse_args()
    begin(args)
    ...
    save("decompose", "cpu", {"GPT-J": Comparison(...)}, args, rates=...)

A part is what one command measures: name it after the machine or the piece of work. Its
`comparisons` are what docs/benchmarks.md shows; whatever else is given is kept beside them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tensorllm.environment import environment
from tensorllm.io import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One figure beside its peer's, measured in the same run.

    Attributes:
        unit: of `ours`, `peer` and `floor`.
        peer: the other's figure, and `peer_name` who that is.
        more_is_better: a speed, not a time.
        wanted: how many times better than the peer it was to be.
        floor: what physics allows on that machine (bytes at the speed of its disk or memory,
            multiply-adds at the speed of a large matrix product).
    """

    ours: float
    unit: str
    peer: float | None = None
    peer_name: str = ""
    more_is_better: bool = False
    wanted: float | None = None
    floor: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, with `times` (better than the peer) and `times_floor` (worse than that)."""
        out = asdict(self)
        if self.peer is not None:
            out["times"] = self._better(self.ours, self.peer)
        if self.floor is not None:
            out["times_floor"] = self._better(self.floor, self.ours)
        return out

    def _better(self, this: float, that: float) -> float:
        return this / that if self.more_is_better else that / this


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    out = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    out.add_argument("--out", type=Path, help="JSON file; in docs/results, or none with --quick")
    out.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    out.add_argument(
        "--shared",
        type=Path,
        default=os.environ.get("TENSORLLM_SHARED", ROOT.parent / "shared"),
        help="folder of real models/ and data/; $TENSORLLM_SHARED, else shared beside the clone",
    )
    return out


def real(args: argparse.Namespace, name: str) -> Path:
    """A file or folder of the real models and data, by its name below --shared.

    Where it is missing the benchmark ends with a line that says what.
    """
    path: Path = args.shared / name
    if not path.exists():
        sys.exit(f"no {name} in {args.shared}; give its folder by --shared or TENSORLLM_SHARED")
    return path


def begin(args: argparse.Namespace) -> None:
    """Threads as asked for; one where nothing is measured."""
    torch.set_num_threads(1 if args.quick else args.threads)


def save(
    name: str,
    part: str,
    comparisons: Mapping[str, Comparison],
    args: argparse.Namespace,
    **data: Any,
) -> None:
    """Print the comparisons, and put them with what they were made with into the benchmark's file.

    Other parts of the file stay as they are.
    """
    shown = {what: one.to_json() for what, one in comparisons.items()}
    for what, one in shown.items():
        print(line(what, one), flush=True)
    path = args.out or (None if args.quick else RESULTS / f"{name}.json")
    if path is None:
        return
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[part] = {**made(), "comparisons": shown, **data}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found, indent=1)  # whole or not: a kill must not cost the other parts


def portable(command: str) -> str:
    """A command without the folders of one machine: absolute paths by their last part."""
    return re.sub(r"(?<![\w./-])/(?:[^/\s]+/)*([^/\s]+)/?", r"\1", command)


def made() -> dict[str, Any]:
    """When, where, with what, by which command, and how long that has taken until now."""
    about = environment()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": f"python benchmarks/{portable(about['command'])}",
        "wall_s": round(time.monotonic() - STARTED, 1),
        "hardware": about["hardware"],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": about["versions"],
    }


def line(what: str, one: Mapping[str, Any]) -> str:
    """A comparison for the terminal."""
    out = f"{what}: {one['ours']:.4g} {one['unit']}"
    if one["peer"] is not None:
        out += f", {one['peer_name']} {one['peer']:.4g}, {one['times']:.3g} times better"
        out += f" (wanted {one['wanted']:g})" if one["wanted"] else ""
    if one["floor"] is not None:
        out += f", {one['times_floor']:.2f} times the floor"
    return out


def _commit() -> str | None:
    """The commit that is checked out, with a mark where files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone

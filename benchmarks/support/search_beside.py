"""A search beside the same command of an older release: what `search.py --beside` compares."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison

from tensorllm.search.trial import unpack

WANTED = 4.0
COUNTED = Path(__file__).with_name("counted_search.py")


def beside(file: Path, *ours: Path) -> tuple[str, dict[str, Comparison], dict[str, Any]]:
    """Run the search of this file again, or take it from another file.

    Args:
        file: what `counted_search.py` printed in the older release's environment.
        ours: what it printed in this one, right after or before: CPU time depends on what else the
            machine does. A second one, printed with `--flops`, gives the floor: the operations of
            all matrix products at the speed of a large one.
    """
    old = read(file.read_text())
    if ours:
        new, *counted = (read(one.read_text()) for one in ours)
        return compared(old, new, counted[0]["flops"] if counted else None)
    command = [sys.executable, str(COUNTED), *old["arguments"]]
    new = read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return compared(old, new)


def read(text: str) -> dict[str, Any]:
    """The line of JSON among whatever else was printed."""
    lines = [line for line in text.splitlines() if line.startswith('{"')]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def flops_per_second(size: int = 2048) -> float:
    """Of a large float32 product, in CPU seconds."""
    a = torch.randn(size, size)
    taken = []
    for _ in range(5):
        started = time.process_time()
        a @ a
        taken.append(time.process_time() - started)
    return 2 * size**3 / min(taken)


def compared(
    old: Mapping[str, Any], new: Mapping[str, Any], flops: int | None = None
) -> tuple[str, dict[str, Comparison], dict[str, Any]]:
    """CPU time of all trials, and whether every verdict that both have is the same."""
    mine, others = by_point(new), by_point(old)
    assert mine.keys() == others.keys(), "the two searches have the same trials"
    pairs = [(mine[key], others[key]) for key in mine]
    given = dict(pairwise(old["arguments"]))
    what = f"{given['--dataset']}, {given['--mode']}, {Path(given['--model']).name}"
    comparison = Comparison(
        ours=new["cpu_seconds"] / len(pairs),
        unit="CPU s",
        peer=old["cpu_seconds"] / len(pairs),
        peer_name=old["release"],
        wanted=WANTED,
        floor=None if flops is None else flops / flops_per_second() / len(pairs),
    )
    about = {
        "search": [Path(word).name if word.startswith("/") else word for word in old["arguments"]],
        "release": new["release"],
        "peer": {name: old[name] for name in ("release", "cpu_seconds", "threads")},
        "cpu_seconds": new["cpu_seconds"],
        "flops": flops,
        "trials": len(pairs),
        "questions": new["original"]["seen"],
        "examples_scored": {
            name: sum(trial["seen"] for trial in found["trials"])
            for name, found in (("ours", new), ("peer", old))
        },
        "verdicts_that_differ": sum(differ(*pair) for pair in pairs),
        "verdicts_compared": sum(min(one["seen"], other["seen"]) for one, other in pairs),
        "largest_difference_loss": max(
            abs(one["loss"] - other["loss"]) for one, other in pairs if one["seen"] == other["seen"]
        ),
        "same_original": new["original"]["correct"] == old["original"]["correct"],
        "same_winner": winner(new) == winner(old),
        "pruned": {
            name: sum(trial["stopped"] for trial in found["trials"])
            for name, found in (("ours", new), ("peer", old))
        },
    }
    part = f"{Path(given['--model']).name}-{given['--mode']}-beside-{old['release']}"
    return part, {f"a trial of a search, {what}": comparison}, about


def by_point(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {json.dumps(trial["params"], sort_keys=True): trial for trial in found["trials"]}


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Verdicts that differ; both have examined the questions in the same order."""
    both = (unpack(each["correct"], each["seen"]) for each in (one, other))
    return sum(a != b for a, b in zip(*both, strict=False))


def winner(found: Mapping[str, Any]) -> Any:
    """The point of the best of the trials that were examined in full."""
    full = [trial for trial in found["trials"] if not trial["stopped"]]
    return min(full, key=lambda t: (-t["accuracy"], t["loss"], -t["parameters_saved"]))["params"]

"""Puts measured numbers into README.md and docs/: whatever they quote comes from docs/results/.

    PYTHONPATH=benchmarks python scripts/fill_numbers.py            # rewrite what differs
    PYTHONPATH=benchmarks python scripts/fill_numbers.py --check    # or only say so: exit code 1

A number stands between two comments, which Markdown does not show:

    ours is <!-- n:decompose/cpu/GPT-J/times;.0f -->164<!-- /n --> times faster

The path leads into docs/results/decompose.json (`comparisons` on the way may be left out; lists
count from 0), or begins with `plan` for what scripts/plan.py computes. The format is Python's, by
default three digits. A table stands between comments on lines of their own:

    <!-- table:comparisons decompose/cpu evaluate/cpu/fever -->
    <!-- /table -->

Its name is one of TABLES here or in plan.py, its words, quoted where they have spaces, are the
table's arguments. Fenced code is left alone, and so are comments straight behind a backtick.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmark_tables import benchmark, comparisons, durations, energy, figure, guides, mutants
from claim_tables import (
    claim_cells,
    claim_changed,
    claim_frequency,
    claim_generic,
    claim_guards,
    claims,
)
from method_tables import (
    closed,
    edits,
    mixtures,
    real_model,
    real_model_questions,
    reasoning,
    shares,
    tucker_front,
    variants,
)
from runtime_tables import compiled, llama_cpp, one_token, real_runtime

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<!`)(<!-- n:([^;]+?)(?:;(\S+))? -->)(.*?)(<!-- /n -->)")
TABLE = re.compile(r"^(<!-- table:(\S+)(.*?) -->\n)(.*?)(^<!-- /table -->)", re.M | re.S)
TABLES: dict[str, Callable[..., str]] = {
    "llama-cpp": llama_cpp,
    "benchmark": benchmark,
    "comparisons": comparisons,
    "closed": closed,
    "real_model": real_model,
    "real_model_questions": real_model_questions,
    "shares": shares,
    "variants": variants,
    "reasoning": reasoning,
    "durations": durations,
    "energy": energy,
    "guides": guides,
    "mutants": mutants,
    "mixtures": mixtures,
    "tucker-front": tucker_front,
    "edits": edits,
    "real-runtime": real_runtime,
    "compiled": compiled,
    "one-token": one_token,
    "claims": claims,
    "claim-cells": claim_cells,
    "claim-guards": claim_guards,
    "claim-frequency": claim_frequency,
    "claim-generic": claim_generic,
    "claim-changed": claim_changed,
}
PLAN = "plan"  # imported only where a page asks for it: it imports torch


def filled(text: str) -> str:
    """The text with every number and table as the results have it.

    Raises:
        KeyError: a marker that leads nowhere.
    """
    parts = FENCE.split(text)
    return "".join(part if i % 2 else _filled(part) for i, part in enumerate(parts))


def value(path: str) -> Any:
    """What a path such as `decompose/cpu/GPT-J/times` leads to."""
    name, *keys = path.split("/")
    here = import_module(PLAN).numbers() if name == PLAN else results(name)
    for key in keys:
        if isinstance(here, list):
            here = here[int(key)]
        elif key not in here and key in here.get("comparisons", {}):
            here = here["comparisons"][key]
        else:
            try:
                here = here[key]
            except KeyError:
                raise KeyError(f"{path}: no {key!r} among {', '.join(here)}") from None
    return here


@cache
def results(name: str) -> Any:
    path = ROOT / "docs" / "results" / f"{name}.json"
    if not path.is_file():
        raise KeyError(f"no {path.relative_to(ROOT)}")
    return json.loads(path.read_text())


def _filled(text: str) -> str:
    text = NUMBER.sub(lambda m: f"{m[1]}{_shown(value(m[2]), m[3])}{m[5]}", text)
    return TABLE.sub(lambda m: f"{m[1]}\n{_table(m[2], shlex.split(m[3]))}\n\n{m[5]}", text)


def _shown(number: Any, form: str | None) -> str:
    return str(number) if isinstance(number, str) else figure(number, form)


def _table(name: str, words: Sequence[str]) -> str:
    tables = import_module(PLAN).TABLES if name.startswith(PLAN) else TABLES
    if name not in tables:
        raise KeyError(f"no table {name!r} among {', '.join(tables)}")
    return str(tables[name](value, *words))


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--check", action="store_true")
    check = options.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        try:
            new = filled(text)
        except KeyError as error:
            sys.exit(f"{path.relative_to(ROOT)}: {error.args[0]}")
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new)
    if stale and check:
        print(f"not as docs/results has it: {', '.join(stale)}; run scripts/fill_numbers.py")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())

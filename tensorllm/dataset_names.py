"""Names of the datasets; without torch, so that a wrong name or file is refused at once."""

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from tensorllm.errors import UserError
from tensorllm.registry import unknown

GROUP = "tensorllm.datasets"  # of entry points: datasets of installed packages
YAML = (".yaml", ".yml")  # a file that describes a dataset of your own
ALIASES = {  # by the names that are registered (tensorllm/data)
    "bios_profession": ("bios", "bias_in_bios"),
    "demo": (),
    "fever": (),
    "hotpotqa": ("hotpot", "hotpot_qa"),
    "questions": ("custom",),
    "text": ("perplexity",),
    "wikidata_qa": ("qa_wikidata", "bigbench_wikidata", "wikidata"),
}


def check_datasets(
    names: Sequence[str | None],
    files: Sequence[str | Path | None] = (),
    plugins: Sequence[str] = (),
) -> None:
    """Refuse a name that can be no dataset, and a file that is not there, before slow imports.

    Args:
        names: of datasets, or YAML files that describe one; None or nothing: not given.
        files: that their rows are read from.
        plugins: modules still to be imported, which may bring datasets.

    Raises:
        UserError: the line that the dataset itself would be refused with.
    """
    of_others = plugins or "tensorllm.data.base" in sys.modules or entry_points(group=GROUP)
    known = {*ALIASES, *(alias for aliases in ALIASES.values() for alias in aliases)}
    for name in (name.strip() for name in names if name):
        if name.endswith(YAML):
            if not Path(name).exists():
                raise UserError(f"cannot read the dataset {name}: No such file or directory")
        elif name not in known and not of_others:
            raise unknown("dataset", name, sorted(ALIASES), known, plugins=True)
    for file in (Path(str(file).strip()) for file in files if file):
        if len(files) == len(names) and not file.exists():  # else their number is what is wrong
            raise UserError(f"cannot read the rows of {str(file)!r}: No such file or directory")

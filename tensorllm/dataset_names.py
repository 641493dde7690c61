"""Names of the datasets; without torch, so that a wrong name or file is refused at once."""

import sys
from collections.abc import Iterable, Sequence
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
    names: Iterable[str | None], files: Iterable[str | Path | None], plugins: Sequence[str]
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
    asked = [name.strip() for name in names if name]
    for name in asked:
        if name.endswith(YAML):
            if not Path(name).exists():
                raise UserError(f"cannot read the dataset {name}: No such file or directory")
        elif name not in known and not of_others:
            raise unknown("dataset", name, sorted(ALIASES), known, plugins=True)
    given = [Path(str(file).strip()) for file in files if file]
    for file in given:
        if len(given) == len(asked) and not file.exists():  # else the number of files is wrong
            raise UserError(f"cannot read the rows of {str(file)!r}: No such file or directory")

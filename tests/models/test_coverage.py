"""All model types of the installed transformers, compared with the committed table.

A change of transformers that breaks one fails here, and so does one that makes another readable:
`python tests/models/test_coverage.py` writes the table anew, to be looked at and committed.
"""

import json
import warnings
from pathlib import Path

import pytest
import transformers

from tensorllm.models.coverage import NOT, TASKS, counts, made_with, page, read, table, types_of

# Fields of configs whose defaults make no model.
ROOT = Path(__file__).parents[2]  # not from the helpers: this file is a script, too
GIVEN = json.loads((Path(__file__).parent / "model_configs.json").read_text(encoding="utf-8"))
PAGE = ROOT / "docs" / "architectures.md"
SHARDS = 12
GOALS = {"causal": 150, "masked": 38, "image-text": 60}

same_version = pytest.mark.skipif(
    transformers.__version__ != made_with(), reason=f"the table is of transformers {made_with()}"
)


@pytest.mark.parametrize("task", TASKS)
def test_the_table_has_every_type(task: str) -> None:
    if transformers.__version__ == made_with():
        assert list(table()[task]) == types_of(task)


@pytest.mark.parametrize("task", TASKS)
def test_as_many_are_read_as_is_wanted(task: str) -> None:
    found, total = counts()[task]
    assert GOALS[task] <= found <= total


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_read_is_what_the_table_says(task: str, shard: int) -> None:
    """What the table says is read must be; other versions of transformers may read more."""
    same = transformers.__version__ == made_with()
    for name in types_of(task)[shard::SHARDS]:
        want = table()[task].get(name)
        if want is None:
            continue
        got = read(name, GIVEN.get(name, {}))
        if want.how != NOT:
            assert got == want, name
        elif same:
            assert got.how == NOT, f"{name} is read now: write the table anew"


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith(page())


def main() -> None:
    values: dict[str, object] = {"transformers": transformers.__version__}
    for task in TASKS:
        found = {}
        for name in types_of(task):
            got = read(name, GIVEN.get(name, {}))
            found[name] = [got.how, got.what]
        values[task] = found
    path = ROOT / "tensorllm" / "models" / "coverage.json"
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    write_page()


def write_page() -> None:
    before, _, _ = PAGE.read_text(encoding="utf-8").partition("## Causal")
    PAGE.write_text(before + page(), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

"""Names of datasets that are refused before anything slow is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import environment

from tensorllm.data import DATASETS
from tensorllm.dataset_names import ALIASES, check_datasets
from tensorllm.errors import UserError


def test_the_names_are_those_that_are_registered() -> None:
    ours = {n for n in DATASETS if DATASETS[n].__module__.startswith("tensorllm.")}
    assert ours == set(ALIASES)
    for name, aliases in ALIASES.items():
        assert all(DATASETS[alias] is DATASETS[name] for alias in aliases)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "--dataset", "fevr"), "Unknown dataset 'fevr'. Did you mean 'fever'?"),
        (("evaluate", "--dataset", "no.yaml"), "cannot read the dataset no.yaml"),
        (("evaluate", "--dataset", "fever", "--data-file", "no.csv"), "cannot read the rows of"),
        (("compress", "--mode", "svd", "--evaluate", "fevr"), "Did you mean 'fever'?"),
        (("search-ranks", "--dataset", "fever,fevr"), "Did you mean 'fever'?"),
        (("search-ranks", "--dataset", "demo,text", "--data-file", ",no.txt"), "'no.txt'"),
        (("reproduce", "--dataset", "fever,fevr"), "Did you mean 'fever'?"),
        (("compress", "--mode", "svd", "--calibration", "no.txt"), "cannot read the text 'no.txt'"),
        (("compress", "--mode", "svd", "--sampled", "no.jsonl"), "cannot read the text"),
        (("compress", "--mode", "svd", "--distill-text", "no.jsonl"), "cannot read the text"),
        (("search-ranks", "--calibration", "no.txt"), "cannot read the text 'no.txt'"),
        (("search-ranks", "--sampled", "no.txt"), "cannot read the text 'no.txt'"),
    ],
)
def test_no_torch_is_imported_to_refuse_a_dataset_or_a_file(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    """A `torch` that cannot be imported stands in its place."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = environment().get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-m", "tensorllm", *arguments, "--model", "demo"],
        env=environment(PYTHONPATH=f"{tmp_path}:{path}"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plugin_may_bring_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorllm.data.base")
    with pytest.raises(UserError, match="Unknown dataset 'mine'"):
        check_datasets(["mine"])
    check_datasets(["mine", None], [None], ["my_module"])
    check_datasets(["perplexity"], [Path(__file__)])

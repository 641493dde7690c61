"""Tensors are read into memory of their own, and a model's memory is allocated once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.checkpoint import factored, loading
from tensorllm.checkpoint.factored import FactoredFolder
from tensorllm.checkpoint.reader import DTYPES, INTEGERS, Checkpoint
from tensorllm.errors import UserError
from tensorllm.runtime.cost import choose_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, beside whose weights there is a tensor of every dtype."""
    tiny_model("llama").save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    more = {
        name: torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name))
        for name in [*DTYPES.values(), *INTEGERS.values()]
    }
    save_file(load_file(path) | more | {"empty": torch.empty(0, 3), "one": torch.tensor(2.5)}, path)
    return tmp_path / "in"


def test_tensors_are_read_as_they_are_without_mapping_their_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a mapped file would be resident beside the tensors."""
    monkeypatch.setattr("safetensors.safe_open", None)
    checkpoint = Checkpoint(folder)
    read = checkpoint.read(checkpoint.entries)
    monkeypatch.undo()
    stored = load_file(folder / "model.safetensors")
    assert read.keys() == stored.keys()
    for name, t in stored.items():
        assert read[name].dtype == t.dtype
        assert torch.equal(read[name], t), name


def test_what_cannot_be_read_is_one_line(folder: Path) -> None:
    checkpoint, path = Checkpoint(folder), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"model.safetensors became shorter while it was read$"):
        checkpoint.read(checkpoint.entries)
    checkpoint.entries["one"] = replace(checkpoint.entries["one"], dtype="F4")
    with pytest.raises(UserError, match=r"model.safetensors holds a tensor stored as F4, which"):
        checkpoint.read(["one"])


def test_only_what_runs_dense_is_rebuilt_in_memory_that_was_allocated_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the temporary tensors of each site leave gaps between the model's parameters."""
    model = tiny_model("llama")
    tl.compress(model, tl.LaserSVD(rho=0.4, matrices=("q", "v", "in")))
    tl.save(model, tmp_path / "out", format="factored")
    wanted = {"layers.0.q", "layers.1.in"}
    steps: list[Any] = []
    write, allocated = factored.write_dense, FactoredFolder._allocated

    def chosen(sites: Any, geometry_of: Any, policy: Any, dtype: Any, **given: Any) -> Any:
        choices = choose_all(sites, geometry_of, "always", dtype, **given)
        return [replace(choice, factored=choice.site in wanted) for choice in choices]

    def noted_write(site: Any, *given: Any) -> None:
        steps.append(site.name)
        write(site, *given)

    def noted_allocation(self: Any, names: Any) -> Any:
        if names := set(names):
            steps.append(names)
        return allocated(self, names)

    monkeypatch.setattr(loading, "choose_all", chosen)
    monkeypatch.setattr(factored, "write_dense", noted_write)
    monkeypatch.setattr(FactoredFolder, "_allocated", noted_allocation)
    tl.load(tmp_path / "out", policy="auto")
    manifest = FactoredFolder(tmp_path / "out").manifest
    assert len(steps[0]) == len(manifest.replaced) - len(wanted)
    assert sorted(steps[1:]) == sorted({site.name for site in manifest.sites} - wanted)

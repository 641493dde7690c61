"""Fits whose layers are read from disk one at a time: the same factors, and they can be resumed."""

import errno
import os
import signal
import subprocess

import forked
import pytest
import torch
from calibration_text import text
from repository import HELPERS
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_model

from tensorllm.calibration import fit, fit_folder
from tensorllm.calibration import store as stores
from tensorllm.calibration.layers import OnDisk
from tensorllm.calibration.store import States, Store
from tensorllm.compressors import ActivationHybrid, ActivationTucker
from tensorllm.errors import Incomplete, UserError
from tensorllm.io import write_tensors


def dense(compressor) -> dict[str, torch.Tensor]:
    return {site.name: compressor.factors(site).dense() for site in compressor.sites}


@pytest.mark.parametrize("name", TINY)
def test_a_streamed_fit_is_the_fit_in_memory(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "model")
    source = OnDisk(tmp_path / "model")
    # eager attention both, as rounding differs: a fresh config knows nothing of the tiny model's
    model = tiny_model(name)
    model.set_attn_implementation(source.model.config._attn_implementation)
    # Adam's steps amplify rounding where a gradient is about zero
    for epochs, most in ((0, 1e-3), (1, 1e-2)):
        wanted = ActivationHybrid(target_ratio=2, refit_epochs=epochs)
        held = dense(fit(wanted, model, text()))
        work = tmp_path / f"work-{epochs}"
        streamed = dense(fit_folder(wanted, tmp_path / "model", text(), work=work))
        assert held.keys() == streamed.keys()
        for site, w in held.items():
            assert torch.allclose(streamed[site], w, atol=most * float(w.abs().max())), site


def test_layers_hold_their_weights_only_while_they_are_needed(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    source = OnDisk(tmp_path)
    block = source.model.get_submodule("layers.1")
    with source.block(1):
        own = dict(model.model.layers[1].named_parameters())
        assert all(torch.equal(p, own[name]) for name, p in block.named_parameters())
    matrices = [p for p in source.model.parameters() if p.ndim > 1]
    assert [p.is_meta for p in matrices] == [False] + [True] * (len(matrices) - 1)  # embeddings


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_tied_embeddings_are_found_under_the_name_of_the_head(name, tmp_path):
    """As older versions of transformers stored them."""
    model = tiny_model(name, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (embeddings,) = (
        n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight
    )
    head = next(other for other, own in model._tied_weights_keys.items() if own == embeddings)
    weights = load_file(tmp_path / "model.safetensors")
    weights[head] = weights.pop(embeddings)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = OnDisk(tmp_path).model.get_input_embeddings().weight
    assert torch.equal(found, model.get_input_embeddings().weight)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from calibration_text import text
from tensorllm.calibration import fit_folder
from tensorllm.compressors import ActivationHybrid
import tensorllm.calibration.store as store

def slow(save):
    def slower(self, name, tensors):
        save(self, name, tensors)
        if {stop!r} in name:
            print("reached", flush=True)
            sys.stdin.read()
    return slower
store.Store.save = slow(store.Store.save)
fit_folder(ActivationHybrid(target_ratio=2), Path({model!r}), text(), work=Path({work!r}))
"""


@pytest.mark.parametrize("stop", ["errors-1", "original-1", "factors-1"])
def test_a_killed_fit_goes_on_and_ends_the_same(stop, tmp_path):
    model, work = tmp_path / "model", tmp_path / "work"
    tiny_model("llama", num_hidden_layers=3).save_pretrained(model)
    wanted = ActivationHybrid(target_ratio=2)
    whole = dense(fit_folder(wanted, model, text(), work=tmp_path / "other"))
    tests = str(HELPERS)
    script = SCRIPT.format(tests=tests, stop=stop, model=str(model), work=str(work))
    running = forked.Popen(["-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with running:
        assert running.stdout.readline() == "reached\n"
        os.kill(running.pid, signal.SIGKILL)
    first = {path: path.stat().st_mtime_ns for path in work.glob("errors-*")}
    resumed = dense(fit_folder(wanted, model, text(), work=work))
    assert all(torch.equal(resumed[site], w) for site, w in whole.items())
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())  # not done again


def test_a_folder_of_other_work_is_not_gone_on_from(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    model, work = tmp_path / "model", tmp_path / "work"
    fit_folder(ActivationHybrid(target_ratio=2), model, text(), work=work)
    again = dense(fit_folder(ActivationHybrid(target_ratio=3), model, text(), work=work))
    fresh = dense(
        fit_folder(ActivationHybrid(target_ratio=3), model, text(), work=tmp_path / "new")
    )
    assert all(torch.equal(again[site], w) for site, w in fresh.items())
    assert not list(work.glob("measured-*")) + list(work.glob("original-*"))  # states are gone


def test_a_folder_that_is_not_a_fits_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which no fit left there"):
        Store(tmp_path, {"work": 1})
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_a_folder_in_a_fits_that_is_not_one_is_left_alone(tmp_path):
    Store(tmp_path, {"work": 1})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all of it")
    with pytest.raises(UserError, match="holds thesis, which no fit left there"):
        Store(tmp_path, {"work": 2})
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "all of it"


@pytest.mark.parametrize("begun", [False, True])
def test_stores_in_a_folder_are_left_alone(tmp_path, begun):
    """As one of each process that torchrun started before, or that of a narrow export."""
    if begun:
        Store(tmp_path, {"work": 1}).save("errors-0", {"x": torch.ones(1)})
    other = Store(tmp_path / "rank-0-of-2", {"work": 1})
    other.save("errors-0", {"x": torch.ones(2)})
    assert not Store(tmp_path, {"work": 2}).has("errors-0")
    assert Store(other.folder, {"work": 1}).has("errors-0")


def test_states_come_back_to_the_device_they_were_on(tmp_path):
    """From a folder all is read into main memory, where the layers of a GPU cannot use it."""
    elsewhere = torch.device("meta")
    for store in (Store(), Store(tmp_path, {"work": 1})):
        states = States(store, "measured-0", 2, elsewhere)
        states.keep([torch.ones(1, 2, 3), torch.ones(1, 4, 3)])
        assert [(s.device, s.shape[1]) for s in states] == [(elsewhere, 2), (elsewhere, 4)]


def test_what_needs_the_whole_model_is_not_streamed(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    wanted = ActivationTucker(target_ratio=2, weighting="loss")
    with pytest.raises(UserError, match="cannot be streamed"):
        fit_folder(wanted, tmp_path / "model", text(), work=tmp_path / "work")


def test_a_full_disk_says_so_and_the_fit_goes_on_from_finished_layers(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    wanted = ActivationHybrid(target_ratio=2, refit_epochs=0)
    whole = dense(fit_folder(wanted, tmp_path / "model", text(), work=tmp_path / "undisturbed"))

    def full(path, tensors):
        if path.name.startswith("factors-1"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(path, tensors)

    monkeypatch.setattr(stores, "write_tensors", full)
    with pytest.raises(Incomplete, match=r"No space left .* goes on from the last finished layer"):
        fit_folder(wanted, tmp_path / "model", text(), work=tmp_path / "work")
    monkeypatch.undo()
    assert (tmp_path / "work" / "factors-0.safetensors").is_file()
    again = dense(fit_folder(wanted, tmp_path / "model", text(), work=tmp_path / "work"))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[site], w) for site, w in whole.items())

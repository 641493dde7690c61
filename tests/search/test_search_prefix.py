"""Skipping unedited layers changes no logit: against the whole model, run as it is."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from edits import Edit
from tiny_models import TINY, tiny_model

from tensorllm.evaluation.forward import ModelForward, left_padded
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import ActivationCache, CacheBudget, LayerInput, mapped
from tensorllm.search.forwards import PrefixForward, PrefixMaskedForward
from tensorllm.search.prefix import EditExtent, Prefix, default_budget

CAUSAL = [name for name in TINY if TINY[name].task == "causal"]
MASKED = [name for name in TINY if TINY[name].task == "masked"]
PARALLEL = ("gptj", "gpt_neox", "phi", "falcon")  # one input for attention and FFN
CPU = torch.device("cpu")
LARGE = CacheBudget(2**20)


def three_layers(name):
    model = tiny_model(name, num_hidden_layers=3)
    return model, RoleMatrices(model.config, parameters_of(model)), parameters_of(model)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_every_causal_architecture_resumes_above_what_is_kept(name):
    model, roles, weights = three_layers(name)
    prefix = Prefix(model, roles, LARGE)
    forward, plain = PrefixForward(model, prefix), ModelForward(model)
    ids = [[5, 9, 11, 4, 8], [7, 3], [6, 6, 2, 9]]
    batch = left_padded(ids, CPU)
    rows = torch.tensor([2, 0, 2])  # choices: rows may repeat
    after = left_padded([[12, 4], [13], [14]], CPU, [4, 5, 4])
    next_ = left_padded([[12], [13], [14]], CPU, [len(row) for row in ids])
    for round_, lowest in enumerate((1, 1, 2, 2, 0, 1)):
        role = ("o", "out")[round_ % 2]
        with Edit(roles, weights, lowest, role, 1.5 + round_):
            with prefix.editing(EditExtent(lowest, ffn=role == "out")):
                got = run_all(forward, batch, after, rows, next_)
            want = run_all(plain, batch, after, rows, next_)
        for one, other in zip(got, want, strict=True):
            close(one, other)
    assert prefix.skipped >= 2 * (1 + 1 + 2 + 1)
    del forward, plain
    assert not any("forward" in m.__dict__ for m in model.modules())


def run_all(forward, batch, after, rows, next_):
    """The prompts, branches of them, and one more token of each."""
    first, cache = forward(batch, keep=2, grow=True, key=0)
    seen = torch.cat([batch.mask_BT[rows], after.mask_BT], 1)
    branch, _ = forward(after, keep=2, mask_BS=seen, cache=cache, rows=rows, key=(0, 0))
    seen = torch.cat([batch.mask_BT, next_.mask_BT], 1)
    last, _ = forward(next_, keep=1, mask_BS=seen, cache=cache, grow=True)
    # columns of padding hold nothing that anybody reads
    return first[:, -1], branch.where(after.mask_BT[..., None], 0), last


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_every_masked_architecture_resumes_above_what_is_kept(name):
    model, roles, weights = three_layers(name)
    prefix = Prefix(model, roles, LARGE)
    forward = PrefixMaskedForward(model, prefix)
    ids_BT = torch.tensor([[5, 9, 11, 4, 8], [7, 3, 2, 2, 2]])
    seen_BT = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    for round_, lowest in enumerate((1, 1, 2, 2)):
        with (
            Edit(roles, weights, lowest, "o", 1.5 + round_),
            prefix.editing(EditExtent(lowest, ffn=False)),
        ):
            got = forward(ids_BT, seen_BT, key="a")
            want = model(input_ids=ids_BT, attention_mask=seen_BT).logits
        close(got, want)
    assert prefix.skipped == 1 + 1 + 2  # layer 2 resumes from what is kept below layer 1


@pytest.mark.parametrize("name", ["gptj", "gpt_neox", "phi", "falcon", "llama", "gpt2", "opt"])
@torch.no_grad()
def test_the_ffn_beside_the_edited_attention_is_computed_once(name):
    model, roles, weights = three_layers(name)
    prefix = Prefix(model, roles, LARGE)
    forward, plain = PrefixForward(model, prefix), ModelForward(model)
    batch = left_padded([[5, 9, 11, 4, 8], [7, 3]], CPU)
    inner = model.get_submodule(roles.name(1, "in").removesuffix(".weight"))
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    for scale in (2.0, 3.0, 4.0):
        with Edit(roles, weights, 1, "o", scale):
            with prefix.editing(EditExtent(1, ffn=False)):
                got = forward(batch, keep=1, key=0)[0]
            spent = len(calls)
            want = plain(batch, keep=1)[0]
            del calls[spent:]
        close(got, want)
    assert len(calls) == (1 if name in PARALLEL else 3)
    with Edit(roles, weights, 1, "in", 2.0):
        with prefix.editing(EditExtent(1, ffn=True)):
            got = forward(batch, keep=1, key=0)[0]
        close(got, plain(batch, keep=1)[0])


@torch.no_grad()
def test_batches_side_by_side_do_not_mix():
    model, roles, weights = three_layers("gptj")
    prefix = Prefix(model, roles, LARGE)
    forward, plain = PrefixForward(model, prefix), ModelForward(model)
    batches = [left_padded([[5, 9, 11, 4 + i], [7, i + 1]], CPU) for i in range(16)]

    def ask(key):
        with torch.inference_mode():
            return forward(batches[key], keep=1, key=key)[0].clone()

    for scale in (2.0, 3.0):
        with Edit(roles, weights, 1, "o", scale):
            with prefix.editing(EditExtent(1, ffn=False)), ThreadPoolExecutor(4) as pool:
                got = list(pool.map(ask, range(16)))
            for one, batch in zip(got, batches, strict=True):
                close(one, plain(batch, keep=1)[0])
    assert prefix.skipped == 16


ONE = 4 * 4 * 32 * 4  # rows, tokens, width, bytes


@pytest.mark.parametrize(("memory", "disk"), [(3, 0), (2, 3), (0, 4), (9, 0)])
@torch.no_grad()
def test_the_byte_budgets_are_respected(tmp_path, memory, disk):
    model, roles, _ = three_layers("llama")
    batches = [left_padded([[5, 9, 11, 4 + i]] * 4, CPU) for i in range(6)]
    prefix = Prefix(model, roles, CacheBudget(memory * ONE, disk * ONE, tmp_path))
    plain = ModelForward(model)
    for lowest in (1, 2, 1, 1):
        with prefix.editing(EditExtent(lowest, ffn=True)):
            for key, batch in enumerate(batches):
                close(forward_of(model, prefix)(batch, keep=1, key=key)[0], plain(batch, keep=1)[0])
                held = [found for of in prefix.store._kept.values() for found in of.values()]
                for place, most in (("memory", memory), ("disk", disk)):
                    used = sum(kept.bytes for kept, where in held if where == place)
                    assert used == prefix.store.bytes[place] <= most * ONE
    assert prefix.store.bytes == {"memory": min(memory, 6) * ONE, "disk": disk * ONE}
    assert not list(tmp_path.iterdir())  # the files have no names


def forward_of(model, prefix):
    return PrefixForward(model, prefix)


@pytest.mark.parametrize("name", ["gptj", "llama"])
@torch.no_grad()
def test_one_pass_of_the_original_serves_every_candidate(name):
    model, roles, weights = three_layers(name)
    prefix = Prefix(model, roles, LARGE, candidates={0, 1, 2})
    forward, plain = PrefixForward(model, prefix), ModelForward(model)
    batch = left_padded([[5, 9, 11, 4, 8], [7, 3]], CPU)
    with prefix.editing(EditExtent(None, ffn=False)):
        close(forward(batch, keep=1, grow=True, key=0)[0], plain(batch, keep=1)[0])
    assert prefix.skipped == 0
    for count, (lowest, role) in enumerate([(2, "o"), (1, "o"), (2, "in"), (1, "o")], 1):
        before = prefix.skipped
        with Edit(roles, weights, lowest, role, 1.5 + count):
            with prefix.editing(EditExtent(lowest, ffn=role == "in")):
                got, cache = forward(batch, keep=1, grow=True, key=0)
            want, plain_cache = plain(batch, keep=1, grow=True)
        close(got, want)
        for one, other in zip(cache.layers, plain_cache.layers, strict=True):
            seen = batch.mask_BT[:, None, :, None]  # what padding holds nobody reads
            close(one.keys.where(seen, 0), other.keys.where(seen, 0))
            close(one.values.where(seen, 0), other.values.where(seen, 0))
        assert prefix.skipped - before == lowest
    caches = 2 * sum(layer.keys.nbytes for layer in plain_cache.layers[:2])
    hidden = 2 * 10 * 32 * 4
    ffns = 2 * hidden if name in PARALLEL else 0
    assert prefix.store.bytes["memory"] == caches + hidden + ffns  # one cache for both layers


@torch.no_grad()
def test_what_is_kept_to_spare_gives_way():
    model, roles, _ = three_layers("llama")
    prefix = Prefix(model, roles, CacheBudget(3 * ONE), candidates={1, 2})
    forward = PrefixForward(model, prefix)
    batches = [left_padded([[5, 9, 11, 4 + i]] * 4, CPU) for i in range(3)]
    with prefix.editing(EditExtent(2, ffn=True)):
        for key, batch in enumerate(batches):
            forward(batch, keep=1, key=key)
    assert prefix.store.bytes["memory"] <= 3 * ONE
    computed = prefix.computed
    with prefix.editing(EditExtent(2, ffn=True)):
        for key, batch in enumerate(batches):
            forward(batch, keep=1, key=key)
    assert prefix.computed - computed == 3  # the layer that is asked for came first


def test_a_system_that_does_not_tell_free_memory_has_a_budget(monkeypatch):
    """macOS has no SC_AVPHYS_PAGES."""
    known = {name: at for name, at in os.sysconf_names.items() if name != "SC_AVPHYS_PAGES"}
    monkeypatch.setattr(os, "sysconf_names", known)
    ask = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: ask(known[name]))
    whole = ask("SC_PHYS_PAGES") * ask("SC_PAGE_SIZE")
    assert default_budget(torch.device("cpu")) == whole // 4


def test_what_can_never_be_kept_drives_nothing_else_out():
    store = ActivationCache(CacheBudget(memory=ONE))
    small, large = (LayerInput(torch.zeros(n * ONE // 4), in_tuple=False) for n in (1, 2))
    store.add(0, 1, small)
    store.add(0, 2, large)
    assert store.nearest(0, 3, grown=False)[0] == 1


def test_room_on_disk_is_taken_before_it_is_mapped(tmp_path, monkeypatch):
    """A map of what is not there yet would end the process where the disk is full (SIGBUS)."""
    taken, from_file = [], torch.from_file

    def watched(name, **options):
        taken.append(512 * Path(name).stat().st_blocks)
        return from_file(name, **options)

    monkeypatch.setattr(torch, "from_file", watched)
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.randn(64, 1024).to(dtype).T
        assert torch.equal(mapped(t, tmp_path), t)
        assert taken.pop() >= t.nbytes


def test_a_full_disk_only_costs_time(tmp_path, monkeypatch):
    def full(t, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorllm.search.activation_cache.mapped", full)
    store = ActivationCache(CacheBudget(disk=9 * ONE, folder=tmp_path))
    store.add(0, 1, LayerInput(torch.zeros(ONE // 4), in_tuple=False))
    assert store.nearest(0, 1, grown=False) == (0, None)
    assert store.bytes == {"memory": 0, "disk": 0}

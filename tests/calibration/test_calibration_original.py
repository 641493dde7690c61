"""What is kept of the original's layer while it is fitted, and given back."""

import torch
from calibration_text import text
from tiny_models import tiny_model

from tensorllm.calibration.layers import InMemory, Layers
from tensorllm.calibration.module_cache import ModuleCache
from tensorllm.calibration.original import LayerModule, Original
from tensorllm.calibration.store import Store, Sweep


def made():
    source = InMemory(tiny_model("llama"))
    layers = Layers(source, text().batches(), 2)
    with source.block(0) as block:
        own = LayerModule(source.roles, 0, block)
    taps = {role: own.tap((role,)) for role in ("q", "o", "in")}
    store = Store()
    return Original(layers, own, layers.start, store, taps), store, layers


def test_taps_are_given_back_one_by_one_and_run_again_where_they_are_asked_for():
    run, store, layers = made()
    first = list(run.signals("o"))
    run.drop("o")
    assert not any(store.has(f"original-o-{n}") for n in range(len(layers.batches)))
    assert store.has("original-in-0")
    assert store.has("original-output-0")
    for one, again in zip(first, run.signals("o"), strict=True):
        assert torch.equal(one, again)
    run.drop()
    assert not any(store.has(f"original-{n}-0") for n in ("o", "in", "output"))


def test_what_the_layer_reads_first_is_run_and_not_kept():
    run, store, layers = made()
    block = layers.source.model.model.layers[0]
    with torch.no_grad():
        wanted = [block.input_layernorm(hidden) for hidden in layers.start]
    for batch, x_BTD, found_NX in zip(layers.batches, wanted, run.signals("q"), strict=True):
        assert torch.equal(batch.tokens(x_BTD), found_NX)
    assert not store.has("original-q-0")
    run.output(0)
    assert not store.has("original-q-0")


def test_a_shared_input_is_given_by_whichever_module_runs_first():
    run, _, layers = made()
    block, ran = run.module.block, []
    for role in ("in", "gate"):
        module = block.get_submodule(run.module.below(role))
        module.register_forward_hook(lambda module, args, output: ran.append(module))
    for roles in (("in", "gate"), ("gate", "in")):
        tap, nothing = run.module.tap(roles), ModuleCache(block, "")
        found = layers.signals(0, block, layers.start, tap, nothing)
        alone = layers.signals(0, block, layers.start, run.module.tap(roles[:1]), nothing)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other)
        ran.clear()
        next(layers.signals(0, block, layers.start, tap, nothing))
        assert not ran


def test_outputs_are_the_same_kept_or_run():
    run, _, layers = made()
    plain = list(run.outputs())
    kept = [run.output(n) for n in range(len(layers.batches))]
    for one, other, again in zip(plain, kept, run.outputs(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, again)


def test_a_start_that_is_forgotten_still_says_how_many():
    start = [torch.randn(2, 3), torch.randn(2, 3)]
    sweep = Sweep(Store(), "factors", ("compressed",), start, 3)
    for layer, (states,), after in sweep:
        after(hidden + 1 for hidden in states)
        sweep.done({})
        sweep.forget_start()
        assert len(start) == 2
        assert not any(hidden.numel() for hidden in start)
        if layer < 2:
            assert all(hidden.numel() == 6 for hidden in sweep._before(layer + 1)[0])

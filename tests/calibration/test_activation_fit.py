"""Data-aware compression end to end on random models: all architectures, in memory and on disk.

Shapes: N tokens, X inputs and M outputs of a matrix.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from calibration_text import distance, logits, text
from tiny_models import TINY, tiny_model

from tensorllm.calibration import Calibration, fit, read_calibration
from tensorllm.calibration.covariances import Covariances, Wanted
from tensorllm.calibration.hooks import module_of
from tensorllm.calibration.statistics import frozen, measure_loss
from tensorllm.checkpoint.loading import load
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.report import saved_parameters
from tensorllm.compression.save import save
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import ActivationHybrid, ActivationTucker
from tensorllm.compressors.settings import make_compressor, settings_of
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.stacking import ATTENTION

BOTH = Wanted(matrices=True, width=True, gradients=True)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_fitted_and_a_mild_ratio_loses_less_than_a_hard_one(name):
    model, found = tiny_model(name), []
    before = copy.deepcopy(model.state_dict())
    for ratio in (1.05, 4.0):
        smaller = copy.deepcopy(model)
        compressor = fit(ActivationHybrid(target_ratio=ratio), model, text())
        report = compress(smaller, compressor)
        numbers = sum(
            geometry.numel(role)
            for geometry in report.spec.geometries
            for role in geometry.roles
            if role in ActivationHybrid.roles
        )
        left = numbers - saved_parameters(report.sites)
        assert ratio <= numbers / left < 1.15 * ratio  # the budget is used
        found.append(distance(model, smaller, text(1)))
    assert found[0] < found[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon-grouped", "phi3", "bert"])
def test_moments_are_those_of_the_roles_own_inputs_and_gradients(name):
    """Against gradients of the role matrices themselves, which are sums of g xᵀ over tokens."""
    model = tiny_model(name)
    roles = RoleMatrices(model.config, parameters_of(model))
    one = Calibration(((7, 11, 3, 19, 42),))
    keys = [(1, ("q", "k", "v")), (1, ("o",)), (0, ("out",))]
    with frozen(model):
        moments = measure_loss(model, roles, keys, one.batches(), BOTH, seed=5)
    batch = one.batches()[0]
    out = model(batch.ids_BT, attention_mask=batch.mask_BT.long()).logits[0].float()
    p = out.detach().softmax(-1).cumsum(-1)
    heights = torch.rand(5, 1, generator=torch.Generator().manual_seed(5)) * p[:, -1:]
    labels = torch.searchsorted(p, heights).flatten()
    inputs = {}
    for layer, group in keys:
        module_of(model, roles, layer, group[0]).register_forward_pre_hook(
            lambda m, args, key=(layer, group): inputs.__setitem__(key, args[0][0])
        )
    loss = torch.nn.functional.cross_entropy(
        model(batch.ids_BT, attention_mask=batch.mask_BT.long()).logits[0], labels, reduction="sum"
    )
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    for layer, group in keys:
        x_NX = inputs[layer, group].detach().double()
        assert torch.allclose(moments.inputs[layer, group], x_NX.mT @ x_NX / 5, atol=1e-5)
        # The matrix's gradient is G = sum g xᵀ; five inputs are independent, so g = G pinv(x).
        parts = []
        for role in group:
            g_ID = roles.read(grads, layer, role).double()
            g_MX = g_ID.mT if role in ("o", "out") else g_ID
            parts.append(torch.linalg.pinv(x_NX.mT) @ g_MX.mT)
            assert parts[-1].shape == (5, roles.spec.geometry(0).outputs(role))
        g_NM = torch.cat(parts, dim=1)
        weights = {name: w.detach() for name, w in parameters_of(model).items()}
        if group[0] in ("o", "out"):
            carried_NY = x_NX @ roles.read(weights, layer, group[0]).double()
        else:
            read = [roles.read(weights, layer, role).double() for role in group]
            carried_NY = torch.cat([g @ w for g, w in zip(parts, read, strict=True)], dim=1)
        propagated = moments.propagated[layer, group]
        wanted = carried_NY.mT @ carried_NY / 5
        assert torch.allclose(propagated, wanted, atol=1e-3 * float(wanted.abs().max()))
        felt = moments.gradients[layer, group]
        assert torch.allclose(felt, g_NM.mT @ g_NM / 5, atol=1e-3 * float(felt.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gptj"])
def test_what_the_backward_pass_leaves_is_carried_across_each_matrix(name):
    """Roles with a matrix of their own have Wᵀ g from the backward pass, fused ones do not."""
    model = tiny_model(name)
    roles = RoleMatrices(model.config, parameters_of(model))
    read = tuple(role for role in ("in", "gate") if role in roles.spec.geometry(0).roles)
    keys = [(1, ("q", "k", "v")), (0, read)]
    width = replace(BOTH, matrices=False)
    with frozen(model):
        both, alone = (
            measure_loss(model, roles, keys, text().batches(), w, seed=3) for w in (BOTH, width)
        )
    for layer, group in keys:
        parts = both.gradients[layer, group]
        weights = {name: w.detach() for name, w in parameters_of(model).items()}
        blocks = [roles.read(weights, layer, role).double() for role in group]
        whole_YX = torch.block_diag(*blocks)
        wanted = whole_YX.mT @ parts @ whole_YX
        for found in (both, alone):
            propagated = found.propagated[layer, group]
            assert torch.allclose(propagated, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_padding_and_batch_size_do_not_count():
    model, keys = tiny_model("llama"), [(0, ("q", "k", "v")), (1, ("out",))]
    roles = RoleMatrices(model.config, parameters_of(model))
    with frozen(model):
        whole, single = (
            measure_loss(model, roles, keys, text().batches(size), BOTH) for size in (4096, 1)
        )
    for key in keys:
        assert torch.allclose(whole.inputs[key], single.inputs[key], atol=1e-5)


def test_spilled_moments_are_the_same(tmp_path):
    model, keys = tiny_model("gptj"), [(0, ("q", "k", "v")), (1, ("in",))]
    roles = RoleMatrices(model.config, parameters_of(model))
    with frozen(model):
        held = measure_loss(model, roles, keys, text().batches(), BOTH)
        spilled = measure_loss(model, roles, keys, text().batches(), BOTH, spill=tmp_path)
    assert any(tmp_path.iterdir())
    assert all(torch.equal(held.propagated[key], spilled.propagated[key]) for key in keys)


def test_covariances_are_stored_and_read_under_the_names_of_earlier_fits() -> None:
    """A folder that an interrupted fit goes on from calls what is propagated `carried`."""
    part = {(3, ("in", "gate")): torch.tensor([[2.0, 1.0], [1.0, 3.0]])}
    found = Covariances(inputs=part, propagated=part)
    stored = found.tensors()
    assert stored.keys() == {"inputs/3/in-gate", "carried/3/in-gate"}
    again = Covariances.from_tensors(stored, torch.device("cpu"))
    (whole,) = again.propagated.values()
    assert torch.equal(whole, *part.values())


def test_data_beat_no_data_and_correction_beats_none():
    """Text that lives in few directions: a fit to it must be closer on such text."""
    model = tiny_model("llama")
    few = Calibration(tuple(text(3, 60, 12).sequences))
    unseen = text(4, 40, 12)
    found = {}
    for name, settings in {
        "all": {},
        "uncorrected": {"correction": False},
        "loss": {"weighting": "loss"},
    }.items():
        smaller = copy.deepcopy(model)
        compress(smaller, fit(ActivationHybrid(target_ratio=2.5, **settings), model, few))
        found[name] = distance(model, smaller, unseen)
    blind = copy.deepcopy(model)
    roles, weights = RoleMatrices(model.config, parameters_of(blind)), parameters_of(blind)
    for layer in range(2):
        for role in roles.spec.geometry(0).roles:
            w = roles.read(weights, layer, role).double()
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            rank = int(w.numel() / 2.5 / sum(w.shape))
            roles.write(weights, layer, role, ((u[:, :rank] * s[:rank]) @ v[:rank]).float())
    nothing = distance(model, blind, unseen)
    assert found["all"] < 0.6 * nothing
    assert found["loss"] < 0.6 * nothing
    assert found["all"] < found["uncorrected"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_saved_is_what_was_made_in_memory(name, tmp_path):
    model = tiny_model(name)
    original = copy.deepcopy(model)
    compressor = fit(ActivationTucker(target_ratio=1.5), model, text())
    compress(model, compressor)
    save(model, tmp_path / "saved")
    original.save_pretrained(tmp_path / "source")
    for format in ("factored", "dense"):
        target = tmp_path / format
        source = tmp_path / "source"
        task = FolderTask(source=source, target=target, compressor=compressor, format=format)
        compress_folder(task)
        again = load(target)
        assert torch.allclose(logits(again, text(1)), logits(model, text(1)), atol=1e-5)
    assert torch.allclose(
        logits(load(tmp_path / "saved"), text(1)), logits(model, text(1)), atol=1e-5
    )
    manifest = json.loads((tmp_path / "factored" / "tensorllm.json").read_text())
    assert manifest["mode"] == "activation-tucker"
    assert manifest["settings"]["calibration"]["sha256"] == text().sha256
    assert {site["kind"] for site in manifest["sites"]} == {"pivoted-low-rank"}


def test_the_fit_is_repeatable_and_settings_come_back():
    model = tiny_model("qwen3")
    first, second = (fit(ActivationTucker(target_ratio=2), model, text()) for _ in range(2))
    for one, other in zip(first.sites, second.sites, strict=True):
        assert one == other
        assert torch.equal(first.factors(one).dense(), second.factors(other).dense())
    mode, settings = settings_of(first.compressor)
    again = make_compressor(mode, settings)
    assert again == first.compressor
    with pytest.raises(UserError, match="give --calibration FILE"):
        compress(copy.deepcopy(model), again)


def test_some_layers_and_a_target_of_parameters():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    target = total - 1000
    compressor = fit(ActivationTucker(target_params=target), model, text(), layers=[1])
    report = compress(model, compressor, [1])
    assert target - 200 <= report.totals.parameters_after <= target
    assert all(site.layers == (1,) and set(site.roles) <= set(ATTENTION) for site in report.sites)
    with pytest.raises(UserError, match=r"fitted to layers \[1\]"):
        compress(tiny_model("llama"), compressor, [0, 1])


def test_sharing_can_be_forbidden():
    model = tiny_model("llama")
    one = ActivationHybrid(target_ratio=3, sharing=False, narrowing=False)
    found = fit(one, model, text())
    assert all(len(site.roles) == 1 for site in found.sites)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of target_ratio"),
        ({"target_ratio": 2.0, "target_params": 5}, "give one of target_ratio"),
        ({"target_ratio": 1.0}, "must be above 1"),
        ({"target_ratio": float("nan")}, "must be above 1"),
        ({"target_ratio": 2.0, "weighting": "loud"}, "one of loss, outputs"),
        ({"target_ratio": 2.0, "ridge": 0.0}, "ridge must be above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ActivationTucker(**settings)


def test_unfit_text_and_targets_are_refused():
    model = tiny_model("llama")
    wanted = ActivationTucker(target_ratio=2)
    with pytest.raises(UserError, match="0 tokens; matrices with 32 inputs need at least 32"):
        fit(wanted, model, Calibration(()))
    with pytest.raises(UserError, match=r"token 101, but the model knows 0\.\.100"):
        fit(wanted, model, Calibration(((101,) * 40,)))
    with pytest.raises(UserError, match=r"token -1, but the model knows 0\.\.100"):
        fit(ActivationTucker(target_ratio=2), model, Calibration(((5, 6, -1),)))
    with pytest.raises(UserError, match="sequence of 65 tokens; the model reads at most 64"):
        fit(ActivationTucker(target_ratio=2), model, Calibration(((5,) * 65,)))
    with pytest.raises(UserError, match=r"target_params must be in \d+..\d+, got 10"):
        fit(ActivationTucker(target_params=10), model, text())
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj has NaN .* batch 0"):
        fit(wanted, model, text())
    by_loss = ActivationTucker(target_ratio=2, weighting="loss")
    with pytest.raises(UserError, match="language-model head"):
        fit(by_loss, tiny_model("llama", headless=True), text())


def test_text_that_is_evaluated_too_is_refused():
    calibration = Calibration((tuple(range(200)), *text().sequences))
    calibration.refuse_overlap(
        [(1, 3, 2), tuple(range(1000, 1100)), (*range(60), *range(300, 400))]
    )
    with pytest.raises(UserError, match="1 of 2 sequences that are evaluated stand in the calib"):
        calibration.refuse_overlap([(1, 3, 2), calibration.sequences[3]])
    with pytest.raises(UserError, match="1 of 1 sequences"):  # wherever it begins
        calibration.refuse_overlap([(*range(500, 564), *range(77, 180))])


def test_a_file_becomes_sequences(tinystories, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    file = tmp_path / "stories.json"
    file.write_text(json.dumps([f"Once there was a cat number {n}." for n in range(30)]))
    found = read_calibration(file, tokenizer, sequences=8, seed=1)
    assert len(found.sequences) == 8
    assert found.sequences == read_calibration(file, tokenizer, sequences=8, seed=1).sequences
    assert found.sequences != read_calibration(file, tokenizer, sequences=8, seed=2).sequences
    assert found.facts()["source"] == "stories.json"
    plain = tmp_path / "stories.txt"
    plain.write_text("Once there was a cat. " * 40)
    assert all(len(s) <= 20 for s in read_calibration(plain, tokenizer, length=20).sequences)
    with pytest.raises(UserError, match="1 or more sequences"):
        read_calibration(plain, tokenizer, sequences=0)

"""Compressing and running mixtures: in memory, from folder to folder, in factors, by commands.

Shapes: E experts, F inner width, D model width, S matrices.
"""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressor_cases import tucker_reference
from naive_layer import TOKENS
from safetensors.torch import load_file
from tiny_models import EXPERTS, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.fit import measure_for
from tensorllm.checkpoint.loading import load
from tensorllm.compression.engine import compress, compress_folder, compression_of
from tensorllm.compression.factorize import factorize
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import ActivationExpertTucker, Compressor, ExpertTucker
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.runtime.cost import costs_of
from tensorllm.tensors.stacking import expert_role
from tensorllm_cli.app import main

LAYER = 1
every_mixture = pytest.mark.parametrize("name", EXPERTS)
STRATEGIES: dict[str, Compressor] = {
    "all modes": ExpertTucker(ranks=(4, 20, 20, 1)),
    "width": ExpertTucker(ranks=(0, 0, 20, 0)),
    "all stacked": ExpertTucker(kept=0.6, stacked="all"),
    "in alone": ExpertTucker(ranks=(3, 0, 20, 0), stacked="none", matrices=("experts.in",)),
    "svd": make_compressor("svd", {"kept": 0.5}),
    "laser": make_compressor("laser", {"rho": 0.5, "matrices": ["experts.gate", "q"]}),
}


def run(*arguments: Any) -> str:
    """A command, in this process; what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code == 0, (arguments, out.getvalue(), err.getvalue())
    return out.getvalue()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(TOKENS, use_cache=False).logits
    return out


def text(sequences: int = 4) -> Calibration:
    draws = torch.Generator().manual_seed(0)
    lengths = (20, 31, 17, 25)[:sequences]
    ids = [torch.randint(3, 101, (n,), generator=draws).tolist() for n in lengths]
    return Calibration(tuple(tuple(one) for one in ids))


@every_mixture
def test_factored_equals_dense(name: str) -> None:
    model = tiny_model(name)
    for what, strategy in STRATEGIES.items():
        edited = copy.deepcopy(model)
        compress(edited, strategy)
        want = logits(edited)
        before = {n for n, _ in edited.named_parameters()}
        factorize(edited)
        assert {n for n, _ in edited.named_parameters()} != before
        error = float((logits(edited) - want).abs().max() / want.abs().max())
        assert error < 1e-5, (what, error)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_weights_equal_tensorlys(name: str) -> None:
    """The stack built expert by expert, and partial_tucker's approximation of it."""
    model = tiny_model(name)
    roles, weights = RoleMatrices(model.config, parameters_of(model)), parameters_of(model)
    kinds = ("in", "gate")
    draws = torch.Generator().manual_seed(2)
    shape = (5, 24, 32, 2)
    planted = ExpertTucker(ranks=(4, 20, 20, 1)).decompose(torch.randn(shape, generator=draws))
    w_EFDS = planted.dense() + 0.02 * torch.randn(shape, generator=draws)
    for e in range(5):
        for s, kind in enumerate(kinds):
            roles.write(weights, LAYER, expert_role(kind, e), w_EFDS[e, :, :, s])
    ranks = {0: 4, 1: 20, 2: 20, 3: 1}
    want = tucker_reference(w_EFDS.double().numpy(), ranks)
    strategy = ExpertTucker(ranks=(4, 20, 20, 1), matrices=("experts.in", "experts.gate"), sweeps=9)
    report = compress(model, strategy, [LAYER])
    for e in range(5):
        for s, kind in enumerate(kinds):
            got = roles.read(weights, LAYER, expert_role(kind, e)).double().numpy()
            error = np.linalg.norm(got - want[e, :, :, s]) / np.linalg.norm(want[e, :, :, s])
            assert error < 1e-4, (e, kind, error)
    (site,) = report.sites
    assert site.name == "layers.1.experts.in-experts.gate"
    assert site.parameters_after == 4 * 20 * 20 + 5 * 4 + 24 * 20 + 32 * 20 + 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "glm4_moe"])
@pytest.mark.parametrize("what", ["all modes", "svd", "laser"])
def test_folders_hold_what_memory_has(name: str, what: str, tmp_path: Path) -> None:
    """Dense, factored, saved again and exported; under the names that the source has."""
    source, strategy = tmp_path / "source", STRATEGIES[what]
    model = tiny_model(name)
    model.save_pretrained(source)
    (source / "generation_config.json").unlink(missing_ok=True)
    for form in ("dense", "factored"):
        compress_folder(
            FolderTask(source=source, target=tmp_path / form, compressor=strategy, format=form)
        )
    stored = {p.name: load_file(p) for p in (tmp_path / "dense").glob("*.safetensors")}
    names = {n for tensors in stored.values() for n in tensors}
    assert names == set(load_file(source / "model.safetensors"))
    compress(model, strategy)
    want = parameters_of(model)
    for folder in ("dense", "factored"):
        found = parameters_of(load(tmp_path / folder))
        assert all(torch.equal(found[n], w) for n, w in want.items()), folder
    runs = AutoModelForCausalLM.from_pretrained(tmp_path / "factored").eval()
    torch.testing.assert_close(logits(runs), logits(model), rtol=1e-4, atol=1e-4)
    runs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(runs), rtol=1e-5, atol=1e-5)
    run("export", str(tmp_path / "again"), str(tmp_path / "exported"))
    exported = {p.name: load_file(p) for p in (tmp_path / "exported").glob("*.safetensors")}
    assert {n for tensors in exported.values() for n in tensors} == names
    generated = runs.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=2)
    dense = model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert torch.equal(generated, dense)


@every_mixture
def test_covariances_are_those_of_the_experts_own_tokens(name: str) -> None:
    """Token by token, told by hooks on the router's choice; padding is not counted."""
    model = tiny_model(name)
    roles, weights = RoleMatrices(model.config, parameters_of(model)), parameters_of(model)
    found = measure_for(ActivationExpertTucker(kept=0.5), model, text())
    experts = roles.mixtures[LAYER].experts
    module = model.get_submodule(f"{roles.layer_path(LAYER)}.{experts.path}")
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(lambda _m, args: seen.append(args))
    for sequence in text().sequences:  # one by one, so that nothing is padded
        with torch.no_grad():
            model(torch.tensor([sequence]), use_cache=False)
    hook.remove()
    for e in range(5):
        rows = []
        for x, *routing in seen:
            if name == "llama4_text":
                own = x.view(5, -1, 32)[e]
                rows += [x_D for x_D in own if bool((x_D != 0).any())]
            else:
                index = routing[0] if not routing[0].is_floating_point() else routing[1]
                rows += [x.view(-1, 32)[t] for t in range(len(index)) if e in index[t]]
        key = next(k for k in found.inputs if k[0] == LAYER and f"experts.{e}.in" in k[1])
        assert found.tokens[key] == len(rows)
        if rows:
            x_MD = torch.stack(rows).double()
            want = x_MD.mT @ x_MD / len(rows)
            torch.testing.assert_close(found.inputs[key].double(), want, rtol=1e-3, atol=1e-5)
        assert weights  # kept alive with the views


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "llama4_text"])
@pytest.mark.parametrize(
    "settings", [{"ranks": (0, 0, 20, 0)}, {"kept": 0.6}], ids=["width", "kept"]
)
def test_a_streamed_fit_is_the_one_in_memory(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, strategy = tiny_model(name), ActivationExpertTucker(**settings)
    model.save_pretrained(tmp_path / "source")
    compress_folder(
        FolderTask(
            source=tmp_path / "source",
            target=tmp_path / "out",
            compressor=strategy,
            calibration=text(),
            stream=True,
        )
    )
    compress(model, strategy, calibration=text())
    found = parameters_of(load(tmp_path / "out"))
    for n, w in parameters_of(model).items():
        torch.testing.assert_close(found[n], w, rtol=1e-3, atol=1e-4)


def test_data_lower_the_error_that_the_text_sees() -> None:
    """At the same ranks, the experts' output on the text is nearer to the original's."""
    model = tiny_model("mixtral")
    with torch.no_grad():  # inputs that vary more in some directions than in others
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(torch.logspace(0, -1.5, 32))
    batch = torch.tensor([text().sequences[1]])

    def outputs(edited: Any) -> Tensor:
        seen: list[Tensor] = []
        hook = edited.model.layers[0].mlp.experts.register_forward_hook(
            lambda _m, args, out: seen.append(out)
        )
        with torch.no_grad():
            edited(batch, use_cache=False)
        hook.remove()
        return seen[0]

    want = outputs(model)
    errors = {}
    for kind, given in ((ExpertTucker, None), (ActivationExpertTucker, text())):
        edited = copy.deepcopy(model)
        compress(edited, kind(ranks=(0, 0, 14, 0)), [0], calibration=given)
        errors[kind] = float((outputs(edited) - want).norm() / want.norm())
    assert errors[ActivationExpertTucker] < 0.7 * errors[ExpertTucker]


def test_an_expert_that_no_token_reaches_is_reported() -> None:
    model: Any = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    for mode, settings in (
        ("activation-expert-tucker", {"ranks": (0, 0, 20, 0)}),
        ("activation-expert-tucker", {"ranks": (3, 0, 20, 0)}),
        ("svd-llm", {"kept": 0.5, "matrices": ["experts.in", "experts.out"]}),
    ):
        edited = copy.deepcopy(model)
        report = compress(edited, fit(make_compressor(mode, settings), edited, text()))
        assert report.settings["calibration"]["experts_not_reached"] == {"0": [3]}
        assert all(bool(torch.isfinite(w).all()) for w in parameters_of(edited).values())
        roles, weights = RoleMatrices(model.config, parameters_of(model)), parameters_of(edited)
        old = roles.read(parameters_of(model), 0, "experts.3.in")
        left = (roles.read(weights, 0, "experts.3.in") - old).norm() / old.norm()
        assert 0.05 < float(left) < 0.95  # approximated, not emptied


@pytest.mark.parametrize(
    ("name", "mode", "settings", "said"),
    [
        ("mixtral", "expert-tucker", {"ranks": [6, 0, 0, 0]}, "experts must be in 0..5, got 6"),
        ("mixtral", "expert-tucker", {"ranks": [0, 25, 0, 0]}, "inner must be in 0..24, got 25"),
        ("mixtral", "expert-tucker", {"ranks": [1, 2]}, "four whole numbers"),
        ("mixtral", "expert-tucker", {"kept": 1.5}, r"kept must be in \(0, 1\), got 1.5"),
        ("mixtral", "expert-tucker", {"kept": 1e-4}, "kept must be .* or more for these experts"),
        ("mixtral", "expert-tucker", {}, "one of kept and ranks"),
        ("mixtral", "expert-tucker", {"kept": 0.5, "modes": ["heads"]}, "modes must be some of"),
        ("mixtral", "expert-tucker", {"kept": 0.5, "matrices": ["in"]}, "experts.in"),
        ("llama", "expert-tucker", {"kept": 0.5}, "this model has none"),
        ("mixtral", "aa-svd", {"kept": 0.5, "matrices": ["experts.in"]}, "other tokens"),
        ("llama", "svd", {"kept": 0.5, "matrices": ["experts.in"]}, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, mode: str, settings: dict[str, Any], said: str
) -> None:
    model = tiny_model(name)
    before = {n: w.clone() for n, w in parameters_of(model).items()}
    with pytest.raises(UserError, match=said):
        compress(model, make_compressor(mode, settings))
    assert all(torch.equal(w, before[n]) for n, w in parameters_of(model).items())


def test_the_cost_of_a_token_is_that_of_few_experts() -> None:
    """Factors are smaller than all experts together, and read less than two experts do."""
    model = tiny_model("mixtral")
    report = compress(model, ExpertTucker(ranks=(0, 0, 8, 0)))
    assert not any("not smaller" in site.auto for site in report.sites)
    compression = compression_of(model)
    assert compression is not None
    for done in compression.sites:
        geometry = RoleMatrices(model.config, parameters_of(model)).spec.geometry(0)
        kinds = len(done.site.families)
        dense, factored = costs_of(done.site, done.factors, geometry)
        assert dense.reads == 2 * kinds * 24 * 32
        assert factored.reads == 2 * kinds * 24 * 8 + 8 * 32


def test_a_layer_without_experts_is_passed_over_or_refused() -> None:
    model, strategy = tiny_model("qwen3_moe"), ExpertTucker(kept=0.5)
    report = compress(copy.deepcopy(model), strategy)
    assert {site.layers for site in report.sites} == {(1,)}
    assert report.missing_roles == {0: ("experts.in", "experts.gate", "experts.out")}
    with pytest.raises(UserError, match=r"layer 0 has no matrix experts\.in"):
        compress(model, strategy, [0, 1])


def test_a_target_ratio_is_met() -> None:
    blind = [(mode, None) for mode in ("expert-tucker", "svd", "laser")]
    for mode, given in (*blind, ("activation-expert-tucker", text()), ("svd-llm", text())):
        model = tiny_model("olmoe")
        spec = RoleMatrices(model.config, parameters_of(model)).spec
        settings = tl.COMPRESSORS[mode].budget_settings(spec, {})
        budget = tl.compressors.budget.Budget(target_ratio=1.6)
        report = compress(model, make_compressor(mode, settings), calibration=given, budget=budget)
        assert 1.6 <= report.ratios()["matrices_compressed"] < 1.9, mode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny mixture with the demo's words, so that the demo's questions can be asked."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("mode", ["expert-tucker", "activation-expert-tucker"])
def test_it_goes_through_the_commands(mode: str, folder: Path, tmp_path: Path) -> None:
    lines = [" ".join(["the", "of", "is"] * 20)] * 40
    (tmp_path / "text.txt").write_text("\n".join(lines))
    fitted = tl.COMPRESSORS[mode].needs != "weights"
    given = ["--calibration", str(tmp_path / "text.txt")] if fitted else []
    given += ["--allow-overlap"] if fitted else []
    at = ["compress", "--model", str(folder), "--mode", mode, *given]
    plan = json.loads(run(*at, "--set", "ranks=[0, 0, 20, 0]", "--dry-run", "--json"))
    assert len(plan["sites"]) == 2
    out = str(tmp_path / "out")
    run(*at, "--set", "kept=0.6", "--out", out, "--format", "factored")
    assert "experts" in (tmp_path / "out" / "README.md").read_text()
    asked = ["--dataset", "demo", "--limit", "8"]
    run("evaluate", "--model", out, *asked, "--out", str(tmp_path / "scores"))
    run("generate", "--model", out, "--prompt", "the of", "--max-new-tokens", "2")
    run("report", out, "--out", str(tmp_path / "page.html"))
    half = run(*at, "--target-ratio", "2", "--out", str(tmp_path / "half"), "--json")
    assert json.loads(half)["ratios"]["matrices_compressed"] >= 2
    found = run(
        "search-ranks",
        "--model",
        str(folder),
        "--mode",
        mode,
        *given,
        *asked,
        "--trials",
        "2",
        "--json",
    )
    assert json.loads(found)["trials"]["examined"] == 2

"""Experts as roles: what is read is what the module computes, in memory and in files.

Shapes: T tokens, E experts, F inner width, D model width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_layer import TOKENS
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, tiny_model
from torch import Tensor
from transformers.activations import ACT2FN

from tensorllm.compressors import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.stacking import Geometry, expert_role, family
from tensorllm.weights import stacked

every_mixture = pytest.mark.parametrize("name", EXPERTS)
LAYER = 1  # the first is dense in some
PER_EXPERT = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "glm4_moe", "minimax")


def roles_of(model: Any) -> tuple[RoleMatrices, dict[str, Tensor]]:
    weights = parameters_of(model)
    return RoleMatrices(model.config, weights), weights


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(TOKENS, use_cache=False).logits
    return out


def rewrite(roles: RoleMatrices, weights: dict[str, Tensor], scale: float = 1.0) -> None:
    for layer in range(roles.layers):
        for role in roles.spec.geometry(layer).roles:
            roles.write(weights, layer, role, scale * roles.read(weights, layer, role).clone())


@every_mixture
def test_read_then_write_keeps_logits_bit_for_bit(name: str) -> None:
    model = tiny_model(name)
    want, (roles, weights) = logits(model), roles_of(model)
    roles.check_shapes({n: tuple(w.shape) for n, w in weights.items()})
    assert roles.spec.geometry(LAYER).experts == 5
    rewrite(roles, weights)
    assert torch.equal(logits(model), want)


@every_mixture
def test_slices_are_what_the_experts_compute(name: str) -> None:
    """Each token through the experts that the module was told, by role matrices and a loop."""
    model = tiny_model(name)
    roles, weights = roles_of(model)
    experts = roles.mixtures[LAYER].experts
    module = model.get_submodule(f"{roles.layer_path(LAYER)}.{experts.path}")
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda _m, args, out: seen.append((args, out.clone())))
    logits(model)
    hook.remove()
    ((given, output),) = seen

    def matrix(kind: str, expert: int) -> Tensor:
        return roles.read(weights, LAYER, expert_role(kind, expert))

    def through(x_D: Tensor, e: int) -> Tensor:
        gate = x_D @ matrix("gate", e).T
        up = x_D @ matrix("in", e).T
        if name == "gpt_oss":  # modeling_gpt_oss.py: interleaved biases, its own gate
            gate = gate + module.gate_up_proj_bias[e, ::2]
            up = up + module.gate_up_proj_bias[e, 1::2]
            gate = gate.clamp(max=module.limit)
            hidden = gate * torch.sigmoid(gate * module.alpha)
            hidden = hidden * (up.clamp(-module.limit, module.limit) + 1)
            return hidden @ matrix("out", e) + module.down_proj_bias[e]
        return (ACT2FN[model.config.hidden_act](gate) * up) @ matrix("out", e)

    x, *routing = given
    want = torch.zeros_like(output)
    with torch.no_grad():
        if name == "llama4_text":  # every expert on its own copy of the tokens
            for row, x_D in enumerate(x):
                want[row] = through(x_D, row * 5 // len(x))
        else:
            index, shares = routing
            for t, x_D in enumerate(x):
                for e, share in zip(index[t].tolist(), shares[t], strict=True):
                    want[t] += share * through(x_D, e)
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)


@every_mixture
def test_names_in_files_lead_to_the_same_matrices(name: str, tmp_path: Path) -> None:
    """Halved role matrices in the file, reloaded, equal halved ones in memory, bit for bit."""
    model = tiny_model(name)
    before = logits(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    apart = any(".experts.3." in n for n in stored)
    assert apart == (name in PER_EXPERT or name == "ernie4_5_moe")
    roles = RoleMatrices(model.config, stored)
    roles.check_shapes({n: tuple(w.shape) for n, w in stored.items()})
    rewrite(roles, stored, scale=0.5)
    save_file(stored, file, metadata={"format": "pt"})
    rewrite(*roles_of(model), scale=0.5)
    reloaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    found = parameters_of(reloaded)
    assert all(torch.equal(found[n], w) for n, w in parameters_of(model).items())
    torch.testing.assert_close(logits(reloaded), logits(model))
    assert not torch.allclose(logits(model), before)


def test_experts_stack_as_experts_inner_width_matrices() -> None:
    model = tiny_model("mixtral")
    roles, weights = roles_of(model)
    geometry = roles.spec.geometry(LAYER)
    site = Site(
        (LAYER,), geometry.members("experts.gate") + geometry.members("experts.out"), "experts"
    )
    w_EFDS = stacked(site, roles, weights)
    assert site.shape(geometry) == tuple(w_EFDS.shape) == (5, 24, 32, 2)
    for e in range(5):
        for s, kind in enumerate(("gate", "out")):
            want_FD = roles.read(weights, LAYER, expert_role(kind, e))
            assert torch.equal(w_EFDS[e, :, :, s], want_FD)
    for role, w_FD in zip(site.roles, site.unstack(w_EFDS, geometry), strict=True):
        assert torch.equal(w_FD, roles.read(weights, LAYER, role))
    with pytest.raises(UserError, match="the same matrices of all experts"):
        Site((LAYER,), site.roles[1:], "experts").shape(geometry)


def test_an_experts_matrices_are_one_family() -> None:
    shapes = tuple((expert_role(k, e), (3, 4)) for k in ("in", "out") for e in range(2))
    geometry = Geometry(D=4, H=0, G=0, K=0, F=0, gated=False, shapes=shapes)
    assert geometry.families == ("experts.in", "experts.out")
    assert geometry.members("experts.out") == ("experts.0.out", "experts.1.out")
    assert family("shared.in") == "shared.in"
    assert (geometry.inputs("experts.0.in"), geometry.inputs("experts.0.out")) == (4, 3)


def test_a_router_without_experts_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    left = {n: tuple(w.shape) for n, w in stored.items() if ".experts.4." not in n}
    with pytest.raises(UserError, match=r"no model\.layers\.1\.mlp\.experts\.4\."):
        RoleMatrices(model.config, left).check_shapes(left)
    none = {n: s for n, s in left.items() if ".experts." not in n}
    with pytest.raises(UserError, match=r"no model\.layers\.1\.mlp"):
        RoleMatrices(model.config, none).check_shapes(none)

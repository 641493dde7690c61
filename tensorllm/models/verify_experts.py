"""Check on a tiny model that a layer's experts compute what was found of them.

The experts' module is run alone, on its inputs within the model, with one channel of one expert
changed: matrices called `in` must act linearly, those called `gate` through the activation; a
channel must reach the output through its own row of `out`; other experts' tokens must not move.
Then what a file of the model would hold is compared with what the module holds.

Shapes: E experts, F their inner width, D model width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.models.experts import Experts, routing_of, stored_experts, tokens_at_experts
from tensorllm.models.families import Match
from tensorllm.models.mixture import Mixture
from tensorllm.models.naming import stored_names
from tensorllm.models.verify import EXACT, GAIN, Mismatch, Probe, check_ffn
from tensorllm.tensors.stacking import expert_role

STEP = 0.5  # by which a channel's matrix row is changed, relative to its norm


def randomise_experts(block: nn.Module, mixture: Mixture) -> None:
    """Set weights with which every matrix of the mixture matters."""
    draws = torch.Generator().manual_seed(0)
    module: Any = block.get_submodule(mixture.experts.path)
    with torch.no_grad():
        for name in (mixture.experts.inputs, mixture.experts.outputs):
            w: Any = getattr(module, name)
            inputs = w.shape[1] if mixture.experts.transposed else w.shape[2]
            w.copy_(torch.randn(w.shape, generator=draws) * GAIN / inputs**0.5)
            bias: Any = getattr(module, f"{name}_bias", None)
            if bias is not None:
                bias.copy_(0.2 * torch.randn(bias.shape, generator=draws))


def check_mixture(call: Callable[[], Any], block: nn.Module, mixture: Mixture) -> None:
    """Raise `Mismatch` if experts or shared experts are not what was found.

    Args:
        call: runs the whole model once.
        block: the layer.
        mixture: what was found in it.
    """
    module: Any = block.get_submodule(mixture.experts.path)
    seen: list[tuple[Any, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        with torch.no_grad():
            call()
    finally:
        hook.remove()
    if not seen:
        raise Mismatch(f"{mixture.experts.path} is never run")
    with torch.no_grad():
        _Alone(module, mixture.experts, seen[0]).check()
    shared = [one for one in mixture.stored if one.experts is None]
    if shared:
        match = Match(
            "shared experts",
            tuple(replace(one, roles=tuple(map(_plain, one.roles))) for one in shared),
            tuple((_plain(r), s) for r, s in mixture.shapes if r.startswith("shared.")),
        )
        check_ffn(Probe(call, {one.path: block.get_submodule(one.path) for one in shared}), match)


def _plain(role: str) -> str:
    return role.removeprefix("shared.")


class _Alone:
    """The experts' module, run by itself on its inputs within the model."""

    def __init__(self, module: Any, experts: Experts, given: tuple[Any, ...]) -> None:
        self.module, self.experts, self.given = module, experts, given
        self.before = self.run()

    def run(self) -> Tensor:
        out: Any = self.module(*self.given)
        found: Tensor = (out[0] if isinstance(out, tuple) else out).clone()
        return found.flatten(0, -2)

    def check(self) -> None:
        if not torch.isfinite(self.before).all():
            raise Mismatch("the tiny model's experts give no finite numbers")
        self._check_products()
        used = [e for e in range(self.experts.count) if len(self._tokens(e))]
        if not used:
            raise Mismatch("no expert of the tiny model is given a token")
        for expert in (used[0], used[-1]):
            bent = {kind: self._bent(kind, expert) for kind in self.experts.inputs_in_order}
            if "gate" in bent and not bent["in"] < bent["gate"] / 2:
                raise Mismatch(
                    "what is called 'in' of the experts goes through the activation, or 'gate' "
                    "does not"
                )

    def _tokens(self, expert: int) -> Tensor:
        """Rows of the output that the expert contributes to."""
        if self.experts.routed:
            index_NK, _ = routing_of(self.given[1:])
            return (index_NK == expert).any(1).nonzero().flatten()
        each = len(self.before) // self.experts.count
        own = self.before.abs().sum(1)[expert * each : (expert + 1) * each]
        return expert * each + own.nonzero().flatten()

    def _check_products(self) -> None:
        """Check that the outputs are the router's weighted sum of the experts' own outputs."""
        x, *routing = self.given
        every_N = torch.ones(x.flatten(0, -2).shape[0], dtype=torch.bool)
        if not self.experts.routed:
            every_N = every_N[: len(every_N) // self.experts.count]
        want = torch.zeros_like(self.before)
        out_EFD = self.experts.view(getattr(self.module, self.experts.outputs), "out")
        bias: Any = getattr(self.module, f"{self.experts.outputs}_bias", None)
        for expert, _, hidden_MF in tokens_at_experts(
            self.module, self.experts, x.flatten(0, -2), routing, every_N
        ):
            product_MD = hidden_MF @ out_EFD[expert]
            rows_M = self._tokens(expert)
            if self.experts.routed:
                index_NK, weights_NK = routing_of(routing)
                rows_M, place_M = (index_NK == expert).nonzero(as_tuple=True)
                if bias is not None:
                    product_MD += weights_NK[rows_M, place_M, None] * bias[expert]
            if len(rows_M) != len(product_MD):
                raise Mismatch(f"expert {expert} reads other tokens than it is given")
            want.index_add_(0, rows_M, product_MD)
        if not torch.allclose(self.before, want, rtol=1e-3, atol=1e-4):
            raise Mismatch("the experts' outputs are not their matrices times their inputs")

    def _bent(self, kind: str, expert: int) -> float:
        """How far the output is from linear in one channel's row of this kind of matrix."""
        worst = 0.0
        out_FD = self.experts.view(getattr(self.module, self.experts.outputs), "out")[expert]
        w_FD = self.experts.view(getattr(self.module, self.experts.parameter(kind)), kind)[expert]
        rows = self._tokens(expert)
        for channel in (0, self.experts.width // 2, self.experts.width - 1):
            row_D, own_D = w_FD[channel].clone(), out_FD[channel].clone()
            change_D = STEP * row_D.roll(1)
            after = []
            for sign in (1.0, -1.0):
                w_FD[channel] = row_D + sign * change_D
                after.append(self.run())
            out_FD[channel] = 0.0
            silent = self.run()
            w_FD[channel] = row_D
            without = self.run()
            out_FD[channel] = own_D
            plus, minus = after
            moved = (plus - self.before).norm(dim=1)
            if not moved.max() > 0:
                continue  # cut off by the activation
            if set(moved.nonzero().flatten().tolist()) - set(rows.tolist()):
                raise Mismatch(f"{kind!r} of expert {expert} changes tokens of other experts")
            if (silent - without).norm() > EXACT * moved.norm():
                raise Mismatch(
                    f"channel {channel} of {kind!r} does not go through row {channel} of 'out'"
                )
            bend = (plus + minus - 2 * self.before).norm()
            worst = max(worst, float(bend / (plus - minus).norm().clamp(min=1e-9)))
        return worst


def check_files(model: Any, path: str, experts: Experts, stored: Mapping[str, Tensor]) -> None:
    """Raise `Mismatch` if a file's tensors are not the matrices that their names claim.

    Args:
        model: the tiny model.
        path: of the layer in the model.
        experts: as found in the layer.
        stored: the tensors of the model as `save_pretrained` names them.
    """
    module = model.get_submodule(f"{path}.{experts.path}")
    kept = stored_experts(experts, _path_in_files(model, path, stored), stored)
    for kind in experts.kinds:
        name = experts.parameter(kind)
        w_EFD = experts.view(getattr(module, name), kind)
        for expert in range(experts.count):
            role = expert_role(kind, expert)
            if name in kept.fused:
                there = experts.view(stored[kept.fused[name]], kind)[expert]
            elif role in kept.apart:
                whole = stored[kept.apart[role]]
                there = whole.mT if kind == "out" else whole
            else:
                raise Mismatch(f"files of the model hold no {role!r}")
            if there.shape != w_EFD[expert].shape or not torch.equal(there, w_EFD[expert]):
                raise Mismatch(f"what files of the model call {role!r} is another matrix")


def _path_in_files(model: Any, path: str, stored: Mapping[str, Tensor]) -> str:
    """The layer's path in files: transformers may rename the part before its number."""
    number = path.rpartition(".")[2]
    for known, name in stored_names(model, stored).items():
        if known.startswith(f"{path}."):
            return f"{name.partition(f'.{number}.')[0]}.{number}"
    return path

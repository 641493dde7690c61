"""Check on a tiny random model that a layer computes what a family claims.

Nothing is assumed of the attention itself (rotary embeddings, norms, windows, gates): the outputs
of one projection are changed at one position, and the effect before the output projection shows
what they are. Queries affect their own position only; keys and values affect others; values do so
linearly; and a head affects itself (its group) only. A slice is changed by rotating it in its own
plane, so that no norm over it, or over all heads, changes.

Shapes: T positions, H query heads, G key/value heads, V width of a head's values, F FFN width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.models.families import Match, geometry_of
from tensorllm.models.spec import part_of
from tensorllm.models.task import text_config_of
from tensorllm.tensors.stacking import MLA, Geometry, is_output_projection

TOKENS = (7, 41, 19, 78, 5, 63)
AT = 3  # the position that is changed; in a causal model nothing before it may move
NOTICED = 0.01  # a part moves if it moves by this share of the part that moves most
EXACT = 1e-3  # a smaller relative difference is rounding
GAIN = 0.7  # of random matrices: their scores saturate no softmax
CHANNELS = 8  # of an FFN that are tried

Edit = Callable[[Tensor], Tensor]


class Mismatch(Exception):
    """A layer does not compute what a family claims."""


def randomise(model: Any, modules: Mapping[str, nn.Module]) -> None:
    """Set weights with which every matrix matters, and no softmax is one-hot."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules.values():
            w: Any = module.weight
            fan_in = w.shape[1] if isinstance(module, nn.Linear) else w.shape[0]
            w.copy_(torch.randn(w.shape, generator=draws) * GAIN / fan_in**0.5)
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                bias.copy_(0.2 * torch.randn(bias.shape, generator=draws))
        table: Any = model.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=draws))


@dataclass
class Probe:
    """One layer of a tiny model, run repeatedly with changed outputs of its projections.

    Attributes:
        call: runs the whole model once.
        modules: of the layer, by path.
    """

    call: Callable[[], Any]
    modules: Mapping[str, nn.Module]

    def run(self, until: str, edits: Mapping[str, Edit] | None = None) -> dict[str, Any]:
        """path -> (input, output) of the layer's modules, up to and including `until`."""
        seen: dict[str, Any] = {}
        handles: list[Any] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[until] = (_flat(args[0]), _flat(module.forward(args[0])))
            raise _Reached

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
                edit = (edits or {}).get(path)
                new = None if edit is None else edit(_flat(out)).view_as(out)
                seen[path] = (_flat(args[0]), _flat(out if new is None else new))
                return new

            return hook

        for path, module in self.modules.items():
            if path == until:
                handles.append(module.register_forward_pre_hook(stop))
            else:
                handles.append(module.register_forward_hook(note(path)))
        try:
            with torch.no_grad():
                self.call()
        except _Reached:
            return seen
        finally:
            for handle in handles:
                handle.remove()
        raise Mismatch(f"{until} is never run")


class _Reached(Exception):
    pass


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).clone()


def check_attention(probe: Probe, match: Match, config: Any) -> None:
    """Raise `Mismatch` if the layer's attention is not what the match claims."""
    _Attention(probe, match, config).check()


class _Attention:
    def __init__(self, probe: Probe, match: Match, config: Any) -> None:
        self.probe, self.match = probe, match
        self.out = match.stored[-1].path
        self.geo: Geometry = geometry_of(match, None, dict(match.shapes)["o"][1])
        self.base = probe.run(self.out)
        self.inputs = self.base[self.out][0]
        if not torch.isfinite(self.inputs).all():
            raise Mismatch("the tiny model gives no finite numbers")
        self.latent = any(role in MLA for role, _ in match.shapes)
        heads = match.heads[0]
        if self.latent:
            heads = int(text_config_of(config).num_attention_heads)
        self.heads = heads or 1

    def check(self) -> None:
        for role, _ in self.match.shapes:
            check_rows(self.probe, self.match, self.geo, role, self.base)
        if self.latent:
            self._check_latent()
            return
        self._queries("q", self.heads)
        groups = self.match.heads[1]
        keys, values = self._others("k", groups), self._others("v", groups)
        first = self._first("k") < EXACT < self._first("v")
        if not first and not (values < keys / 2 or values < EXACT < keys):
            raise Mismatch("values do not go through the attention linearly, or keys do")
        if not first and keys < EXACT:
            raise Mismatch("keys go through it linearly, as in no softmax")

    def _check_latent(self) -> None:
        there = [role for role, _ in self.match.shapes]
        self._queries("q_b" if "q_b" in there else "q", self.heads)
        if "q_a" in there:
            self._queries("q_a", 1)
        self._others("kv_b", self.heads)
        self._others("kv_a", 1)

    def _queries(self, role: str, parts: int) -> None:
        for part in range(parts):
            moved_TH = self._moved(role, part, parts)
            self._check_heads(role, part, parts, moved_TH)
            if (moved_TH[torch.arange(len(moved_TH)) != AT] > NOTICED * moved_TH.max()).any():
                raise Mismatch(f"{role!r} of one position changes other positions")

    def _others(self, role: str, parts: int) -> float:
        """How far the outputs are from linear in those of the role."""
        worst = 0.0
        for part in range(parts):
            moved_TH = self._moved(role, part, parts)
            self._check_heads(role, part, parts, moved_TH)
            others = moved_TH[torch.arange(len(moved_TH)) != AT]
            if not (others > NOTICED * moved_TH.max()).any():
                raise Mismatch(f"{role!r} of one position changes that position only")
            worst = max(worst, self._bent(role, part, parts))
        return worst

    def _check_heads(self, role: str, part: int, parts: int, moved_TH: Tensor) -> None:
        per_part = self.heads // parts
        moved_H = moved_TH.amax(0)
        want = set(range(part * per_part, (part + 1) * per_part))
        got = set((moved_H > NOTICED * moved_H.max()).nonzero().flatten().tolist())
        if not moved_H.max() > EXACT:
            raise Mismatch(f"{role!r} changes nothing")
        if got != want:
            raise Mismatch(
                f"part {part} of {role!r} changes heads {sorted(got)}, not {sorted(want)}"
            )

    def _moved(self, role: str, part: int, parts: int) -> Tensor:
        """How much each head turned, (T, H), after a part of the role's outputs was changed."""
        after = self._after(role, part, parts, 1.0)
        return _turned(self.inputs, after, self.heads)

    def _bent(self, role: str, part: int, parts: int) -> float:
        plus, minus = (self._after(role, part, parts, sign) for sign in (1.0, -1.0))
        bend = (plus + minus - 2 * self.inputs).norm()
        return float(bend / (plus - minus).norm().clamp(min=1e-12))

    def _first(self, role: str) -> float:
        """How far position 0 moves with its own outputs: a softmax over one key ignores keys."""
        after = self._after(role, 0, 1, 1.0, at=0)
        return float(_turned(self.inputs, after, self.heads)[0].max())

    def _after(self, role: str, part: int, parts: int, sign: float, at: int = AT) -> Tensor:
        stored = next(one for one in self.match.stored if role in one.roles)
        rows = self.base[stored.path][1].shape[1]
        features = role_rows(stored, self.geo, role, rows).chunk(parts)[part]

        def edit(out: Tensor) -> Tensor:
            out = out.clone()
            own = out[at, features]
            out[at, features] = own + sign * (own.roll(1) - own)
            return out

        after: Tensor = self.probe.run(self.out, {stored.path: edit})[self.out][0]
        return after


def _turned(before: Tensor, after: Tensor, heads: int) -> Tensor:
    """How far each head's vector left its line, (T, H), relative to the largest vector."""
    x_THV, y_THV = (t.unflatten(1, (heads, -1)).double() for t in (before, after))
    along = (x_THV * y_THV).sum(-1, keepdim=True) / x_THV.square().sum(-1, keepdim=True).clamp(
        min=1e-30
    )
    return (y_THV - along * x_THV).norm(dim=-1) / x_THV.norm(dim=-1).max().clamp(min=1e-30)


def check_ffn(probe: Probe, match: Match) -> None:
    """Raise `Mismatch` if the layer's FFN is not what the match claims."""
    shapes = dict(match.shapes)
    geo = geometry_of(None, match, shapes["out"][1])
    path = match.stored[-1].path
    base = probe.run(path)
    before_NF = base[path][0]
    bent = {}
    for role in shapes:
        check_rows(probe, match, geo, role, base)
    for role in (role for role in shapes if role != "out"):
        bent[role] = _bent_channels(probe, match, geo, role, base, before_NF)
    if "gate" in bent and not bent["in"] < bent["gate"] / 2:
        raise Mismatch("what is called 'in' goes through the activation, or 'gate' does not")


def _bent_channels(
    probe: Probe,
    match: Match,
    geo: Geometry,
    role: str,
    base: Mapping[str, Any],
    before_NF: Tensor,
) -> float:
    """How far the inner channels are from linear in the role's; each may change only itself."""
    stored = next(one for one in match.stored if role in one.roles)
    out = base[stored.path][1]
    rows = role_rows(stored, geo, role, out.shape[1])
    step, bent, found, path = 2 * out.std(), 0.0, False, match.stored[-1].path
    for channel in torch.linspace(0, len(rows) - 1, CHANNELS).long().tolist():

        def shifted(by: Tensor, row: int = int(rows[channel])) -> Tensor:
            def edit(out: Tensor) -> Tensor:
                out = out.clone()
                out[:, row] += by
                return out

            after: Tensor = probe.run(path, {stored.path: edit})[path][0]
            return after

        plus, minus = shifted(step), shifted(-step)
        moved_F = (plus - before_NF).norm(dim=0)
        if not moved_F.max() > 0:  # cut off by the activation, or by the layer's own sparsity
            continue
        if int(moved_F.argmax()) != channel:
            inside = int(moved_F.argmax())
            raise Mismatch(f"channel {channel} of {role!r} is channel {inside} inside")
        found = True
        one, other, now = (x[:, channel] for x in (plus, minus, before_NF))
        bent = max(
            bent, float((one + other - 2 * now).norm() / (one - other).norm().clamp(min=1e-9))
        )
    if not found:
        raise Mismatch(f"{role!r} changes nothing")
    return bent


def role_rows(stored: Any, geo: Geometry, role: str, rows: int) -> Tensor:
    """Which outputs of the stored projection belong to the role, in the order of its rows."""
    numbers = torch.arange(rows)[:, None]
    whole = numbers.mT if stored.transposed else numbers
    return part_of(stored, whole, role, geo).reshape(-1)


def check_rows(
    probe: Probe, match: Match, geo: Geometry, role: str, base: Mapping[str, Any]
) -> None:
    """Check that the role's outputs are its matrix times the input.

    And that the matrix, written back as it was read, leaves the parameter unchanged.
    """
    stored = next(one for one in match.stored if role in one.roles)
    module: Any = probe.modules[stored.path]
    seen_in, seen_out = base[stored.path]
    w_IC = part_of(stored, module.weight.data, role, geo).reshape(geo.shape(role))
    features: Any = slice(None)
    if is_output_projection(role):
        want = seen_in @ w_IC
    else:
        features = role_rows(stored, geo, role, seen_out.shape[1])
        want = seen_in @ w_IC.mT
    bias = getattr(module, "bias", None)
    if bias is not None:
        want = want + bias.data[features]
    if not torch.allclose(seen_out[:, features], want, rtol=1e-3, atol=1e-4):
        raise Mismatch(f"the outputs of {role!r} are not its matrix times its input")
    before = module.weight.data.clone()
    part = part_of(stored, module.weight.data, role, geo)
    part.copy_(w_IC.clone().reshape(part.shape))
    if not torch.equal(before, module.weight.data):
        raise Mismatch(f"{role!r} read and written back is another matrix")

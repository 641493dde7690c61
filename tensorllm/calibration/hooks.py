"""Hooks that accumulate covariances of inputs and gradients while a model runs.

Shapes: N tokens of a batch, X input width, Y output width, D model width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tensorllm.calibration.covariances import Covariances, Key, Wanted, writes
from tensorllm.calibration.experts import expert_hooks, is_of_experts
from tensorllm.calibration.layers import without_bias
from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.calibration.sequences import Batch
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.tensors.unfold import add_gram, mirror

# The measured tensors of a module, for error messages.
MEASURED = {"inputs": "input", "gradients": "output's gradient", "propagated": "input's gradient"}


def module_of(model: nn.Module, roles: RoleMatrices, layer: int, role: str) -> nn.Module:
    """The module that multiplies by the role's matrix."""
    return model.get_submodule(roles.name(layer, role).removesuffix(".weight"))


def output_features(roles: RoleMatrices, layer: int, role: str) -> Tensor | slice:
    """The outputs of that module that belong to the role: all, or a part of a fused module's."""
    stored = roles.stored(layer, role)
    if len(stored.roles) == 1:
        return slice(None)
    geometry = roles.spec.geometry(layer)
    rows, columns = sum(geometry.inner(r) for r in stored.roles), geometry.shape(role)[1]
    numbers = torch.arange(rows)[:, None].expand(rows, columns).contiguous()
    whole = numbers.mT.contiguous() if stored.transposed else numbers
    return roles.read({roles.name(layer, role): whole}, layer, role)[:, 0]


class CovarianceHooks:
    """A context in which covariances of all batches are accumulated.

    Products are in float32, sums in float64.

    Args:
        model: the model to hook.
        roles: of the model.
        keys: layers, and roles of each that read the same input.
        wanted: which covariances.
        spill: a folder for the sums, as memory-mapped files; None: in memory.
        ranks: the processes of the fit.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: RoleMatrices,
        keys: Sequence[Key],
        wanted: Wanted,
        spill: Path | None = None,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.roles, self.keys = model, roles, list(keys)
        self.wanted, self.ranks = wanted, ranks
        self._sums = _Sums(spill)
        self._routed = [key for key in self.keys if is_of_experts(roles, key)]
        self._plain = [key for key in self.keys if key not in self._routed]
        self._given: dict[Key, int] = dict.fromkeys(self._routed, 0)
        self._tokens, self._gradient_tokens, self._number = 0, 0, 0
        self._batch: Batch | None = None
        self._with_gradients = False
        self._gradients: dict[tuple[int, str], Tensor] = {}
        self._propagated: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [handle for key in self._plain for handle in self._hooks(key)]
        self._handles += expert_hooks(self.model, self.roles, self._routed, self._mask, self._see)
        return self

    def __exit__(self, *problem: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, number: int, batch: Batch, *, gradients: bool = True) -> None:
        """Announce the batch that runs next, and whether it will run backwards too."""
        self._number, self._batch = number, batch
        self._with_gradients = gradients and self.wanted.gradients
        tokens = int(batch.mask_BT.sum())
        self._tokens += tokens
        self._gradient_tokens += tokens * self._with_gradients

    def add_gradients(self) -> None:
        """Add the gradients of the finished backward pass to the sums."""
        for layer, together in self._plain:
            parts = {role: self._gradients.pop((layer, role), None) for role in together}
            if self.wanted.matrices or writes(together):
                whole = [g for g in parts.values() if g is not None]
                self._add("gradients", (layer, together), torch.cat(whole, dim=1))
            if self.wanted.width and not writes(together):
                propagated = [self._across(layer, role, g) for role, g in parts.items()]
                self._add("propagated", (layer, together), torch.cat(propagated, dim=1))

    def _across(self, layer: int, role: str, gradient: Tensor | None) -> Tensor:
        """h = Wᵀ g (N, D): from the backward pass, or computed from the gradient at the output."""
        found = self._propagated.pop((layer, role), None)
        if found is not None:
            return found
        assert gradient is not None
        return gradient @ self._matrix(layer, role)

    def covariances(self) -> Covariances:
        """The means over all tokens of all processes."""
        self._fill()
        device = next(iter(self._sums.sums.values())).device
        counts = torch.tensor(
            [self._tokens, self._gradient_tokens], dtype=torch.float64, device=device
        )
        self.ranks.sum(counts)
        given = {}
        for of, count in self._given.items():
            given[of] = torch.tensor([count], dtype=torch.float64, device=device)
            self.ranks.sum(given[of])
        out = Covariances()
        for (what, *key), total in self._sums.sums.items():
            self.ranks.sum(total)
            if what != "sizes":
                mirror(total)
            of_gradients = what == "gradients" or (what == "propagated" and not writes(key[1]))
            tokens = given.get((key[0], key[1]))
            if tokens is not None:
                out.tokens[key[0], key[1]] = tokens
                getattr(out, what)[tuple(key)] = total.div_(max(1.0, float(tokens)))
                continue
            getattr(out, what)[tuple(key)] = total.div_(float(counts[int(of_gradients)]))
            if of_gradients:
                out.gradient_tokens[key[0], key[1]] = counts[1:].clone()
        return out

    def _fill(self) -> None:
        """Add zero sums for experts without tokens, on the device of the others."""
        device = next(self.model.parameters()).device
        for key in self._routed:
            width = self.roles.spec.geometry(key[0]).inputs(key[1][0])
            self._sums.add(("sizes", *key), torch.zeros(width, device=device))
            self._sums.add(("inputs", *key), torch.zeros(width, width, device=device))

    def _mask(self) -> Tensor:
        assert self._batch is not None
        return self._batch.mask_BT

    def _see(self, key: Key, x_NX: Tensor) -> None:
        """Add the inputs of an expert's roles to the sums."""
        x_NX = x_NX.float()
        self._given[key] += len(x_NX)
        self._sums.add(("sizes", *key), x_NX.abs().sum(0))
        self._add("inputs", key, x_NX)

    def _add(self, what: str, key: Key, x_NX: Tensor) -> None:
        if not torch.isfinite(x_NX).all():
            name = self.roles.name(key[0], key[1][0]).removesuffix(".weight")
            of = "output" if what == "propagated" and writes(key[1]) else MEASURED[what]
            raise UserError(
                f"the {of} of {name} has NaN or Inf in calibration batch {self._number}: the "
                "model's dtype may be too narrow, load it in float32"
            )
        self._sums.add_gram((what, *key), x_NX)

    def _matrix(self, layer: int, role: str) -> Tensor:
        name = self.roles.name(layer, role)
        module, _, last = name.rpartition(".")
        weight = getattr(self.model.get_submodule(module), last)
        return self.roles.read({name: weight.detach()}, layer, role).float()

    def _hooks(self, key: Key) -> Iterator[Any]:
        layer, together = key
        first = module_of(self.model, self.roles, layer, together[0])
        propagates = self.wanted.width and writes(together)

        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._batch is not None
            x_NX = self._batch.tokens(args[0].detach()).float()
            if self.wanted.matrices:
                self._sums.add(("sizes", *key), x_NX.abs().sum(0))
            if self.wanted.matrices or not writes(together) or together[0] in self.wanted.whole:
                self._add("inputs", key, x_NX)
            if propagates:
                y_ND = self._batch.tokens(without_bias(module, output))
                self._add("propagated", key, y_ND.float())

        yield first.register_forward_hook(see)
        for role in together * self.wanted.gradients:
            module = module_of(self.model, self.roles, layer, role)
            alone = len(self.roles.stored(layer, role).roles) == 1
            backward = self.wanted.width and not writes(together) and alone
            if backward:
                yield module.register_forward_pre_hook(self._input_hook(layer, role))
            if self.wanted.matrices or not backward:
                yield module.register_forward_hook(self._output_hook(layer, role))

    def _input_hook(self, layer: int, role: str) -> Any:
        """A hook that keeps the gradient Wᵀ g at the module's input.

        The module gets an alias of its input, whose gradient is its own share only.
        """

        def keep(gradient: Tensor) -> None:
            assert self._batch is not None
            self._propagated[layer, role] = self._batch.tokens(gradient).float()

        def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not self._with_gradients:
                return None
            alias = args[0].view_as(args[0])
            alias.register_hook(keep)
            return alias, *args[1:]

        return see_input

    def _output_hook(self, layer: int, role: str) -> Any:
        features = output_features(self.roles, layer, role)

        def keep(gradient: Tensor) -> None:
            assert self._batch is not None
            self._gradients[layer, role] = self._batch.tokens(gradient)[:, features].float()

        def see_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._with_gradients:
                output.register_hook(keep)

        return see_output


class _Sums:
    """Sums in float64 on the device of their products, or in files; symmetric ones as one half."""

    def __init__(self, spill: Path | None) -> None:
        self.spill = spill
        self.sums: dict[tuple[Any, ...], Tensor] = {}
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)

    def add(self, key: tuple[Any, ...], product: Tensor) -> None:
        total = self._sum(key, product.shape, product.device)
        total.add_(product.to(total.device))

    def add_gram(self, key: tuple[Any, ...], x_NX: Tensor) -> None:
        width = x_NX.shape[1]
        add_gram(self._sum(key, torch.Size((width, width)), x_NX.device), x_NX)

    def _sum(self, key: tuple[Any, ...], shape: torch.Size, device: torch.device) -> Tensor:
        if key not in self.sums:
            self.sums[key] = self._zeros(shape, device)
        return self.sums[key]

    def _zeros(self, shape: torch.Size, device: torch.device) -> Tensor:
        if self.spill is None:
            return torch.zeros(shape, dtype=torch.float64, device=device)
        path = self.spill / f"covariance-{len(self.sums)}.bin"
        file = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=torch.float64)
        return file.zero_().view(shape)

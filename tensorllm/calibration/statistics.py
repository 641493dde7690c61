"""Covariances of what matrices read, and of the gradients at their outputs.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X width of an input, Y of an
output, V words.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tensorllm.calibration.experts import Key, is_of_experts, watch
from tensorllm.calibration.layers import Layers
from tensorllm.calibration.sequences import Batch
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.progress import Progress, quiet


@dataclass(frozen=True, slots=True)
class Covariances:
    """Per layer and set of roles that read the same input, float64.

    Attributes:
        inputs: E[x xᵀ] of that input.
        sizes: E|x|, per number of that input.
        gradients: E[g gᵀ] over the joint outputs of its roles; empty where only inputs were
            measured, and for experts.
        tokens: that were read; an expert's are those that are routed to it.
    """

    inputs: dict[Key, Tensor]
    sizes: dict[Key, Tensor]
    gradients: dict[Key, Tensor]
    tokens: dict[Key, int]


def measure_loss(
    model: nn.Module,
    roles: RoleMatrices,
    keys: Sequence[Key],
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    spill: Path | None = None,
    progress: Progress = quiet,
) -> Covariances:
    """Gradients of the loss: one pass forward and backward through the whole model.

    Labels are drawn from the model's own predictions (seeded), so that the gradients' covariance is
    the Fisher information and no labels are needed (Martens and Grosse, arXiv 1503.05671).

    Args:
        spill: a folder in which the covariances live as files instead of in memory.

    Raises:
        UserError: activations that are not finite; names the module and the batch.
    """
    runner: Any = model
    draws = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    with CovarianceHooks(model, roles, keys, spill) as hooks, _embeddings_need_gradients(model):
        for number, batch in enumerate(batches):
            progress(number, len(batches), "measuring")
            hooks.begin(number, batch)
            mask = batch.mask_BT.long().to(device)
            out = runner(input_ids=batch.ids_BT.to(device), attention_mask=mask)
            _sampled_loss(out, batch, draws).backward()
            hooks.add_gradients()
        return hooks.means()


def measure_outputs(
    layers: Layers,
    layer: int,
    block: nn.Module,
    keys: Sequence[Key],
    hidden: Iterable[Tensor],
    *,
    seed: int = 0,
) -> Covariances:
    """Gradients of the layer's own output: forward and backward through this one layer.

    The gradient is that of the product of the layer's output with random vectors (seeded), one per
    token with a size of one over the output's. So the weight of an error is the squared change of
    the layer's output relative to its size, as the norm before the next layer sees it: how Q and K
    meet in the scores, V and O in the sum and the FFN's matrices in each other is all in it.

    Args:
        hidden: states (B, T, D) before the layer, one per batch.

    Raises:
        UserError: activations that are not finite; names the module and the batch.
    """
    draws = torch.Generator().manual_seed(seed + 7919 * layer)
    both = zip(layers.calls[layer], hidden, strict=True)
    with CovarianceHooks(layers.source.model, layers.source.roles, keys) as hooks:
        for number, (call, hidden_BTD) in enumerate(both):
            batch = layers.batches[number]
            hooks.begin(number, batch)
            with torch.enable_grad():
                out_BTD = call.run(block, hidden_BTD.detach().requires_grad_()).float()
            random_BTD = torch.randn(out_BTD.shape, generator=draws).to(out_BTD)
            size_BT1 = out_BTD.detach().norm(dim=-1, keepdim=True).clamp(min=1e-20)
            random_BTD *= batch.mask_BT.to(out_BTD.device)[..., None] / size_BT1
            out_BTD.backward(random_BTD)
            hooks.add_gradients()
        return hooks.means()


@torch.no_grad()
def measure_inputs(
    layers: Layers, layer: int, block: nn.Module, keys: Sequence[Key], hidden: Iterable[Tensor]
) -> Covariances:
    """Covariances of inputs alone: one pass forward through this one layer.

    Args and errors: as `measure_outputs`.
    """
    both = zip(layers.calls[layer], hidden, strict=True)
    model, roles = layers.source.model, layers.source.roles
    with CovarianceHooks(model, roles, keys, gradients=False) as hooks:
        for number, (call, hidden_BTD) in enumerate(both):
            hooks.begin(number, layers.batches[number])
            call.run(block, hidden_BTD)
        return hooks.means()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters, no dropout; afterwards as it was."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(training)
        for p, value in wanted.items():
            p.requires_grad_(value)


@contextmanager
def _embeddings_need_gradients(model: Any) -> Iterator[None]:
    """Gradients flow from the embeddings' output on."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def _sampled_loss(out: Any, batch: Batch, draws: torch.Generator) -> Tensor:
    """Summed cross entropy of labels that are drawn from the predictions themselves."""
    if getattr(out, "logits", None) is None:
        raise UserError(
            "weighting=loss needs a model with its language-model head, got a base model"
        )
    log_p_NV = batch.tokens(out.logits).float().log_softmax(dim=-1)
    sums_NV = log_p_NV.detach().exp().cumsum(dim=-1)
    heights_N1 = torch.rand(len(sums_NV), 1, generator=draws).to(sums_NV.device) * sums_NV[:, -1:]
    drawn_N = torch.searchsorted(sums_NV, heights_N1).flatten().clamp(max=sums_NV.shape[1] - 1)
    return nn.functional.nll_loss(log_p_NV, drawn_N, reduction="sum")


def module_of(model: nn.Module, roles: RoleMatrices, layer: int, role: str) -> nn.Module:
    """The module that multiplies by the role's matrix."""
    return model.get_submodule(roles.name(layer, role).removesuffix(".weight"))


def output_features(roles: RoleMatrices, layer: int, role: str) -> Tensor | slice:
    """Which outputs of that module are the role's: all, or its part of a fused one."""
    stored = roles.stored(layer, role)
    if len(stored.roles) == 1:
        return slice(None)
    geometry = roles.spec.geometry(layer)
    rows, columns = sum(geometry.inner(r) for r in stored.roles), geometry.shape(role)[1]
    numbers = torch.arange(rows)[:, None].expand(rows, columns).contiguous()
    whole = numbers.mT.contiguous() if stored.transposed else numbers
    return roles.read({roles.name(layer, role): whole}, layer, role)[:, 0]


class CovarianceHooks:
    """Within its context, covariances (float64) of all batches that run.

    Args:
        keys: layers, and roles of each that read the same input.
        spill: a folder in which the sums live as files instead of in memory.
        gradients: whether those of output gradients are measured too.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: RoleMatrices,
        keys: Sequence[Key],
        spill: Path | None = None,
        *,
        gradients: bool = True,
    ) -> None:
        self.model, self.roles, self.keys = model, roles, list(keys)
        self.gradients = gradients
        self._sums = _Sums(spill)
        self._number = 0
        self._tokens: dict[Key, int] = dict.fromkeys(self.keys, 0)
        self._batch: Batch | None = None
        self._gradients: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        routed = [key for key in self.keys if is_of_experts(self.roles, key)]
        plain = [key for key in self.keys if key not in routed]
        self._handles = [handle for key in plain for handle in self._hooks(key)]
        self._handles += watch(self.model, self.roles, routed, self._mask, self._see)
        return self

    def __exit__(self, *problem: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, number: int, batch: Batch) -> None:
        """Say which batch runs next."""
        self._number, self._batch = number, batch

    def _mask(self) -> Tensor:
        assert self._batch is not None
        return self._batch.mask_BT

    def add_gradients(self) -> None:
        """Count the gradients that the backward pass of this batch left."""
        for key in self._differentiated:
            g_NY = torch.cat([self._gradients.pop((key[0], role)) for role in key[1]], dim=1)
            self._sums.add(("gradient", *key), g_NY.mT @ g_NY)

    @property
    def _differentiated(self) -> list[Key]:
        """The keys whose gradients are measured: of experts only inputs are."""
        return [k for k in self.keys if self.gradients and not is_of_experts(self.roles, k)]

    def means(self) -> Covariances:
        """E[x xᵀ], E|x| and E[g gᵀ] of every key; all 0 for an expert without a token."""
        inputs, sizes, gradients = (
            {key: self._mean(what, key) for key in keys}
            for what, keys in (
                ("input", self.keys),
                ("size", self.keys),
                ("gradient", self._differentiated),
            )
        )
        return Covariances(inputs, sizes, gradients, dict(self._tokens))

    def _mean(self, what: str, key: Key) -> Tensor:
        layer, roles = key
        width = self.roles.spec.geometry(layer).inputs(roles[0])
        if not self._tokens[key]:
            return torch.zeros((width, width) if what == "input" else (width,), dtype=torch.float64)
        return self._sums.sums[what, *key].div_(self._tokens[key])

    def _see(self, key: Key, x_NX: Tensor) -> None:
        """Count what the roles of a key read."""
        x_NX = x_NX.double()
        if not torch.isfinite(x_NX).all():
            name = self.roles.name(key[0], key[1][0]).removesuffix(".weight")
            raise UserError(
                f"the input of {name} has NaN or Inf in calibration batch {self._number}"
            )
        if len(x_NX):
            self._tokens[key] += len(x_NX)
            self._sums.add(("input", *key), x_NX.mT @ x_NX)
            self._sums.add(("size", *key), x_NX.abs().sum(0))

    def _hooks(self, key: Key) -> Iterator[Any]:
        layer, cluster = key

        def see_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._batch is not None
            self._see(key, self._batch.tokens(args[0].detach()))

        first = module_of(self.model, self.roles, layer, cluster[0])
        yield first.register_forward_hook(see_input)
        for role in cluster * self.gradients:
            module = module_of(self.model, self.roles, layer, role)
            yield module.register_forward_hook(self._output_hook(layer, role))

    def _output_hook(self, layer: int, role: str) -> Any:
        features = output_features(self.roles, layer, role)

        def keep(gradient: Tensor) -> None:
            assert self._batch is not None
            self._gradients[layer, role] = self._batch.tokens(gradient)[:, features].float()

        def see_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(keep)

        return see_output


class _Sums:
    """Sums in float64, in memory or in files."""

    def __init__(self, spill: Path | None) -> None:
        self.spill = spill
        self.sums: dict[tuple[Any, ...], Tensor] = {}
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)

    def add(self, key: tuple[Any, ...], product: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = self._zeros(product.shape)
        self.sums[key].add_(product.to(self.sums[key].device, torch.float64))

    def _zeros(self, shape: torch.Size) -> Tensor:
        if self.spill is None:
            return torch.zeros(shape, dtype=torch.float64)
        path = self.spill / f"covariance-{len(self.sums)}.bin"
        file = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=torch.float64)
        return file.zero_().view(shape)

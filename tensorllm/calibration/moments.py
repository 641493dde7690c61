"""Second moments of what matrices read and of what the loss feels at their outputs, in one pass.

Shapes: B sequences, T positions, N tokens of a batch, X width of an input, Y width of an output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.calibration.groups import Key, output_width
from tensorllm.calibration.sequences import Batch
from tensorllm.errors import UserError

Progress = Callable[[int, int, str], None]


def quiet(done: int, total: int, what: str) -> None:
    """The default progress: none."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Per layer and cluster of roles, float64.

    Attributes:
        inputs: E[x xᵀ] of what the cluster reads.
        gradients: E[g gᵀ] over the joint outputs of its roles, g the gradient of one token's loss
            contributions; identity where gradients were not asked for.
    """

    inputs: dict[Key, Tensor]
    gradients: dict[Key, Tensor]

    def mean_with(self, other: "Moments") -> "Moments":
        """Halfway between two measurements."""
        return Moments(
            {key: (m + other.inputs[key]) / 2 for key, m in self.inputs.items()},
            {key: (m + other.gradients[key]) / 2 for key, m in self.gradients.items()},
        )


def module_of(model: nn.Module, roles: RoleMatrices, layer: int, role: str) -> nn.Module:
    """The module that multiplies by the role's matrix."""
    return model.get_submodule(roles.name(layer, role).removesuffix(".weight"))


def output_features(roles: RoleMatrices, layer: int, role: str) -> Tensor | slice:
    """Which outputs of that module are the role's: all, or its part of a fused one."""
    stored = roles.architecture.stored(role)
    if len(stored.roles) == 1:
        return slice(None)
    rows = sum(roles.geometry.inner(r) for r in stored.roles)
    numbers = torch.arange(rows)[:, None].expand(rows, roles.geometry.D).contiguous()
    whole = numbers.mT.contiguous() if stored.transposed else numbers
    return roles.read({roles.name(layer, role): whole}, layer, role)[:, 0]


def measure(
    model: nn.Module,
    keys: Sequence[Key],
    batches: Sequence[Batch],
    *,
    gradients: bool,
    seed: int = 0,
    spill: Path | None = None,
    progress: Progress = quiet,
) -> Moments:
    """One pass over the text: forward, and backward where gradients are asked for.

    The gradient is that of the log-probability of labels drawn from the model's own predictions
    (seeded), so its second moment is the Fisher information and no labels are needed.

    Args:
        spill: a folder in which the moments live as files instead of in memory.

    Raises:
        UserError: activations that are not finite; names the module and the batch.
    """
    roles = RoleMatrices(model.config, parameters_of(model))
    runner: Any = model if gradients else getattr(model, "base_model", model)  # no head needed
    store = _Store(spill)
    total = sum(int(batch.mask_BT.sum()) for batch in batches)
    draws = torch.Generator().manual_seed(seed)
    now, device = _Now(), next(model.parameters()).device
    handles = [h for key in keys for h in _watch(model, roles, key, store, now, gradients)]
    try:
        with _only_activations_need_gradients(model):
            for now.number, batch in enumerate(batches):
                progress(now.number, len(batches), "measuring")
                now.batch = batch
                with torch.set_grad_enabled(gradients):
                    out = runner(
                        input_ids=batch.ids_BT.to(device),
                        attention_mask=batch.mask_BT.long().to(device),
                    )
                if gradients:
                    _sampled_loss(out, batch, draws).backward()
                    for key in keys:
                        parts = [now.gradients.pop((key[0], role)) for role in key[1]]
                        g_NY = torch.cat(parts, dim=1)
                        store.add(("gradient", *key), g_NY.mT @ g_NY)
    finally:
        for handle in handles:
            handle.remove()
    inputs = {key: store.sums["input", *key].div_(total) for key in keys}
    if gradients:
        felt = {key: store.sums["gradient", *key].div_(total) for key in keys}
    else:
        felt = {
            key: torch.eye(sum(output_width(roles.geometry, role) for role in key[1])).double()
            for key in keys
        }
    return Moments(inputs, felt)


class _Now:
    """What hooks need to know of the batch that is running."""

    def __init__(self) -> None:
        self.batch = Batch(torch.empty(0), torch.empty(0))
        self.number = 0
        self.gradients: dict[tuple[int, str], Tensor] = {}


class _Store:
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
        path = self.spill / f"moment-{len(self.sums)}.bin"
        file = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=torch.float64)
        return file.zero_().view(shape)


def _watch(
    model: nn.Module, roles: RoleMatrices, key: Key, store: _Store, now: _Now, gradients: bool
) -> Iterator[Any]:
    """Hooks that add up a cluster's inputs and keep its outputs' gradients."""
    layer, cluster = key

    def see_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x_NX = now.batch.tokens(args[0].detach()).double()
        if not torch.isfinite(x_NX).all():
            name = roles.name(layer, cluster[0]).removesuffix(".weight")
            raise UserError(f"the input of {name} has NaN or Inf in calibration batch {now.number}")
        store.add(("input", *key), x_NX.mT @ x_NX)

    yield module_of(model, roles, layer, cluster[0]).register_forward_hook(see_input)
    if not gradients:
        return
    for role in cluster:
        features = output_features(roles, layer, role)

        def see_output(
            module: nn.Module,
            args: tuple[Tensor, ...],
            output: Tensor,
            role: str = role,
            features: Tensor | slice = features,
        ) -> None:
            def keep(gradient: Tensor) -> None:
                now.gradients[layer, role] = now.batch.tokens(gradient)[:, features].float()

            output.register_hook(keep)

        yield module_of(model, roles, layer, role).register_forward_hook(see_output)


@contextmanager
def _only_activations_need_gradients(model: Any) -> Iterator[None]:
    """Gradients flow from the embeddings' output on; none are computed for parameters."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_() if torch.is_grad_enabled() else None
    )
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        handle.remove()
        model.train(training)
        for p, value in wanted.items():
            p.requires_grad_(value)


def _sampled_loss(out: Any, batch: Batch, draws: torch.Generator) -> Tensor:
    """Summed cross entropy of labels that are drawn from the predictions themselves."""
    if getattr(out, "logits", None) is None:
        raise UserError("calibration needs a model with its language-model head, got a base model")
    log_p_NV = batch.tokens(out.logits).float().log_softmax(dim=-1)
    sums_NV = log_p_NV.detach().exp().cumsum(dim=-1)
    heights_N1 = torch.rand(len(sums_NV), 1, generator=draws).to(sums_NV.device) * sums_NV[:, -1:]
    drawn_N = torch.searchsorted(sums_NV, heights_N1).flatten().clamp(max=sums_NV.shape[1] - 1)
    return nn.functional.nll_loss(log_p_NV, drawn_N, reduction="sum")

"""Factors held temporarily as linear layers, which adapters such as LoRA (peft) recognise.

A site module may multiply its parameters in any way: by slices, transposed, in batches. Adapters
only know linear layers, and replace them. So the values of a parameter move into a linear layer,
and the parameter becomes this layer's output for the unit vectors, including any adapter added to
it. Every kind of factors thus supports every adapter that is linear in its input.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from tensorllm.errors import UserError
from tensorllm.runtime.install import factors_of
from tensorllm.runtime.one_token import OneTokenLinear
from tensorllm.runtime.sites import SiteModule, TransposedLinear, linear


class LinearParametrization(nn.Module):
    """A parametrization that holds a parameter's values in a linear layer without a bias.

    As a matrix (all modes but the last, the last), transposed if that needs fewer unit vectors.
    """

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        matrix = held.detach().flatten(0, -2)
        self.shape, self.transposed = held.shape, matrix.shape[0] < matrix.shape[1]
        self.linear = linear(matrix.mT if self.transposed else matrix)

    def forward(self, nothing: Tensor) -> Tensor:
        del nothing
        inner: nn.Module = self.linear
        if type(inner) is OneTokenLinear:
            weight = inner.weight
        else:
            like = next(inner.parameters())
            unit = torch.eye(min(self.shape.numel() // self.shape[-1], self.shape[-1])).to(like)
            weight = inner(unit).mT
        return (weight.mT if self.transposed else weight).reshape(self.shape)

    def right_inverse(self, held: Tensor) -> Tensor:
        """The tensor stored in the parameter's own place: an empty one."""
        return held.new_empty(0)


def factors_as_linears(model: nn.Module) -> list[str]:
    """Let adapters find every factor of a factored model, in place.

    Call it each time before adapters are created or loaded, and give peft the names:
    `peft.LoraConfig(target_modules=tl.factors_as_linears(model))`. Nothing else changes: the logits
    are the same, and the model is saved as before once adapters are merged. Vectors, such as the
    weights of a CP decomposition, and parameters that require no gradients stay as they are.

    Returns:
        The names of the linear layers that hold factors.

    Raises:
        UserError: the model has no factors, or quantised ones of a kind without linear layers.
    """
    owners = factors_of(model)
    if not owners:
        raise UserError("this model has no factors to adapt; load a factored folder")
    for owner in owners:
        for module in owner.modules():
            if isinstance(module, SiteModule):
                _open(module)
    held = {id(m) for owner in owners for m in owner.modules()}
    kinds = nn.Linear | TransposedLinear
    return [n for n, m in model.named_modules() if id(m) in held and isinstance(m, kinds)]


def _open(site: SiteModule) -> None:
    steps: Any = getattr(site, "parametrizations", {})  # set by torch, if any
    quantised = any(
        not isinstance(step, LinearParametrization) for each in steps.values() for step in each
    )
    if quantised:
        raise UserError(
            f"quantised factors of {type(site).__name__} take no adapters: adapt the folder that "
            "was quantised, or train embeddings and norms"
        )
    for name, held in list(site.named_parameters(recurse=False)):
        if held.ndim > 1 and held.numel() and held.requires_grad:
            register_parametrization(site, name, LinearParametrization(held), unsafe=True)


def has_linear_factors(model: nn.Module) -> bool:
    """Whether some of a model's factors are held as linear layers for adapters."""
    return any(isinstance(module, LinearParametrization) for module in model.modules())


def as_parameters(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state by the names its parameters had before `factors_as_linears`.

    Raises:
        UserError: an adapter has not been merged.
    """
    out = dict(state)
    for below, name, parametrization in _parametrizations(model):
        if type(parametrization.linear) is not OneTokenLinear:
            raise UserError(
                "adapters stand beside the factors still: merge them first (merge_and_unload), or "
                "save them alone, by peft's own save_pretrained"
            )
        start = f"{below}parametrizations.{name}."
        weight = out.pop(f"{start}0.linear.weight")
        out.pop(f"{start}original")
        out[f"{below}{name}"] = (
            (weight.mT if parametrization.transposed else weight)
            .reshape(parametrization.shape)
            .contiguous()
        )
    return out


def _parametrizations(model: nn.Module) -> Iterator[tuple[str, str, LinearParametrization]]:
    """Path of the site with a trailing dot, parameter name and parametrization of each."""
    for path, module in model.named_modules():
        if isinstance(module, LinearParametrization):
            site, _, rest = path.rpartition("parametrizations.")
            yield site, rest.partition(".")[0], module

"""Factors in 8 or 4 bits, with a scale for every 64 numbers.

Groups run along the first mode, the one that products sum over or the largest. Rounding is
torchao's; dequantisation is a single product, so a folder of such factors opens without torchao.

Shapes: N the size of the first mode, Y its groups, ... the other modes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from tensorllm.errors import UserError
from tensorllm.progress import silenced
from tensorllm.tensors.factors import FACTORS, Factors
from tensorllm.tensors.weighted import Metric
from tensorllm.tensors.whole import Whole

GROUP = 64
SMALLEST = 1024  # smaller tensors are not quantised: there is nothing to gain
BITS = {"int8": 8, "int4": 4}
PARTS = ("values", "scales", "rest")
DAMPING = 1e-2  # of the mean of a metric's diagonal, as in GPTQ
LAZY = 64  # columns per lazy batch
TINY = torch.finfo(torch.float32).smallest_normal  # the smallest scale, as in torchao


@dataclass(frozen=True, eq=False)
class Quantised(Factors):
    """Quantised factors of the kind `inner`: `t` is stored as `t_values` and `t_scales`.

    Two 4-bit rows are packed into a byte; the last of an odd number of rows is `t_rest`.
    """

    stored: dict[str, Tensor]
    inner: ClassVar[type[Factors]]
    how: ClassVar[str]

    @property
    def kind(self) -> str:
        return f"{self.how}-{FACTORS.name_of(self.inner)}"

    def plain(self) -> Factors:
        found = {}
        for name in self.stored:
            short, _, part = name.rpartition("_")
            if part == "values":
                found[short] = dequantise(*self.quantised_parts(short).values())
            elif part not in PARTS:
                found[name] = self.stored[name]
        return self.inner.from_tensors(found)

    def quantised_parts(self, name: str) -> dict[str, Tensor]:
        names = (f"{name}_{part}" for part in PARTS)
        return {name: self.stored[name] for name in names if name in self.stored}

    def dense(self) -> Tensor:
        return self.plain().dense()

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.stored)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(dict(tensors))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain().shape

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.plain().ranks


@cache  # one class per kind, so that types compare equal
def quantised_kind(inner: type[Factors], how: str) -> type[Quantised]:
    """The class of factors of the kind `inner` in `int8` or `int4`."""
    name = f"{how.capitalize()}{inner.__name__}"
    return type(name, (Quantised,), {"inner": inner, "how": how})


def kind_named(name: str) -> type[Factors]:
    """The class of the kind stored as `name`: a registered one, or its quantised form.

    Raises:
        UserError: no such kind; it may belong to a plugin that was not imported.
    """
    how, _, inner = name.partition("-")
    if how in BITS and name not in FACTORS:
        return quantised_kind(FACTORS[inner], how)
    return FACTORS[name]


def quantise(factors: Factors, how: str) -> Factors:
    """The factors, of any kind, in `int8` or `int4`.

    Raises:
        UserError: another `how`, factors that are already quantised, or a kind with tensor names
            that clash with those of the quantised form.
    """
    if how not in BITS:
        raise UserError(f"--quantize must be one of {', '.join(BITS)}, got {how!r}")
    tensors = factors.tensors()
    wrong = [name for name in tensors if name.rpartition("_")[2] in PARTS]
    if factors.plain() is not factors or wrong:
        why = f": its tensor is named {wrong[0]!r}" if factors.plain() is factors else ""
        raise UserError(f"factors of kind {factors.kind!r} cannot be quantised{why}")
    stored: dict[str, Tensor] = {}
    for short, t in tensors.items():
        if _is_rounded(t):
            parts = quantise_tensor(t, BITS[how])
            stored |= {f"{short}_{p}": x for p, x in zip(PARTS, parts, strict=False)}
        else:
            stored[short] = t
    return quantised_kind(type(factors), how).from_tensors(stored)


def shapes_held(factors: Factors, bits: int | None) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name -> shape and bytes per number of the stored form of factors; needs no values.

    Args:
        factors: in floating point; may be on the meta device.
        bits: 8 or 4; None: not quantised.
    """
    out: dict[str, tuple[tuple[int, ...], int]] = {}
    for short, t in factors.tensors().items():
        shape, width = tuple(t.shape), t.element_size()
        if bits is None or not _is_rounded(t):
            out[short] = shape, width
            continue
        size, *others = shape
        held = {
            "values": (size if bits == 8 else size // 2, 1),
            "scales": (-(-size // GROUP), width),
        }
        if bits == 4 and size % 2:
            held["rest"] = (1, 1)
        out |= {f"{short}_{part}": ((n, *others), each) for part, (n, each) in held.items()}
    return out


def _is_rounded(t: Tensor) -> bool:
    return t.is_floating_point() and t.ndim > 1 and t.numel() >= SMALLEST


class Compensation(NamedTuple):
    """How the rounding error of one column of a matrix is compensated by the others (GPTQ).

    Shapes: D columns, in order of decreasing cost of their errors.

    Attributes:
        order_D: the indices of the columns.
        root_DD: upper triangular; Rᵀ R is the inverse of the metric of their errors.
    """

    order_D: Tensor
    root_DD: Tensor


def compensation(metric_DD: Tensor) -> Compensation:
    """From the metric M (symmetric, positive semidefinite) by which errors E cost tr(E M Eᵀ)."""
    order_D = metric_DD.diagonal().argsort(descending=True)
    ordered_DD = metric_DD[order_D][:, order_D]
    inverse_DD = torch.cholesky_inverse(Metric(ordered_DD, DAMPING).root.double())
    return Compensation(order_D, torch.linalg.cholesky(inverse_DD, upper=True).float())


def quantised_whole(w: Tensor, how: str, by: Compensation) -> Factors:
    """A matrix (I, D) in `int8` or `int4`, rounded so that its error E has a small tr(E M Eᵀ).

    Columns are rounded one at a time, the most costly first, and the error of each is compensated,
    as far as the metric M allows, by those still to come: GPTQ (Frantar et al., arXiv 2210.17323,
    Algorithm 1; OBS, Hassibi and Stork 1993), with its lazy batches, which update the later columns
    with one product for every `LAZY` columns. With the covariance of the inputs as the metric, this
    is the error of the outputs; for a matrix that writes to D, the covariance of the output
    gradients does the same on the other side.
    """
    whole = Whole(w)
    if not _is_rounded(w):
        return quantise(whole, how)
    root_DD = by.root_DD
    left_DI = w.float().mT[by.order_D].contiguous()  # the columns yet to be rounded, as rows
    for start in range(0, len(left_DI), LAZY):
        here_BI, later_XI = left_DI[start : start + LAZY], left_DI[start + LAZY :]
        root_BB = root_DD[start : start + LAZY, start : start + LAZY]
        lost_BI = torch.empty_like(here_BI)
        for place, w_I in enumerate(here_BI):
            lost_BI[place] = (w_I - rounded_column(w_I, BITS[how])) / root_BB[place, place]
            here_BI[place + 1 :].addr_(root_BB[place, place + 1 :], lost_BI[place], alpha=-1)
        later_XI.addmm_(root_DD[start : start + LAZY, start + LAZY :].mT, lost_BI, alpha=-1)
    changed_DI = torch.empty_like(left_DI)
    changed_DI[by.order_D] = left_DI
    # Each column is unchanged since it was rounded, so rounding it again gives the same.
    return quantise(Whole(changed_DI.mT), how)


def rounded_column(w_I: Tensor, bits: int) -> Tensor:
    """A column (I,) after `quantise_tensor` and dequantisation, in few operations.

    It is called for every column of a matrix, one after the other.
    """
    most = 2 ** (bits - 1)
    groups = pad(w_I, (0, -len(w_I) % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(1, keepdim=True).div_(most - 0.5).clamp_(min=TINY)
    # The largest number of a group is a tie: multiplying by 1 / scale breaks it as torchao does.
    rounded = (groups * (1.0 / scales)).round_().clamp_(-most, most - 1).mul_(scales)
    return rounded.view(-1)[: len(w_I)]


def quantise_tensor(t: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Values and scales of a tensor (N, ...): symmetric, rounded to nearest by torchao."""
    rounding = _torchao()
    size = len(t)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    padded = -(-size // GROUP) * GROUP
    flat = torch.zeros(padded, t[0].numel(), device=t.device)  # padding with zeros changes no scale
    flat[:size] = t.float().flatten(1)
    rows = flat.mT.contiguous()
    limits = {"quant_min": low, "quant_max": high}
    scales, zeros = rounding.choose_qparams_affine(
        rows, rounding.MappingType.SYMMETRIC, (1, GROUP), torch.int8, **limits
    )
    values = rounding.quantize_affine(rows, (1, GROUP), scales, zeros, torch.int8, **limits)
    values_N = values.mT[:size].reshape(t.shape).contiguous()
    scales_Y = scales.view(len(rows), -1).mT.reshape(-1, *t.shape[1:]).contiguous()
    if bits == 8:
        return values_N, scales_Y
    half = size // 2
    packed = (values_N[:half] & 15) | (values_N[half : 2 * half] << 4)
    rest = (values_N[2 * half :].clone(),) if size % 2 else ()
    return packed.view(torch.uint8), scales_Y, *rest


def _torchao() -> Any:
    try:
        with silenced("torchao"):  # it reports missing GPU libraries
            return import_module("torchao.quantization.quant_primitives")
    except ImportError:
        raise UserError("quantising needs torchao; pip install 'tensorllm[quant]'") from None


def dequantise(values: Tensor, scales: Tensor, rest: Tensor | None = None) -> Tensor:
    """The numbers that values and scales stand for, in the dtype of the scales."""
    if values.dtype == torch.uint8:
        signed = values.view(torch.int8)
        pair = [(signed << 4) >> 4, signed >> 4]
        values = torch.cat(pair if rest is None else [*pair, rest])
    whole = len(values) // GROUP * GROUP
    head = values[:whole].unflatten(0, (-1, GROUP)) * scales[: whole // GROUP, None]
    if whole == len(values):
        return head.flatten(0, 1)
    return torch.cat([head.flatten(0, 1), values[whole:] * scales[-1]])

"""Modules for low-rank factors of matrices, plain and pivoted.

Shapes: I rows of all roles, D model width, R rank, X = I - R mixed rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensorllm.compressors.layer import Site
from tensorllm.runtime import ordering
from tensorllm.runtime.ordering import Moves, as_rows, columns_of, expanded, orders_of, rows_of
from tensorllm.runtime.products import Product, Setting, decodes, setting, times
from tensorllm.runtime.sites import (
    PROMPT,
    SHORT,
    STREAMED,
    THIN_PRODUCTS,
    Cost,
    Held,
    Order,
    SiteModule,
    TransposedLinear,
    held_by,
    linear,
    runs,
)
from tensorllm.tensors.factors import Factors, LowRank, parameters
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.shared_input import ROWS_STACKINGS
from tensorllm.tensors.stacking import ATTENTION_ROLES, Geometry, is_output_projection

INPUT_MOVES, ATTENTION_MOVES, OUTPUT_MOVES = Moves(1, 2), Moves(3, 2), Moves(3, 1)
FEW = 32  # up to so many tokens, a product with transposed weights is slower


@runs(LowRank, "matrix")
class LowRankSite(SiteModule):
    """Two ordinary linear layers, which LoRA and quantisation recognise."""

    half_precision_reads = (1.4, 0.65)

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        stored = parameters(factors)
        return Cost(int(SHORT * stored), 2, stored)

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        ((layer, role),) = site.matrices
        low_rank: Any = factors  # of the kind that this is registered for
        u_IR, v_RD = low_rank.u_IR, low_rank.v_RO
        output = is_output_projection(role)
        pair = (u_IR.mT, v_RD.mT) if output else (v_RD, u_IR)
        # Older folders do not store those of output projections transposed.
        order: Order = None if low_rank.transposed == output else (1, 0)
        names = ("0.weight", "1.weight") if output else ("1.weight", "0.weight")
        held = {stored: (n, order) for stored, n in zip(factors.tensors(), names, strict=True)}
        return {(layer, role): Held(nn.Sequential(*map(linear, pair)), held)}


@runs(PivotedLowRank, "matrix", *ROWS_STACKINGS)
class PivotedSite(SiteModule):
    """R rows of the stacked matrix, and the others as linear combinations of them.

    Matrices are held as (inputs, outputs), so that decoding a token reads consecutive rows.
    """

    basis: TransposedLinear
    mix: TransposedLinear
    rows_R: Tensor
    made_I: Tensor  # all rows in the order of computation, and the place of each in it
    places_I: Tensor
    margin = 1.0  # if not predicted to be slower, it saves memory
    half_precision_reads = (0.65, 1.07)

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        self.mixes = factors.ranks[0] < sum(self.sizes)  # else all rows are chosen ones
        for name in ("made_I", "places_I"):
            self.register_buffer(name, None, persistent=False)  # until the rows are loaded
        self._step: TokenStep | None = None

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        kind = PivotedOutput if is_output_projection(site.roles[0]) else PivotedInputs
        return held_by(kind, site, factors, geometry)

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """Two products, and putting the rows in order."""
        stored, (rank,) = parameters(factors), factors.ranks
        reads = int(STREAMED * stored)
        rows = sum(geometry.inner(role) for _, role in site.matrices)
        if rank == rows:
            return Cost(reads, 1, stored)
        moves = 2 if site.roles[0] in ATTENTION_ROLES else 1
        beside = min(moves_of(site.roles[0]).costs(rows, rank, PROMPT, fast=True)) // PROMPT
        return Cost(reads, 3, stored, moves * rows, THIN_PRODUCTS + beside)

    def finish(self) -> None:
        """Find the place of each row, once the indices of the chosen rows are loaded."""
        self._step = None
        if self.rows_R.is_meta:
            return
        self.rows_R = self.rows_R.clone()  # else it keeps the mapped file in memory
        self.made_I, self.places_I = orders_of(self.rows_R, sum(self.sizes))

    def __getstate__(self) -> dict[str, Any]:
        """The state without `_step`, which refers to these very weights."""
        return {**self.__dict__, "_step": None}

    def step(self, x: Tensor) -> Product | None:
        """A function from x (..., I) to outputs (..., O), if x has one or a few tokens to decode.

        None: x has more tokens, a compiler traces, gradients are recorded, a linear layer has an
        adapter, or weights are dequantised for each use. Look-ups of attributes take as long as the
        products here, as reading weights evicts everything else from the cache. So there are few of
        them, of dictionaries and of members implemented in C.
        """
        size, width = x.numel(), x.shape[-1]
        if (
            size > FEW * width
            or torch.is_grad_enabled()
            or type(x) is not Tensor  # such as in `torch.export`
            or torch.compiler.is_dynamo_compiling()
        ):
            return None
        held = self._step
        if held is not None:
            basis, mix, places, where, run = held
            modules: Any = self._modules
            if (
                modules["basis"]._parameters.get("weight") is basis
                and modules["mix"]._parameters.get("weight") is mix
                and (basis.data_ptr(), mix.data_ptr()) == places
                and x.dtype is where.dtype
                and torch.get_num_threads() == where.threads
                and (size == width) is where.alone
            ):
                return run
        where = setting(x)
        held = self._made(where)
        self._step = None if where is None else held
        return None if held is None else held.run

    def uncached(self, x: Tensor) -> Product | None:
        """As `step`, but not cached, for recorded gradients, changing weights or a compiler."""
        made = self._made(None) if decodes(x) or is_few(x) else None
        return None if made is None else made.run

    def _made(self, where: Setting | None) -> "TokenStep | None":
        kinds = type(self.basis), type(self.mix)
        held = kinds[0] is TransposedLinear and kinds[1] in (TransposedLinear, nn.ParameterDict)
        if not held and (where is not None or self.is_adapted()):
            return None
        basis, mix = self.basis.weight, self.mix.weight  # read once: it may be dequantised
        mixed = times(mix, where) if self.mixes else None
        run = self._through(times(basis, where), mixed)
        places = (0, 0) if where is None else (basis.data_ptr(), mix.data_ptr())
        return TokenStep(basis, mix, places, where, run)

    def _through(self, first: Product, mixed: Product | None) -> Product:
        """The function for `step` and `uncached`, from the products with both matrices.

        `mixed` None: all rows are chosen ones.
        """
        raise NotImplementedError

    def is_adapted(self) -> bool:
        """Whether a linear layer has been replaced, such as by one with LoRA."""
        return not all(isinstance(module, TransposedLinear) for module in (self.basis, self.mix))


class TokenStep(NamedTuple):
    """How one or a few tokens run through both matrices of a site, in one setting.

    Attributes:
        basis, mix: the parameters.
        places: their addresses in memory.
        where: the setting; None: for a single use.
        run: the function.
    """

    basis: Tensor
    mix: Tensor
    places: tuple[int, int]
    where: Any
    run: Product


class PivotedInputs(PivotedSite):
    """Input projections: outputs of the chosen rows are the latents from which others are mixed.

    All roles read the same input, so the first role that runs computes the outputs of all.
    """

    names = {  # noqa: RUF012
        "basis": ("basis.weight", (1, 0)),  # in older folders, not transposed
        "mix": ("mix.weight", (1, 0)),
        "basis_t": ("basis.weight", None),
        "mix_t": ("mix.weight", None),
        "rows": ("rows_R", None),
    }

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        self.in_attention = site.roles[0] in ATTENTION_ROLES
        self.moves = moves_of(site.roles[0])
        self._held: tuple[Tensor, Sequence[Tensor], int] | None = None

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        held = self._held
        if held is None or held[0] is not x:
            run, readers = self.step(x), len(self.sizes)
            if run is None:
                made = self._outputs(x)
                if readers == 1 or _merges_equal_products():
                    return made[index]
            elif readers == 1:
                return run(x)
            else:
                made = run(x).split_with_sizes(self.sizes, -1)
            held = (x, made, readers)
        self._held = None if held[2] == 1 else (held[0], held[1], held[2] - 1)
        return held[1][index]

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        """The outputs (..., I) of each role."""
        if (run := self.uncached(x)) is not None:
            return run(x).split_with_sizes(self.sizes, -1)
        if not self.mixes:
            return self.basis(x).split(self.sizes, dim=-1)
        if self.is_adapted():
            z_NR = self.basis(x.flatten(0, -2))
            return self._in_order(torch.cat([z_NR.mT, self.mix(z_NR).mT]), x.shape[:-1])
        lead, basis_DR, mix_RX = x.shape[:-1], self.basis.weight, self.mix.weight
        x_ND, (rank, features) = as_rows(x), (len(self.rows_R), len(self.places_I))
        if ordering.by_columns(x):
            y_NI = x_ND.new_empty(len(x_ND), features)
            torch.mm(x_ND, basis_DR, out=y_NI[:, :rank])
            torch.mm(y_NI[:, :rank], mix_RX, out=y_NI[:, rank:])
            y_NI = columns_of(y_NI, self.places_I)
        elif ordering.by_factor(x, features, rank, self.moves):
            y_NI = functional.linear(x_ND @ basis_DR, expanded(mix_RX.mT, self.places_I))
        else:
            return self._in_order(latent_and_mixed(x_ND, basis_DR, mix_RX), lead)
        return y_NI.view(*lead, -1).split(self.sizes, dim=-1)

    def _through(self, first: Product, mixed: Product | None) -> Product:
        if mixed is None:
            return lambda x: first(as_rows(x)).view(*x.shape[:-1], -1)
        places_I, cat = self.places_I, torch.cat

        def run(x: Tensor) -> Tensor:
            z_NR = first(as_rows(x))
            y_NI = columns_of(cat((z_NR, mixed(z_NR)), 1), places_I)
            return y_NI.view(*x.shape[:-1], -1)

        return run

    def _in_order(self, made_IN: Tensor, lead: torch.Size) -> Sequence[Tensor]:
        """The outputs (..., I) of each role, from those in the order in which they are computed.

        They are held transposed, a row per output: on a CPU rows are reordered up to a hundred
        times faster than columns. Elementwise functions get views; attention kernels need each
        token's numbers contiguous.
        """
        y_IN = rows_of(made_IN, self.places_I)
        if self.in_attention:
            return y_IN.mT.contiguous().view(*lead, -1).split(self.sizes, dim=-1)
        return [y.mT.view(*lead, -1) for y in y_IN.split(self.sizes)]


class PivotedOutput(PivotedSite):
    """An output projection, stacked transposed: mixed inputs are added to the chosen ones."""

    names = {  # noqa: RUF012
        "basis": ("basis.weight", None),
        "mix": ("mix.weight", None),
        "rows": ("rows_R", None),
    }

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        if (run := self.step(x) or self.uncached(x)) is not None:
            return run(x)
        if not self.mixes:
            return self.basis(x)
        lead, x_NI, rank = x.shape[:-1], as_rows(x), len(self.rows_R)
        if self.is_adapted():
            x_NI = x_NI.mT.contiguous().index_select(0, self.made_I).mT
            return self.basis(x_NI[:, :rank] + self.mix(x_NI[:, rank:])).view(*lead, -1)
        basis_RD, mix_XR = self.basis.weight, self.mix.weight
        if ordering.by_columns(x):
            x_NI = columns_of(x_NI, self.made_I)
            z_NR = torch.addmm(x_NI[:, :rank], x_NI[:, rank:], mix_XR)
        elif ordering.by_factor(x, len(self.made_I), rank, OUTPUT_MOVES):
            z_NR = x_NI @ expanded(mix_XR, self.places_I)
        else:
            x_IN = rows_of(x_NI.mT.contiguous(), self.made_I)
            first = x_IN[:rank].addmm_ if ordering.can_write_in_place() else x_IN[:rank].addmm
            z_NR = first(mix_XR.mT, x_IN[rank:]).mT
        return (z_NR @ basis_RD).view(*lead, -1)

    def _through(self, first: Product, mixed: Product | None) -> Product:
        if mixed is None:
            return lambda x: first(as_rows(x)).view(*x.shape[:-1], -1)
        made_I, sizes = self.made_I, (len(self.rows_R), len(self.made_I) - len(self.rows_R))

        def run(x: Tensor) -> Tensor:
            x_NR, x_NX = columns_of(as_rows(x), made_I).split_with_sizes(sizes, 1)
            return first(mixed(x_NX).add_(x_NR)).view(*x.shape[:-1], -1)

        return run


def moves_of(role: str) -> Moves:
    """What putting rows of a role's matrix in order copies."""
    if is_output_projection(role):
        return OUTPUT_MOVES
    return ATTENTION_MOVES if role in ATTENTION_ROLES else INPUT_MOVES


def _merges_equal_products() -> bool:
    """Whether a compiler will merge equal products."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_few(x: Tensor) -> bool:
    """Whether x (..., I) has so few tokens that weights are better multiplied untransposed.

    Never in a graph, which must work for any number of tokens.
    """
    return not torch.compiler.is_compiling() and x.numel() <= FEW * x.shape[-1]


def latent_and_mixed(x_ND: Tensor, basis_DR: Tensor, mix_RX: Tensor) -> Tensor:
    """(I, N): the chosen outputs above the mixed ones; without a copy if possible."""
    rank, mixed = mix_RX.shape
    if not ordering.can_write_in_place():
        z_RN = (x_ND @ basis_DR).mT
        return torch.cat([z_RN, mix_RX.mT @ z_RN])
    y_IN = x_ND.new_empty(rank + mixed, len(x_ND))
    torch.mm(basis_DR.mT, x_ND.mT, out=y_IN[:rank])
    torch.mm(mix_RX.mT, y_IN[:rank], out=y_IN[rank:])
    return y_IN

"""Low-rank factors of matrices as modules: plain, and pivoted.

Shapes: I rows of all roles, D model width, R rank, X = I - R rows that are mixed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorllm.compressors.layer import Site
from tensorllm.runtime.products import Product, Setting, decodes, setting, times
from tensorllm.runtime.sites import (
    MOVE,
    SHORT,
    STREAMED,
    Cost,
    Held,
    Order,
    SiteModule,
    TurnedLinear,
    held_by,
    linear,
    runs,
)
from tensorllm.tensors.factors import Factors, LowRank, parameters
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.shared_input import ROWS_STACKINGS
from tensorllm.tensors.stacking import ATTENTION_ROLES, Geometry, is_output_projection

FEW = 32  # tokens up to which a product with the weights transposed is slower than one as they lie


@runs(LowRank, "matrix")
class LowRankSite(SiteModule):
    """Two ordinary linears, so that LoRA and quantisation find what they know."""

    narrow_reads = 1.4

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        stored = parameters(factors)
        return Cost(int(SHORT * stored), 2, stored)

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        ((layer, role),) = site.matrices
        u_IR, v_RD = factors.tensors()["u"], factors.tensors()["v"]
        if is_output_projection(role):
            pair, names = (u_IR.mT, v_RD.mT), ("0.weight", "1.weight")
        else:
            pair, names = (v_RD, u_IR), ("1.weight", "0.weight")
        order: Order = (1, 0) if is_output_projection(role) else None
        held = {stored: (name, order) for stored, name in zip("uv", names, strict=True)}
        return {(layer, role): Held(nn.Sequential(*map(linear, pair)), held)}


@runs(PivotedLowRank, "matrix", *ROWS_STACKINGS)
class PivotedSite(SiteModule):
    """R rows of the stacked matrix as they are, the others as combinations of them.

    Its matrices are held as (inputs, outputs): a token that is decoded then reads rows, one after
    another.
    """

    basis: TurnedLinear
    mix: TurnedLinear
    rows_R: Tensor
    order_I: Tensor
    margin = 1.0  # what is not predicted to be slower saves memory
    narrow_reads = 0.65

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        order_I = torch.empty(sum(self.sizes), dtype=torch.int32, device=self.rows_R.device)
        self.register_buffer("order_I", order_I, persistent=False)
        self._token: Token | None = None

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        kind = PivotedOutput if is_output_projection(site.roles[0]) else PivotedInputs
        return held_by(kind, site, factors, geometry)

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """Two products, and what puts the rows where they belong."""
        stored, (rank,) = parameters(factors), factors.ranks
        reads = int(STREAMED * stored)
        rows = sum(geometry.inner(role) for _, role in site.matrices)
        if rank == rows:
            return Cost(reads, 2, stored)
        moves = 2 if site.roles[0] in ATTENTION_ROLES else 1
        return Cost(reads, 5, stored + moves * MOVE * rows)

    @torch.no_grad()
    def finish(self) -> None:
        """Find where each row belongs, once the numbers of the chosen ones are there."""
        if self.rows_R.is_meta:
            return
        self.rows_R = self.rows_R.clone()  # else it keeps the file that it was read from in memory
        mixed_I = torch.ones(sum(self.sizes), dtype=torch.uint8, device=self.rows_R.device)
        mixed_I[self.rows_R.long()] = 0
        made_I = torch.argsort(mixed_I, stable=True)  # the chosen rows, then the mixed ones
        self.order_I = self._order(made_I).int()

    def _order(self, made_I: Tensor) -> Tensor:
        """What is selected by, of the numbers of the rows in the order in which they are made."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to these very weights: a copy has its own."""
        return {**self.__dict__, "_token": None}

    def of_token(self, x: Tensor) -> "Token | None":
        """How a token x (..., I) that is decoded runs.

        None: a linear is adapted, or its weight made anew for each use (`runtime.narrow`). By the
        dictionaries of `nn.Module`: with weights to be read in between, its own look-ups take a
        token as long as its products do.
        """
        held: Any = self._modules
        basis, mix, where = held["basis"], held["mix"], setting(x)
        if type(basis) is not TurnedLinear or type(mix) not in (TurnedLinear, nn.ParameterDict):
            return None
        weights: tuple[Any, Any] = basis._parameters["weight"], mix._parameters["weight"]
        made = self._token
        if made is None or not made.is_of(*weights, where):
            made = Token.of(*weights, where)
            if where is not None:
                self._token = made
        return made

    def is_adapted(self) -> bool:
        """Whether one of the linears is another module by now, such as one with LoRA beside it."""
        return not (isinstance(self.basis, TurnedLinear) and isinstance(self.mix, TurnedLinear))


class Token(NamedTuple):
    """How one token runs through both matrices of a site, in one setting.

    Attributes:
        mixed: the second product; None: all rows are chosen ones.
    """

    weights: tuple[Tensor, Tensor]
    where: Setting | None
    first: Product
    mixed: Product | None

    @classmethod
    def of(cls, basis: Tensor, mix: Tensor, where: Setting | None) -> "Token":
        mixed = times(mix, where) if mix.numel() else None
        return cls((basis, mix), where, times(basis, where), mixed)

    def is_of(self, basis: Tensor, mix: Tensor, where: Setting | None) -> bool:
        """Whether the weights and the setting are still these."""
        mine = self.weights
        return mine[0] is basis and mine[1] is mix and self.where == where


class PivotedInputs(PivotedSite):
    """Of input projections: the chosen rows' outputs are the latent that the others are mixed from.

    All roles read the same input, so the outputs of all are made at once, for the first role that
    asks.
    """

    names = {  # noqa: RUF012
        "basis": ("basis.weight", (1, 0)),  # of folders from before tensors were stored transposed
        "mix": ("mix.weight", (1, 0)),
        "basis_t": ("basis.weight", None),
        "mix_t": ("mix.weight", None),
        "rows": ("rows_R", None),
    }

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        self.in_attention = site.roles[0] in ATTENTION_ROLES
        self._held: tuple[Tensor, Sequence[Tensor], int] | None = None

    def _order(self, made_I: Tensor) -> Tensor:
        return torch.argsort(made_I)

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        if len(self.sizes) == 1 or _merges_equal_products():
            return self._outputs(x)[index]
        held = self._held
        if held is None or held[0] is not x:
            held = (x, self._outputs(x), len(self.sizes))
        self._held = None if held[2] == 1 else (held[0], held[1], held[2] - 1)
        return held[1][index]

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        """(..., I) of each role."""
        if decodes(x) and (token := self.of_token(x)) is not None:
            y = self._decoded(x.reshape(-1), token).view(*x.shape[:-1], -1)
            return (y,) if len(self.sizes) == 1 else y.split(self.sizes, dim=-1)
        if not self.mix.weight.numel():
            return self.basis(x).split(self.sizes, dim=-1)
        if self.is_adapted():
            z_NR = self.basis(x.flatten(0, -2))
            return self._in_order(torch.cat([z_NR.mT, self.mix(z_NR).mT]), x.shape[:-1])
        lead, basis_DR, mix_RX = x.shape[:-1], self.basis.weight, self.mix.weight
        return self._in_order(latent_and_mixed(x.flatten(0, -2), basis_DR, mix_RX), lead)

    def _decoded(self, x_D: Tensor, token: Token) -> Tensor:
        """(I,): the outputs of all roles."""
        z_R = token.first(x_D)
        if token.mixed is None:
            return z_R
        order_I: Any = self._buffers["order_I"]
        return torch.cat([z_R, token.mixed(z_R)]).index_select(0, order_I)

    def _in_order(self, made_IN: Tensor, lead: torch.Size) -> Sequence[Tensor]:
        """(..., I) of each role, of the outputs in the order in which they are made.

        Transposed, a row for each output: on a CPU rows are put in order up to a hundred times
        faster than columns. What goes into elementwise functions are views of it; attention kernels
        want each token's numbers side by side.
        """
        y_IN = made_IN.index_select(0, self.order_I)
        if self.in_attention:
            return y_IN.mT.contiguous().view(*lead, -1).split(self.sizes, dim=-1)
        return [y.mT.view(*lead, -1) for y in y_IN.split(self.sizes)]


class PivotedOutput(PivotedSite):
    """Of an output projection, stacked transposed: mixed inputs are added to the chosen ones."""

    names = {  # noqa: RUF012
        "basis": ("basis.weight", None),
        "mix": ("mix.weight", None),
        "rows": ("rows_R", None),
    }

    def _order(self, made_I: Tensor) -> Tensor:
        return made_I

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        if decodes(x) and (token := self.of_token(x)) is not None:
            return self._decoded(x.reshape(-1), token).view(*x.shape[:-1], -1)
        if not self.mix.weight.numel():
            return self.basis(x)
        rank = len(self.rows_R)
        if self.is_adapted():
            x_NI = x.flatten(0, -2).mT.contiguous().index_select(0, self.order_I).mT
            z_NR = x_NI[:, :rank] + self.mix(x_NI[:, rank:])
            return self.basis(z_NR).view(*x.shape[:-1], -1)
        basis_RD, mix_XR = self.basis.weight, self.mix.weight
        x_IN = x.flatten(0, -2).mT.contiguous().index_select(0, self.order_I)
        if is_few(x):
            z_NR = x_IN[:rank].mT + x_IN[rank:].mT @ mix_XR
        else:
            z_NR = torch.addmm(x_IN[:rank], mix_XR.mT, x_IN[rank:]).mT
        return (z_NR @ basis_RD).view(*x.shape[:-1], -1)

    def _decoded(self, x_I: Tensor, token: Token) -> Tensor:
        """(D,)."""
        if token.mixed is not None:
            order_I: Any = self._buffers["order_I"]
            x_I, rank = x_I.index_select(0, order_I), len(token.weights[0])
            x_I = x_I[:rank] + token.mixed(x_I[rank:])
        return token.first(x_I)


def _merges_equal_products() -> bool:
    """Whether what runs is a graph whose compiler computes once what is asked for twice."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_few(x: Tensor) -> bool:
    """Whether x (..., I) is so few tokens that weights are better multiplied as they lie.

    Never in a graph, which is for any number of tokens.
    """
    return not torch.compiler.is_compiling() and x.numel() <= FEW * x.shape[-1]


def latent_and_mixed(x_ND: Tensor, basis_DR: Tensor, mix_RX: Tensor) -> Tensor:
    """(I, N): the chosen outputs, below them the mixed ones; no copy where none is needed."""
    rank, mixed = mix_RX.shape
    if is_few(x_ND):
        z_NR = x_ND @ basis_DR
        return torch.cat([z_NR.mT, (z_NR @ mix_RX).mT])
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        z_RN = (x_ND @ basis_DR).mT
        return torch.cat([z_RN, mix_RX.mT @ z_RN])
    y_IN = x_ND.new_empty(rank + mixed, len(x_ND))
    torch.mm(basis_DR.mT, x_ND.mT, out=y_IN[:rank])
    torch.mm(mix_RX.mT, y_IN[:rank], out=y_IN[rank:])
    return y_IN

"""Modules that run a site in its factors, one class per kind of factors and stacking.

Each kind of factors registers its module with `runs`; one without a module runs as the dense
matrices it stands for.

Shapes: D model width, I inner width of a role matrix.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorllm.compressors.layer import Site
from tensorllm.runtime.one_token import OneTokenLinear
from tensorllm.runtime.products import OWN_INSTRUCTIONS
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.stacking import Geometry, is_output_projection

OPERATION = 23_000  # weights read in the time of starting one operation, 8 microseconds
STREAMED = 0.75  # time to read a weight in `runtime.products`, relative to BLAS
SHORT = 1.15  # the same for a weight of a thin factor in BLAS
MOVE = 25  # products that take as long as copying one number, in a prompt
# Products per token by which two thin ones take longer than one square one, in a prompt of 16 bits
# where these have instructions of their own: some 30 microseconds each, whatever the size.
THIN_PRODUCTS = 75_000
PROMPT = 512  # prompt tokens in predictions
Order = tuple[int, ...] | None
Module = TypeVar("Module", bound="type[SiteModule]")


class Cost(NamedTuple):
    """Per token: weights read, operations started, and in a prompt of 512 tokens multiply-adds and
    numbers copied.

    A weight that is read faster counts as less than one. `native` takes the place of the copies
    where products of 16 bits have instructions of their own, in such products.
    """

    reads: int
    operations: int
    products: int
    moved: int = 0
    native: int = 0

    @property
    def decode(self) -> int:
        """Time of a decoded token, in weights read."""
        return self.reads + OPERATION * self.operations

    def prefill(self, speed: float = 1.0) -> int:
        """Time of a prompt token, in products.

        Args:
            speed: of products, relative to copies (see `runtime.products.speed_of`).
        """
        started = speed * (OPERATION * self.operations // PROMPT)
        copied = self.native if speed > OWN_INSTRUCTIONS else speed * MOVE * self.moved
        return self.products + int(started + copied)

    def __add__(self, other: object) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class Held(NamedTuple):
    """The module of one role, and where it holds the factors' tensors.

    Attributes:
        module: the module.
        tensors: stored name -> name of the parameter within the module, and the order in which the
            stored modes are held (None: as stored).
    """

    module: nn.Module
    tensors: Mapping[str, tuple[str, Order]]


class TransposedLinear(Conv1D):
    """`x @ weight`: a linear layer without a bias, held as (inputs, outputs).

    As a `Conv1D`, adapters such as LoRA (peft) know the orientation of its weight.
    """

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        inputs, outputs = weight.shape
        vars(self).update(nx=inputs, nf=outputs)  # as in `RoleLinear`
        self._parameters.update(weight=nn.Parameter(weight), bias=None)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SiteModule(nn.Module):
    """The matrices of one site in their factors.

    The constructor holds every stored tensor under its stored name, floating-point tensors as
    parameters and integer ones as buffers; tensors may be on the meta device, and `finish` is
    called once the weights are loaded. Subclasses implement the projections that their roles need.

    Attributes:
        names: stored name -> attribute that holds the tensor, and the order of its modes there;
            only for tensors not held as stored. `NAME.weight`: a `TransposedLinear` holds it, which
            adapters may replace.
        latent_attention: whether `runtime.attention` can run the whole attention in this module's
            latents; it then uses the members of `runtime.tucker.HeadsSite`.
        margin: predicted speed-up at which `--policy auto` runs a site factored.
        half_precision_reads: slowdown of reading its numbers in 16 bits, relative to a linear layer
            in 16 bits, beyond what `cost` predicts for 32 bits: where the machine's products of 16
            bits are emulated, and where they have instructions of their own.
        sizes: inner width I of each matrix, in the order of `site.matrices`.
        places: stored name -> parameter or buffer that holds the tensor, and the order of its modes
            there.
    """

    names: ClassVar[Mapping[str, tuple[str, Order]]] = {}
    latent_attention: ClassVar[bool] = False
    # Predictions near 1 are up to a third too high, but every site of `benchmarks/runtime.py --part
    # cost` that reached this in prompt and decoding was measured to be faster.
    margin: ClassVar[float] = 1.2
    half_precision_reads: ClassVar[tuple[float, float]] = (1.0, 1.0)
    sizes: tuple[int, ...]
    places: Mapping[str, tuple[str, Order]]

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__()
        tensors = factors.tensors()
        vars(self).update(  # as in `RoleLinear`
            sizes=tuple(geometry.inner(role) for _, role in site.matrices),
            places={name: self.names.get(name, (name, None)) for name in tensors},
        )
        for name, t in tensors.items():
            attribute, order = self.places[name]
            held = t if order is None else t.permute(order).contiguous()
            module = attribute.removesuffix(".weight")
            if module != attribute:  # an empty linear layer takes no adapter
                some = (
                    TransposedLinear(held) if held.numel() else nn.ParameterDict({"weight": held})
                )
                self.add_module(module, some)
            elif held.is_floating_point():
                self.register_parameter(attribute, nn.Parameter(held))
            else:
                self.register_buffer(attribute, held)

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        """(..., D) -> (..., I) by matrix number `index` (I, D), for roles q, k, v, in and gate."""
        raise NotImplementedError(f"{type(self).__name__} runs no input projections")

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        """(..., I) -> (..., D) by matrix number `index` (I, D), for roles o and out."""
        raise NotImplementedError(f"{type(self).__name__} runs no output projections")

    def widen(self) -> None:
        """Make all outputs as wide as the matrices', as what reads them needs that."""

    def finish(self) -> None:
        """Compute what depends on the weights; called whenever they were loaded."""

    @classmethod
    def latents_pay(cls, factors: Factors, geometry: Geometry) -> bool:
        """Whether decoding is predicted not to be slower with cached latents."""
        del factors, geometry
        return True

    @classmethod
    def accepts(cls, factors: Factors) -> bool:
        """Whether the module can run these factors of its kind."""
        del factors
        return True

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """The cost per token; by default each number is read and multiplied once."""
        del geometry
        stored = parameters(factors)
        return Cost(stored, 3 * len(site.matrices), stored)

    @classmethod
    def dense_cost(cls, site: Site, geometry: Geometry) -> Cost:
        """The cost per token of the dense matrices; by default one product each."""
        size = site.numel(geometry)
        return Cost(size, len(site.matrices), size)

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        """(layer, role) -> the module that replaces that matrix; they share one `SiteModule`."""
        return held_by(cls, site, factors, geometry)


def held_by(
    kind: type[SiteModule], site: Site, factors: Factors, geometry: Geometry
) -> dict[tuple[int, str], Held]:
    """The result of `SiteModule.roles` with a module of this class."""
    shared = kind(factors, site, geometry)
    shared.finish()
    below = {name: (f"factors.{held}", order) for name, (held, order) in shared.places.items()}
    return {
        matrix: Held(RoleLinear(shared, index, matrix[1]), {} if index else below)
        for index, matrix in enumerate(site.matrices)
    }


class RoleLinear(nn.Module):
    """One matrix of a site; the first one owns the site's module.

    Put hooks on the linear layer that contains it, which may call `forward` directly.
    """

    index: int
    role: str
    writes: bool
    _site: tuple[SiteModule]

    def __init__(self, site: SiteModule, index: int, role: str) -> None:
        super().__init__()
        # Not attribute by attribute, each of which a module compares with all that it holds: of
        # many small matrices this took most of the time to make the module.
        vars(self).update(
            index=index,
            role=role,
            writes=is_output_projection(role),
            _site=(site,),  # in a tuple, so that only the owner registers it
        )
        if index == 0:
            self.add_module("factors", site)

    def widen(self) -> None:
        """See `SiteModule.widen`."""
        self._site[0].widen()

    def forward(self, x: Tensor) -> Tensor:
        (site,) = self._site
        project = site.output_projection if self.writes else site.input_projection
        return project(x, self.index)


_MODULES: dict[tuple[type[Factors], str], type[SiteModule]] = {}


def runs(kind: type[Factors], *stackings: str) -> Callable[[Module], Module]:
    """Decorator of a `SiteModule`: registers it for this kind of factors in these stackings."""

    def add(module: Module) -> Module:
        for stacking in stackings:
            assert (kind, stacking) not in _MODULES, f"{kind.__name__} in {stacking!r} has a module"
            _MODULES[kind, stacking] = module
        return module

    return add


def module_for(site: Site, factors: Factors) -> type[SiteModule] | None:
    """The module class that runs a site in its factors; None if there is none.

    Args:
        site: the site.
        factors: in floating point (`Factors.plain`).
    """
    found = _MODULES.get((type(factors), site.stacking))
    return found if found is not None and found.accepts(factors) else None


def linear(weight: Tensor) -> nn.Linear:
    """An ordinary linear layer (out, in) without a bias, which LoRA and quantisation recognise.

    Built without `__init__`, as initialising a weight that is replaced at once took most of the
    time.
    """
    made = OneTokenLinear.__new__(OneTokenLinear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.contiguous())
    made.register_parameter("bias", None)
    return made


def dense_linear(w_ID: Tensor, role: str) -> nn.Linear:
    """A linear layer for a role that stays dense."""
    return linear(w_ID.mT if is_output_projection(role) else w_ID)

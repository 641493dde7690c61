"""Modules that run a site in its factors, one class per kind of factors and of stacking.

A kind of factors brings its module by `runs`; one that brings none runs as the dense matrices that
it stands for. Shapes: D model width, I inner width of a role matrix.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorllm.compressors.layer import Site
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.stacking import Geometry, is_output_projection

OPERATION = 23_000  # weights that could be read while one operation is started, 8 microseconds
STREAMED = 0.75  # time of a weight that `runtime.products` reads, beside one that BLAS does
SHORT = 1.15  # that of one of a thin factor, which BLAS reads
MOVE = 25  # products that take as long as copying one number of a token of the prompt
PROMPT = 512  # tokens of the prompt that a prediction is made for
Order = tuple[int, ...] | None
Module = TypeVar("Module", bound="type[SiteModule]")


class Cost(NamedTuple):
    """Per token: weights read, operations started, and multiply-adds in a prompt of 512 tokens.

    A weight that is read faster counts as less of one, a number that is copied as several products.
    """

    reads: int
    operations: int
    products: int

    @property
    def decode(self) -> int:
        """Time of a token that is decoded, in weights read."""
        return self.reads + OPERATION * self.operations

    @property
    def prefill(self) -> int:
        """Time of a token of the prompt, in products."""
        return self.products + OPERATION * self.operations // PROMPT

    def __add__(self, other: object) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class Held(NamedTuple):
    """The module of one role and where the factors' tensors are in it.

    Attributes:
        tensors: stored name -> name of the parameter below the module, and the order in which the
            stored modes are held (None: as stored).
    """

    module: nn.Module
    tensors: Mapping[str, tuple[str, Order]]


class TransposedLinear(Conv1D):
    """`x @ weight`: a linear without a bias, held as (inputs, outputs).

    By its class adapters such as LoRA (peft) know how its weight lies.
    """

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = weight.shape
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SiteModule(nn.Module):
    """The matrices of one site in their factors.

    The constructor holds every stored tensor under its stored name, floating point numbers as
    parameters and whole numbers as buffers; it may be called with tensors on the meta device, and
    `finish` is called once the weights are there. A subclass implements the projections that its
    roles need.

    Attributes:
        names: stored name -> attribute that holds it, and the order of its modes there, of tensors
            that are not held as they are stored. `NAME.weight`: a `TransposedLinear` holds it,
            which adapters may take the place of.
        latent_attention: whether `runtime.attention` can run the whole attention in the latents of
            this module; it then asks for the members of `runtime.tucker.HeadsSite`.
        margin: predicted speed-up that a site has to reach for `--policy auto` to run it factored.
        half_precision_reads: how much longer reading its numbers takes, beside those of a matrix,
            where both have 16 bits than `cost` says of 32.
        sizes: inner width I of each matrix, in the order of `site.matrices`.
    """

    names: ClassVar[Mapping[str, tuple[str, Order]]] = {}
    latent_attention: ClassVar[bool] = False
    # Predictions near 1 are up to a third too high, and every site of `benchmarks/runtime.py --part
    # cost` that reached this in prompt and decoding was measured to gain.
    margin: ClassVar[float] = 1.2
    half_precision_reads: ClassVar[float] = 1.0

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__()
        self.sizes = tuple(geometry.inner(role) for _, role in site.matrices)
        for name, t in factors.tensors().items():
            attribute, order = self.names.get(name, (name, None))
            held = t if order is None else t.permute(order).contiguous()
            module = attribute.removesuffix(".weight")
            if module != attribute:  # nothing can be put beside a linear without outputs
                some = (
                    TransposedLinear(held) if held.numel() else nn.ParameterDict({"weight": held})
                )
                self.add_module(module, some)
            elif held.is_floating_point():
                self.register_parameter(attribute, nn.Parameter(held))
            else:
                self.register_buffer(attribute, held)

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        """(..., D) -> (..., I) by the matrix `index` (I, D): of roles q, k, v, in and gate."""
        raise NotImplementedError(f"{type(self).__name__} runs no input projections")

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        """(..., I) -> (..., D) by the matrix `index` (I, D): of roles o and out."""
        raise NotImplementedError(f"{type(self).__name__} runs no output projections")

    def finish(self) -> None:
        """Compute what depends on weights; called again whenever they were loaded."""

    @classmethod
    def latents_pay(cls, factors: Factors, geometry: Geometry) -> bool:
        """Whether decoding is predicted not to be slower where latents are cached."""
        del factors, geometry
        return True

    @classmethod
    def accepts(cls, factors: Factors) -> bool:
        """Whether the module can run these factors of its kind."""
        del factors
        return True

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """What a token costs; by default each number is read and multiplied once."""
        del geometry
        stored = parameters(factors)
        return Cost(stored, 3 * len(site.matrices), stored)

    @classmethod
    def dense_cost(cls, site: Site, geometry: Geometry) -> Cost:
        """What it costs in the matrices themselves; by default each is one product."""
        size = site.numel(geometry)
        return Cost(size, len(site.matrices), size)

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        """(layer, role) -> the module that stands for that matrix; they share one `SiteModule`."""
        return held_by(cls, site, factors, geometry)


def held_by(
    kind: type[SiteModule], site: Site, factors: Factors, geometry: Geometry
) -> dict[tuple[int, str], Held]:
    """What `SiteModule.roles` gives, with a module of this class."""
    shared = kind(factors, site, geometry)
    shared.finish()
    stored = {name: kind.names.get(name, (name, None)) for name in factors.tensors()}
    below = {name: (f"factors.{held}", order) for name, (held, order) in stored.items()}
    return {
        matrix: Held(RoleLinear(shared, index, matrix[1]), {} if index else below)
        for index, matrix in enumerate(site.matrices)
    }


class RoleLinear(nn.Module):
    """One matrix of a site; the site's module belongs to the first of them.

    Hooks belong on the linear that it stands in: that may ask for `forward` alone.
    """

    def __init__(self, site: SiteModule, index: int, role: str) -> None:
        super().__init__()
        self.index, self.role = index, role
        if index == 0:
            self.factors = site
        self.writes = is_output_projection(role)
        self._site = (site,)  # in a tuple, so that only the owner registers it

    def forward(self, x: Tensor) -> Tensor:
        (site,) = self._site
        project = site.output_projection if self.writes else site.input_projection
        return project(x, self.index)


_MODULES: dict[tuple[type[Factors], str], type[SiteModule]] = {}


def runs(kind: type[Factors], *stackings: str) -> Callable[[Module], Module]:
    """Decorator of a `SiteModule`: it runs sites of this kind of factors that are stacked so."""

    def add(module: Module) -> Module:
        for stacking in stackings:
            assert (kind, stacking) not in _MODULES, f"{kind.__name__} in {stacking!r} has a module"
            _MODULES[kind, stacking] = module
        return module

    return add


def module_for(site: Site, factors: Factors) -> type[SiteModule] | None:
    """What runs a site in its factors; None: nothing does.

    Args:
        factors: in floating point (`Factors.plain`).
    """
    found = _MODULES.get((type(factors), site.stacking))
    return found if found is not None and found.accepts(factors) else None


def linear(weight: Tensor) -> nn.Linear:
    """An ordinary linear (out, in) without a bias, which LoRA and quantisation know.

    Put together by hand: drawing a weight that is about to be replaced took most of the time.
    """
    made = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.contiguous())
    made.register_parameter("bias", None)
    return made


def dense_linear(w_ID: Tensor, role: str) -> nn.Linear:
    """A role that stays as it is."""
    return linear(w_ID.mT if is_output_projection(role) else w_ID)

"""The layers of a model: where they come from, and how each runs on the calibration set.

Layers come from memory or, one at a time, from a checkpoint on disk.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X input width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tensorllm.calibration.module_cache import ModuleCache
from tensorllm.calibration.sequences import Batch
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.models.naming import stored_names
from tensorllm.models.task import saved_class, text_config_of


class LayerSource(Protocol):
    """A model whose embeddings can run, and whose layers have weights while they are needed.

    Attributes:
        model: the model.
        dtype: in which layers run.
        roles: of the model.
        parameters: of the whole model.
    """

    model: nn.Module
    dtype: torch.dtype
    roles: RoleMatrices
    parameters: int

    def block(self, layer: int) -> Any:
        """A context in which layer `layer` has its weights; gives its module."""
        ...


class InMemory:
    """A model that is entirely in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.roles = RoleMatrices(model.config, parameters_of(model))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.dtype = next(model.parameters()).dtype

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        yield self.model.get_submodule(self.roles.layer_path(layer))


class OnDisk:
    """The base model of a checkpoint, with a layer's weights in memory only while needed.

    Args:
        folder: of the checkpoint.
        dtype: of the weights in memory; by default that of the config or the files.
        device: of the weights in memory.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        from transformers import AutoModel

        self.checkpoint = Checkpoint(folder)
        self.device = device
        # like transformers, which loads a model in the dtype of its config
        named = getattr(self.checkpoint.config, "dtype", None)
        self.dtype = dtype or named or getattr(torch, self.checkpoint.dtype)
        with _NoWeights():
            self.model: nn.Module = AutoModel.from_config(self.checkpoint.config, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[last] = buffer.to(device)
        self.roles = RoleMatrices(self.checkpoint.config, parameters_of(self.model))
        self.parameters = self.checkpoint.parameters
        self.stored = RoleMatrices(self.checkpoint.config, self.checkpoint.entries)
        self._names = stored_names(self.model, self.checkpoint.entries)
        blocks = tuple(f"{self.roles.layer_path(n)}." for n in range(self.roles.layers))
        own = [name for name, _ in self.model.named_parameters() if not name.startswith(blocks)]
        self._load(self.model, "", own)

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        path = self.roles.layer_path(layer)
        block = self.model.get_submodule(path)
        empty = {name: p.data for name, p in block.named_parameters()}
        self._load(block, f"{path}.", empty)
        self._load_experts(layer, block)
        try:
            yield block
        finally:
            block.load_state_dict(empty, strict=False, assign=True)

    def _load(self, module: nn.Module, path: str, names: Any) -> None:
        """Load those of the parameters `names` of a module that the checkpoint has."""
        stored = {name: self._stored(f"{path}{name}") for name in names}
        known = {name: key for name, key in stored.items() if key in self.checkpoint.entries}
        read = self.checkpoint.read(known.values())
        weights = {n: read[key].to(self.device, self.dtype) for n, key in known.items()}
        module.load_state_dict(weights, strict=False, assign=True)
        module.requires_grad_(False)

    def _load_experts(self, layer: int, block: nn.Module) -> None:
        """Load fused parameters from files in which each expert's matrices are separate."""
        if layer not in self.roles.mixtures:
            return
        experts = self.roles.mixtures[layer].experts
        module: Any = block.get_submodule(experts.path)
        for parameter in (experts.inputs, experts.outputs):
            roles = experts.roles_of(parameter)
            names = {self.stored.name(layer, role) for role in roles}
            if len(names) == 1:
                continue  # fused in the files too
            read = self.checkpoint.read(sorted(names))
            empty: Tensor = getattr(module, parameter)
            made = torch.empty(empty.shape, dtype=self.dtype, device=self.device)
            fused = {self.roles.name(layer, role): made for role in roles}
            for role in roles:
                self.roles.write(fused, layer, role, self.stored.read(read, layer, role))
            setattr(module, parameter, nn.Parameter(made, requires_grad=False))

    def _stored(self, name: str) -> str:
        """The name of a weight in the checkpoint; of tied weights it may hold either."""
        if name not in self._names:
            tied = getattr(saved_class(self.checkpoint.config), "_tied_weights_keys", None)
            for other, own in (tied or {}).items():
                if own.endswith(name) and other in self.checkpoint.entries:
                    return str(other)
        return self._names.get(name, name)


class _NoWeights(TorchFunctionMode):
    """Puts tensors that are allocated without values, as weights are, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        out: Tensor = func(*args, **kwargs)
        return out


@dataclass(slots=True)
class Call:
    """The arguments with which a layer was called on a batch, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden_BTD: Tensor) -> Tensor:
        """The hidden states (B, T, D) after the layer."""
        out = block(hidden_BTD, *self.args, **self.kwargs)
        found_BTD: Tensor = out[0] if isinstance(out, tuple) else out
        return found_BTD


@dataclass(frozen=True, slots=True)
class Tap:
    """A place in a layer to read: the input of a module, or its output without the bias.

    Attributes:
        path: of the module within the layer.
        of_output: whether to read the output.
        others: modules that read the same input; whichever runs first provides it.
    """

    path: str
    of_output: bool = False
    others: tuple[str, ...] = ()

    @contextmanager
    def attached(self, block: nn.Module, give: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the block, call `give` with the signal whenever one of the modules runs."""
        with ExitStack() as attached:
            for path in (self.path, *self.others):
                module = block.get_submodule(path)
                if self.of_output:
                    handle = module.register_forward_hook(
                        lambda module, args, output: give(without_bias(module, output))
                    )
                else:
                    handle = module.register_forward_pre_hook(lambda module, args: give(args[0]))
                attached.callback(handle.remove)
            yield


def without_bias(module: nn.Module, output: Tensor) -> Tensor:
    """A linear module's output without its bias."""
    bias = getattr(module, "bias", None)
    return output.detach() if bias is None else output.detach() - bias.detach()


@dataclass
class Layers:
    """The calls of a model's layers on each batch.

    Attributes:
        source: of the model; its embeddings run once, its layers do not.
        batches: the text.
        layers: how many layers, from the first.
        held_out: how many of the last batches run but are left out of the covariances.
        start: hidden states (B, T, D) before the first layer, one per batch.
        calls: layer -> one call per batch; masks and rotary tables are shared between layers.
    """

    source: LayerSource
    batches: Sequence[Batch]
    layers: int
    held_out: int = 0
    start: list[Tensor] = field(default_factory=list)
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._device = next(p.device for p in self.source.model.parameters() if not p.is_meta)
        for batch in self.batches:
            # Layers of some models return their hidden states in a tuple.
            if not self._record(batch, in_tuple=False) and not self._record(batch, in_tuple=True):
                raise AssertionError("a layer's hidden states changed their shape on the way")

    def run(self, layer: int, block: nn.Module, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """The hidden states after the layer, batch by batch."""
        for call, hidden_BTD in zip(self.calls[layer], hidden, strict=True):
            with torch.no_grad():  # closed before `yield`: it would apply to the caller
                out_BTD = call.run(block, hidden_BTD)
            yield out_BTD

    def signals(
        self,
        layer: int,
        block: nn.Module,
        hidden: Iterable[Tensor],
        tap: Tap,
        cache: ModuleCache,
        note: Callable[[int, Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """The signal of a tap of the layer, (N, X) per batch; the layer runs only up to the tap.

        Args:
            layer: number of the layer.
            block: its module.
            hidden: states before it, per batch.
            tap: where to read.
            cache: of a module whose cached outputs are used, unless the tap lies within it.
            note: called with each batch's number and signal, before padding is removed.
        """
        usable = not tap.path.startswith(f"{cache.path}.")
        every = zip(self.batches, self.calls[layer], hidden, strict=True)
        for number, (batch, call, hidden_BTD) in enumerate(every):
            signal: Tensor | None = None
            with torch.no_grad(), tap.attached(block, _stop), cache.active(number, usable):
                try:
                    call.run(block, hidden_BTD)
                except _Reached as reached:
                    signal = reached.signal
            if signal is not None:
                if note is not None:
                    note(number, signal)
                yield batch.tokens(signal)

    def run_tapped(
        self, layer: int, block: nn.Module, hidden: Iterable[Tensor], taps: Mapping[str, Tap]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The hidden states after the layer, and the signals of the taps, batch by batch."""
        every = zip(self.batches, self.calls[layer], hidden, strict=True)
        for batch, call, hidden_BTD in every:
            seen: dict[str, Tensor] = {}
            with torch.no_grad(), ExitStack() as attached:
                for name, tap in taps.items():
                    attached.enter_context(tap.attached(block, partial(seen.__setitem__, name)))
                out_BTD = call.run(block, hidden_BTD)
            yield out_BTD, {name: batch.tokens(signal) for name, signal in seen.items()}

    def run_cached(
        self, layer: int, block: nn.Module, hidden: Iterable[Tensor], caches: Sequence[ModuleCache]
    ) -> Iterator[Tensor]:
        """As `run`, without running modules whose outputs are cached."""
        for number, (call, hidden_BTD) in enumerate(zip(self.calls[layer], hidden, strict=True)):
            with torch.no_grad(), ExitStack() as active:
                for each in caches:
                    active.enter_context(each.active(number))
                out_BTD = call.run(block, hidden_BTD)
            yield out_BTD

    def _record(self, batch: Batch, *, in_tuple: bool) -> bool:
        """Run the model with layers that only record their calls.

        Returns:
            False if `in_tuple` is wrong for this model.
        """
        model: Any = self.source.model
        base = getattr(model, "base_model", model)
        blocks = [model.get_submodule(self.source.roles.layer_path(n)) for n in range(self.layers)]
        seen: list[tuple[Tensor, Call]] = []
        for block in blocks:
            block.forward = _passing_on(seen, in_tuple, last=block is blocks[-1])
        extra = {"use_cache": False} if hasattr(text_config_of(model.config), "use_cache") else {}
        mask = batch.mask_BT.to(self._device).long()
        try:
            with torch.no_grad():
                base(input_ids=batch.ids_BT.to(self._device), attention_mask=mask, **extra)
        except _Reached:
            pass
        finally:
            for block in blocks:
                del block.forward
        if any(hidden.shape != seen[0][0].shape for hidden, _ in seen):
            return False
        self.start.append(seen[0][0])
        for layer, (_, call) in enumerate(seen):
            self.calls.setdefault(layer, []).append(call)
        return True


class _Reached(Exception):
    """Raised to end a run, at the tapped module or at the last layer."""

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.signal = signal


def _stop(signal: Tensor) -> None:
    raise _Reached(signal)


def _passing_on(seen: list[tuple[Tensor, Call]], in_tuple: bool, last: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, Call(args[1:], kwargs)))
        if last or hidden.shape != seen[0][0].shape:
            raise _Reached(hidden)
        return (hidden,) if in_tuple else hidden

    return forward

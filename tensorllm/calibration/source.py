"""Where the layers of a model come from: memory, or a checkpoint on disk, one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.architectures.task import saved_class
from tensorllm.checkpoint.reader import Checkpoint


class LayerSource(Protocol):
    """A model whose embeddings can run, and its layers for as long as each is needed.

    Attributes:
        parameters: numbers of the whole model.
    """

    model: nn.Module
    roles: RoleMatrices
    parameters: int

    def block(self, layer: int) -> Any:
        """A context in which layer `layer` of the model has its weights; gives its module."""
        ...


def block_path(roles: RoleMatrices, layer: int) -> str:
    """The name of the layer's module in the model."""
    stored = roles.architecture.stored("q")
    return roles.name(layer, "q").removesuffix(f".{stored.path}.weight")


class InMemory:
    """A model that is whole in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.roles = RoleMatrices(model.config, parameters_of(model))
        self.parameters = sum(p.numel() for p in model.parameters())

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        yield self.model.get_submodule(block_path(self.roles, layer))


class OnDisk:
    """A checkpoint's base model: embeddings in memory, the weights of layers while they are needed.

    Args:
        dtype: of the weights in memory; as they are stored by default.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        from transformers import AutoModel

        self.checkpoint = Checkpoint(folder)
        self.device = device
        # transformers, too, loads a model in the dtype that its config names
        named = getattr(self.checkpoint.config, "dtype", None)
        self.dtype = dtype or named or getattr(torch, self.checkpoint.dtype)
        with _WeightsNowhere():
            self.model: nn.Module = AutoModel.from_config(self.checkpoint.config, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[last] = buffer.to(device)
        self.roles = RoleMatrices(self.checkpoint.config, parameters_of(self.model))
        self.parameters = self.checkpoint.parameters
        stored = RoleMatrices(self.checkpoint.config, self.checkpoint.entries)
        first = self.roles.name(0, "q")
        self._prefix = stored.name(0, "q").removesuffix(first)
        blocks = tuple(f"{block_path(self.roles, n)}." for n in range(self.roles.layers))
        own = [name for name, _ in self.model.named_parameters() if not name.startswith(blocks)]
        self._load(self.model, "", own)

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        path = block_path(self.roles, layer)
        block = self.model.get_submodule(path)
        empty = {name: p.data for name, p in block.named_parameters()}
        self._load(block, f"{path}.", empty)
        try:
            yield block
        finally:
            block.load_state_dict(empty, strict=False, assign=True)

    def _load(self, module: nn.Module, path: str, names: Any) -> None:
        """Give the parameters `names` of a module their weights, where the checkpoint has them."""
        stored = {name: self._stored(f"{self._prefix}{path}{name}") for name in names}
        known = {name: key for name, key in stored.items() if key in self.checkpoint.entries}
        read = self.checkpoint.read(known.values())
        weights = {n: read[key].to(self.device, self.dtype) for n, key in known.items()}
        module.load_state_dict(weights, strict=False, assign=True)
        module.requires_grad_(False)

    def _stored(self, name: str) -> str:
        """What the checkpoint calls a weight: of tied ones it may hold either."""
        if name not in self.checkpoint.entries:
            tied = getattr(saved_class(self.checkpoint.config), "_tied_weights_keys", None)
            for other, own in (tied or {}).items():
                if own == name and other in self.checkpoint.entries:
                    return str(other)
        return name


class _WeightsNowhere(TorchFunctionMode):
    """What is allocated without a value has none: modules make their large weights so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        out: Tensor = func(*args, **kwargs)
        return out

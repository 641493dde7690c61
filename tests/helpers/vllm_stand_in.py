"""The part of vLLM's interface that tensorllm implements and uses, where vLLM is not installed.

Names, signatures and order of calls are those of vLLM 0.32 and 0.33: `layers/linear.py`,
`layers/quantization/{__init__,base_config}.py`, `models/utils.py`; and of 0.32: `config/vllm.py`.
It shows that our side is called as vLLM calls it, not that vLLM works.
"""

import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REGISTERED: dict[str, type] = {}


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...
    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...
    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...
    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any: ...
    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra: Any) -> None: ...
    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size,
        params_dtype, *, weight_loader,
    ) -> None:  # fmt: skip
        shape = sum(output_partition_sizes), input_size_per_partition
        layer.weight = nn.Parameter(torch.full(shape, torch.nan, dtype=params_dtype))
        layer.weight.weight_loader = weight_loader

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """A linear of several parts, by number or as q, k, v."""

    names: tuple[Any, ...] = ()

    def __init__(self, width: int, sizes: list[int], config: Any, prefix: str) -> None:
        super().__init__()
        self.sizes = sizes
        method = config.get_quant_method(self, prefix)
        method.create_weights(
            self, width, sizes, width, sum(sizes), torch.get_default_dtype(),
            weight_loader=self.weight_loader,
        )  # fmt: skip
        self.quant_method = method
        self.register_parameter("bias", None)

    def weight_loader(self, param: Tensor, loaded: Tensor, shard: Any = None) -> None:
        names = self.names or tuple(range(len(self.sizes)))
        at = 0 if shard is None else names.index(shard)
        rows = param.data.split(self.sizes)[at] if shard is not None else param.data
        assert rows.shape == loaded.shape
        rows.copy_(loaded)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.quant_method.apply(self, x), None


class QKVParallelLinear(LinearBase):
    names = ("q", "k", "v")


class WeightsMapper:
    def __init__(self, orig_to_new_prefix: dict[str, str | None]) -> None:
        self.prefixes = orig_to_new_prefix

    def apply(self, weights: Any) -> Any:
        dropped = tuple(name for name, new in self.prefixes.items() if new is None)
        return [(name, t) for name, t in weights if not name.startswith(dropped)]


def register_quantization_config(name: str) -> Any:
    def add(kind: type) -> type:
        assert issubclass(kind, QuantizationConfig)
        REGISTERED[name] = kind
        return kind

    return add


# What vLLM's config says while a model is built.
CURRENT = SimpleNamespace(
    model_config=SimpleNamespace(dtype=torch.float32, hf_config=SimpleNamespace()),
    device_config=SimpleNamespace(device_type="cpu"),
)
LAYERS = "vllm.model_executor.layers"
MODULES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.config": {"get_current_vllm_config": lambda: CURRENT},
    "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: 1},
    "vllm.model_executor": {},
    LAYERS: {},
    f"{LAYERS}.linear": {
        kind.__name__: kind
        for kind in (LinearBase, LinearMethodBase, QKVParallelLinear, UnquantizedLinearMethod)
    },
    f"{LAYERS}.quantization": {"register_quantization_config": register_quantization_config},
    f"{LAYERS}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    "vllm.model_executor.models": {},
    "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import vllm...` find this for the length of a test."""
    for name, content in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tensorllm.checkpoint.vllm", raising=False)

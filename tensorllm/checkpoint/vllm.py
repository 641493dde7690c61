"""The factored format as a vLLM quantisation method, by vLLM's plugin interface.

vLLM imports this module by the entry point `vllm.general_plugins`; nothing else does. A linear
layer of vLLM, which may fuse several matrices of the checkpoint (q, k and v in one), gets the
modules that run their factors; attention, cache and scheduling stay vLLM's. Where factors cannot
replace the whole layer (some of its matrices are dense or stored interleaved, or it is split over
devices), or by the policy `auto` are not predicted to be faster, the layer is filled with the dense
weights that the factors represent.

Written against vLLM 0.33; requests were served by 0.32 (docs/serve.md).
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from tensorllm.checkpoint.factored import METHOD, FactoredFolder
from tensorllm.checkpoint.manifest import StoredSite, factored_manifest
from tensorllm.errors import UserError
from tensorllm.hub import local_copy
from tensorllm.registry import one_of
from tensorllm.runtime.cost import Policy, choose_all
from tensorllm.runtime.kept_rows import widen_where_needed
from tensorllm.runtime.sites import TransposedLinear, module_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OURS = ("factors.", "rest.")  # prefixes of tensor names that only we read
SHARDS = ("q", "k", "v")  # vLLM's names for the parts of its fused attention projection
SETTINGS = ("quant_method", "weights", "policy")  # in quantization_config
logger = logging.getLogger("vllm.tensorllm")  # below vLLM's own, so shown as that is


def register() -> None:
    """Register the method; the entry point calls this in each of vLLM's processes."""
    register_quantization_config(METHOD)(FactoredVLLMConfig)


class Parts:
    """The modules or weights of a factored folder's linear layers, made on request.

    Args:
        folder: one that `tensorllm compress --format factored` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = FactoredFolder(folder)
        self._made: dict[tuple[str, torch.dtype], dict[tuple[int, str], nn.Module]] = {}
        self._rebuilt: dict[str, Tensor] = {}  # rebuilt along with others, not asked for yet
        self._dense: set[str] = set()  # weights that will be asked for

    @cached_property
    def names(self) -> set[str]:
        """Of all parameters of the dense model."""
        return set(self.folder.stored.entries) | set(self.folder.manifest.replaced)

    @cached_property
    def sites(self) -> dict[str, dict[str, StoredSite]]:
        """Path of a linear layer in the checkpoint -> role -> the site with that matrix."""
        found: dict[str, dict[str, StoredSite]] = defaultdict(dict)
        for entry in self.folder.manifest.sites:
            for layer, role in entry.site.matrices:
                name = self.folder.roles.name(layer, role)
                found[name.removesuffix(".weight")][role] = entry
        return found

    def chosen(self, policy: Policy, dtype: torch.dtype) -> set[str]:
        """Names of the sites that are to run in their factors, by `runtime.cost`."""
        folder = self.folder
        sites = [(site.site, folder.shapes(site)) for site in folder.manifest.sites]
        geometry = folder.roles.spec.geometry
        choices = choose_all(sites, geometry, policy, dtype, on_cpu=True)
        return {choice.site for choice in choices if choice.factored}

    def alone(self, path: str, chosen: set[str]) -> bool:
        """Whether factors replace all of a linear layer, each role's outputs being contiguous.

        Args:
            path: of the layer.
            chosen: names of the sites that may run in their factors.
        """
        by_role, roles = self.sites.get(path, {}), self.folder.roles
        for role, entry in by_role.items():
            (layer,) = {n for n, other in self._matrices(entry, path) if other == role}
            stored = roles.stored(layer, role)
            blocks = stored.count(roles.spec.geometry(layer))
            if stored.experts is not None or set(stored.roles) != set(by_role) or blocks > 1:
                return False
        return bool(by_role) and all(entry.name in chosen for entry in by_role.values())

    def modules(self, path: str, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
        """The module of each role of a linear layer, in order; one site's modules share factors."""
        by_role, roles = self.sites[path], self.folder.roles
        first = next(iter(by_role.values()))
        layer = next(n for n, _ in self._matrices(first, path))
        for role in roles.stored(layer, next(iter(by_role))).roles:
            entry = by_role[role]
            key = entry.name, dtype
            if key not in self._made:
                self._made[key] = self._make(entry, dtype, device)
            yield self._made[key][layer, role]

    def expect(self, paths: Iterable[str]) -> None:
        """Announce the layers whose weights `dense` will be asked for."""
        self._dense.update(f"{path}.weight" for path in paths)

    def dense(self, path: str) -> Tensor:
        """The dense (out, in) weight of a linear layer that is wholly or partly factored."""
        name = f"{path}.weight"
        if name not in self._rebuilt:
            made = self.folder.rebuilt(name)
            self._rebuilt |= {other: t for other, t in made.items() if other in self._dense}
        self._dense.discard(name)
        entry = next(iter(self.sites[path].values()))
        stored = self.folder.roles.stored(*next(self._matrices(entry, path)))
        weight = self._rebuilt.pop(name)
        return weight.mT if stored.conv1d else weight

    def _matrices(self, entry: StoredSite, path: str) -> Iterator[tuple[int, str]]:
        for layer, role in entry.site.matrices:
            if self.folder.roles.name(layer, role) == f"{path}.weight":
                yield layer, role

    def _make(
        self, entry: StoredSite, dtype: torch.dtype, device: torch.device
    ) -> dict[tuple[int, str], nn.Module]:
        read = self.folder.stored.read(entry.tensors.values())
        held = {
            name: t.to(device, dtype if t.is_floating_point() else None) for name, t in read.items()
        }
        factors = entry.factors(held).plain()
        kind = module_for(entry.site, factors)
        assert kind is not None, "asked for only where one runs them"
        geometry = self.folder.roles.spec.geometry(entry.layers[0])
        made = kind.roles(entry.site, factors, geometry)
        modules = [each.module for each in made.values()]
        widen_where_needed(entry.site, modules, self.folder.roles, self.names)
        for module in modules:
            _run_by_vllm(module)
        return {matrix: each.module.requires_grad_(False) for matrix, each in made.items()}


class VLLMLinear(nn.Module):
    """A linear layer without a bias, run by the kernel that vLLM chooses for its own.

    Args:
        weight: (out, in).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self._method = UnquantizedLinearMethod()
        self._method.process_weights_after_loading(self)  # may pack the weight for the kernel

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._method.apply(self, x.contiguous())
        return y


def _run_by_vllm(module: nn.Module) -> None:
    """Let vLLM's kernels run the linear layers in a module of ours."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | TransposedLinear):
                weight = child.weight if isinstance(child, nn.Linear) else child.weight.mT
                setattr(parent, name, VLLMLinear(weight.detach()))


class FactoredVLLMConfig(QuantizationConfig):
    """vLLM's counterpart of `"quant_method": "tensorllm"` in config.json.

    Args:
        policy: `auto`: factors only where the cost model says that they are smaller and faster on
            this CPU; `always`: wherever a module can run them. Elsewhere than on a CPU, of which
            the cost model knows nothing, the first is the second.
    """

    def __init__(self, policy: Policy = "auto") -> None:
        super().__init__()
        self.policy = policy
        self.parts: Parts | None = None
        self._chosen: set[str] | None = None  # once layers are built
        self._mark = ""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # no kernels of our own

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FactoredVLLMConfig":
        for name in config:
            one_of("a setting of quantization_config", name, SETTINGS)
        policy: Any = config.get("policy", "auto")
        one_of("policy", str(policy), get_args(Policy))
        return cls(policy)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Find the folder; a model of the hub must be in the local cache by then."""
        del hf_config
        here = Path(model_name)
        folder = here if here.is_dir() else local_copy(model_name, "model", revision=revision)
        if folder is None or factored_manifest(folder) is None:
            raise UserError(
                f"{model_name} is no factored folder on this machine; fetch all of its files "
                f"first (hf download {model_name}) and give the folder"
            )
        self.parts = Parts(folder)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Hide the factors' names from vLLM's models; the layers read these tensors themselves."""
        return WeightsMapper(orig_to_new_prefix=dict.fromkeys(OURS))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        above, _, name = prefix.rpartition(".")
        inside = self.packed_modules_mapping.get(name, [name])
        paths = [f"{above}.{each}" if above else each for each in inside]
        parts, chosen = self._choose()
        factored = [path for path in paths if path in parts.sites]
        if not factored:
            return UnquantizedLinearMethod()
        alone = all(parts.alone(path, chosen) for path in paths)
        if alone and get_tensor_model_parallel_world_size() == 1:
            return FactoredMethod(parts, paths)
        shards: dict[str, str | int | None] = dict.fromkeys(paths)
        if len(paths) > 1:
            names = SHARDS if isinstance(layer, QKVParallelLinear) else range(len(paths))
            shards = dict(zip(paths, names, strict=True))
        parts.expect(factored)
        return DenseMethod(parts, {path: shards[path] for path in factored})

    def _choose(self) -> tuple[Parts, set[str]]:
        """The folder's parts, and the names of the sites that may run in their factors.

        vLLM takes a compiled graph from its cache where its config has the same hash as before. So
        the config gets a mark of all else that the graph follows from: the folder and the choice.
        """
        assert self.parts is not None, "vLLM calls maybe_update_config before it builds layers"
        now = get_current_vllm_config()
        if self._chosen is None:
            manifest = self.parts.folder.manifest
            policy: Policy = self.policy if now.device_config.device_type == "cpu" else "always"
            self._chosen = self.parts.chosen(policy, now.model_config.dtype)
            facts = json.dumps([manifest.to_json(), sorted(self._chosen)])
            self._mark = sha256(facts.encode()).hexdigest()
            logger.info(
                "policy %s: %d of %d sites run in their factors, if all others of their layer do",
                policy, len(self._chosen), len(manifest.sites),
            )  # fmt: skip
        now.model_config.hf_config.tensorllm_mark = self._mark
        return self.parts, self._chosen


class FactoredMethod(LinearMethodBase):
    """A vLLM linear layer that runs as factors; it concatenates the checkpoint layers' outputs."""

    def __init__(self, parts: Parts, paths: list[str]) -> None:
        self.parts, self.paths = parts, paths

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        del extra_weight_attrs
        assert input_size_per_partition == input_size, "asked for only without splitting"
        assert sum(output_partition_sizes) == output_size, "asked for only without splitting"
        layer.dtype, layer.place = params_dtype, torch.empty(0).device  # vLLM sets the default

    def process_weights_after_loading(self, layer: Any) -> None:
        made = [
            module
            for path in self.paths
            for module in self.parts.modules(path, layer.dtype, layer.place)
        ]
        layer.factored = nn.ModuleList(made)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outs = [module(x) for module in layer.factored]
        y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return y if bias is None else y + bias


class DenseMethod(UnquantizedLinearMethod):
    """An ordinary vLLM linear layer, filled with the weights that the factors represent."""

    def __init__(self, parts: Parts, shards: Mapping[str, str | int | None]) -> None:
        super().__init__()
        self.parts, self.shards = parts, shards

    def process_weights_after_loading(self, layer: Any) -> None:
        for path, shard in self.shards.items():
            given = () if shard is None else (shard,)
            layer.weight.weight_loader(layer.weight, self.parts.dense(path), *given)
        super().process_weights_after_loading(layer)

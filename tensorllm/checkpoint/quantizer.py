"""The factored format as a transformers quantisation method.

transformers reads `quantization_config` in config.json, finds `FactoredHfQuantizer` by its
`quant_method`, and lets it replace modules before weights are read, each into its own place. The
resulting model is an ordinary one: it can be cast, moved, trained and saved.

`hook` imports this while transformers itself is being imported, so everything else is imported
later.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD, STEM = "tensorllm", "factored"  # as in checkpoint.factored, which is not imported here


@register_quantization_config(METHOD)
class FactoredConfig(QuantizationConfigMixin):
    """The `quantization_config` of a factored folder: the file, or index, that holds the factors.

    Args:
        folder, sites: set while `load` makes a model that is partly dense: the folder to read from,
            and the names of the sites that run as factors.
        dense_cache: names of the sites whose attention caches no latents; None: the process's
            default.
    """

    def __init__(
        self,
        weights: str,
        quant_method: str = METHOD,
        folder: str | None = None,
        sites: Sequence[str] | None = None,
        dense_cache: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = quant_method  # a string, as for all methods of other packages
        self.weights, self.folder, self.sites = weights, folder, sites
        self.dense_cache = dense_cache


@register_quantizer(METHOD)
class FactoredHfQuantizer(HfQuantizer):
    """Installs factored modules in a model on the meta device, and renames what they read."""

    requires_calibration = True  # a model is factored by `tensorllm compress`, not while it loads

    def update_attn_implementation(self, config: Any) -> Any:
        # The first call after the config is read and before files are looked for.
        own: Any = self.quantization_config
        if own.weights:
            config.transformers_weights = own.weights
        return config

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        from tensorllm.checkpoint.loading import install_skeleton

        # A strategy such as `auto` may yet leave some weights on the disk.
        self._to_memory = (
            not isinstance(device_map, str) and "disk" not in (device_map or {}).values()
        )
        own: Any = self.quantization_config
        if own.folder is None:
            assert checkpoint_files, "transformers has found the files by now"
            files = [Path(file) for file in checkpoint_files]
            folder = files[0].parent
        else:
            folder = Path(own.folder)
            files = sorted(folder.glob(f"{STEM}*.safetensors"))
        self._manifest, self._placements = install_skeleton(
            model, folder, files, own.sites, dense_cache=own.dense_cache
        )

    def get_weight_conversions(self) -> list[Any]:
        from tensorllm.checkpoint.saving import conversions

        return conversions(self._manifest, self._placements, take_all=self._to_memory)

    # Some methods have names of their own, for which the base class looks through all parameters.

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return [*weight_conversions, *self.get_weight_conversions()]

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        return

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from tensorllm.checkpoint.loading import finish

        self.remove_quantization_config(model)  # otherwise the model could not be cast or trained
        finish(model, self._manifest)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

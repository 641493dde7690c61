"""The factored format as transformers sees it: one more way in which weights are stored.

transformers reads `quantization_config` in config.json, finds `FactoredHfQuantizer` by its
`quant_method`, and lets it replace modules before weights are read, each into its own place. The
model that comes out is an ordinary one: it can be cast, moved, trained and saved.
Imported by `hook` while transformers itself is being imported, so all else is imported later.
"""

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "tensorllm"  # that of tensorllm.checkpoint.factored, which is not imported here


@register_quantization_config(METHOD)
class FactoredConfig(QuantizationConfigMixin):
    """What config.json says: which file, or index of files, holds the factors."""

    def __init__(self, weights: str, quant_method: str = METHOD, **kwargs: Any) -> None:
        self.quant_method: Any = quant_method  # a string, as for all methods of other packages
        self.weights = weights


@register_quantizer(METHOD)
class FactoredHfQuantizer(HfQuantizer):
    """Gives a model on the meta device its factored modules, and renames what is read for them."""

    requires_calibration = True  # a model is factored by `tensorllm compress`, not while it loads

    def update_attn_implementation(self, config: Any) -> Any:
        # The first call after the config is read and before files are looked for.
        own: Any = self.quantization_config
        config.transformers_weights = own.weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from tensorllm.checkpoint.skeleton import install_skeleton

        assert checkpoint_files, "transformers has found the files by now"
        manifest, self._placements = install_skeleton(model, [Path(f) for f in checkpoint_files])
        self._manifest = manifest

    def get_weight_conversions(self) -> list[Any]:
        from tensorllm.checkpoint.skeleton import conversions

        return conversions(self._manifest, self._placements)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from tensorllm.checkpoint.skeleton import finish

        self.remove_quantization_config(model)  # else it could not be cast, or trained
        finish(model, self._manifest, self._placements)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

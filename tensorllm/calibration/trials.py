"""Runs of the compressed layer with other matrices in place of its own.

Shapes: B sequences, T positions, D model width.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.func import functional_call

from tensorllm.calibration.layers import Layers
from tensorllm.calibration.module_cache import ModuleCache
from tensorllm.calibration.original import LayerModule
from tensorllm.compressors.operators import LinearOperator, replaced_by
from tensorllm.tensors.stacking import ATTENTION_ROLES

NOTHING: Mapping[str, Any] = {}


class Trials:
    """Runs of a layer with trial matrices and parameters, without changing it.

    Args:
        layers: how the layer is run.
        module: the layer.
        attention: cached outputs of its attention, for runs that do not change it.
    """

    def __init__(self, layers: Layers, module: LayerModule, attention: ModuleCache) -> None:
        self.layers, self.module, self._attention = layers, module, attention

    def output(
        self,
        batch: int,
        hidden_BTD: Tensor,
        weights: Mapping[str, Tensor | LinearOperator] = NOTHING,
        parameters: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        """Hidden states (B, T, D) after the layer, float32.

        Args:
            batch: number of the batch.
            hidden_BTD: states before the layer.
            weights: role matrices (I, D), or operators.
            parameters: by their names within the layer.
        """
        module, number = self.module, self.module.number
        run: dict[str, Tensor] = {}
        stands = not set(weights) & set(ATTENTION_ROLES) and not parameters
        with ExitStack() as standing:
            standing.enter_context(self._attention.active(batch, stands))
            for role, w in weights.items():
                if isinstance(w, LinearOperator):
                    if self._alone(role) and w.is_cheaper(hidden_BTD.shape[:-1].numel()):
                        own = module.block.get_submodule(module.below(role))
                        standing.enter_context(replaced_by(own, w))
                        continue
                    w = w.matrix()
                name = module.roles.name(number, role)
                if name not in run:  # a fused parameter is written part by part
                    run[name] = module.weights[name].clone()
                module.roles.write(run, number, role, w)
            below = {name.removeprefix(f"{module.path}."): w for name, w in run.items()}
            below |= parameters

            def block(*args: Any, **kwargs: Any) -> Any:
                return functional_call(module.block, below, args, kwargs)

            return self.layers.calls[number][batch].run(block, hidden_BTD).float()

    def _alone(self, role: str) -> bool:
        """Whether the role has a linear module of its own."""
        stored = self.module.roles.stored(self.module.number, role)
        return len(stored.roles) == 1 and stored.experts is None

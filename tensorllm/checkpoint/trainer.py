"""Use transformers' Trainer on a model that runs as factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tensorllm.checkpoint.manifest import MANIFEST
from tensorllm.io import write_tensors

WEIGHTS = "model.safetensors"  # where a Trainer looks


class FactoredCheckpoints(TrainerCallback):
    """Lets a Trainer resume from its checkpoints of a factored model, and load the best of them.

    `Trainer(model, ..., callbacks=[FactoredCheckpoints()])`. Each checkpoint is a normal factored
    folder; but a Trainer reads a file of its own, with the weights' names in memory. This callback
    adds that file, which only a Trainer reads.
    """

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # Adapters have a file of their own, which this one must not hide.
        alone = isinstance(model, PreTrainedModel) and (folder / MANIFEST).is_file()
        if alone and state.is_world_process_zero:
            write_tensors(folder / WEIGHTS, _tied_once(model.state_dict()))


def _tied_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that share memory, which files may not hold, keep the first."""
    kept: dict[int | str, str] = {}
    for name, t in tensors.items():
        kept.setdefault(t.data_ptr() if t.numel() else name, name)
    return {name: tensors[name] for name in kept.values()}

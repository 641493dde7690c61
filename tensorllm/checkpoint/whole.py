"""Load a folder as a transformers model, refusing incomplete ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.fitting import findings_of, judge
from tensorllm.errors import UserError, first_line
from tensorllm.models.task import language_model_class, saved_class
from tensorllm.progress import silenced

ADAPTER = "adapter_config.json"
# The first prints a table of names, which `judge` reports in one line. Where its logger has a
# level of its own, transformers also makes the second list layers that are not sharded over GPUs.
NOISY = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")


def load_whole(
    folder: Path,
    config: Any,
    dtype: torch.dtype | None = None,
    *,
    language: bool = True,
    changed: bool = False,
) -> Any:
    """The model of a folder in evaluation mode, with every weight read from there.

    Args:
        folder: an ordinary checkpoint, or a factored one.
        config: its config.
        dtype: of the weights in memory; None: as they are stored.
        language: load with the head that predicts tokens, whatever class the folder was saved from;
            False: as it was saved.
        changed: use `config` even though it differs from the folder's own.

    Raises:
        UserError: transformers cannot make it, or a parameter is missing, unexpected, or of another
            shape.
    """
    refuse_adapter(folder)
    kind = language_model_class(config) if language else saved_class(config)
    given = {"config": config} if changed else {}
    return _made(kind, folder, folder, dtype=dtype or "auto", **given)


def load_state(state: dict[str, Any], config: Any, dtype: torch.dtype | None, folder: Path) -> Any:
    """The model of tensors that are in memory; `folder` is its name in messages."""
    kind = saved_class(config)
    return _made(kind, None, folder, config=config, state_dict=state, dtype=dtype or config.dtype)


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, which transformers would apply to the weights beside it.

    Compressed without the adapter, it would not be the model that is scored.
    """
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} holds an adapter beside a model, or alone ({ADAPTER}): merge it into the "
            "weights (peft: merge_and_unload, then save_pretrained), or move it away"
        )


@contextmanager
def without_bar() -> Iterator[None]:
    """Hide transformers' progress bar for loading that takes no time."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


def _made(kind: Any, source: Path | None, folder: Path, **given: Any) -> Any:
    try:
        with silenced(*NOISY):
            model, info = kind.from_pretrained(
                source,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by `judge`, with both shapes
                use_safetensors=True,
                **given,
            )
    except (UserError, ModuleNotFoundError):  # said already, or what to install
        raise
    except Exception as error:  # a config or file that is wrong fails in many ways in there
        raise UserError(f"cannot load the model in {folder}: {first_line(error)}") from None
    judge(model, findings_of(info), folder)
    return model.eval()

"""The small files of a model folder, beside its weights: all of them go with the model, but code.

A list of what is wanted forgets what the next tokenizer needs (`bpe.codes`, chat templates). So
what is known to be weights, pickles or code is left out, and all else is copied.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin.index.json",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.pt2",
    "*.ot",
    "*.pb",
    "*.tflite",
    "*.npz",
    "*.npy",
    "*.pte",
    "*.distcp",
)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill")
CODE = ("*.py", "*.pyc", "*.so", "*.dll", "*.dylib", "*.exe", "*.sh", "*.bat", "*.ps1", "*.ipynb")
# Never fetched from the hub: weights are read from safetensors only, and code is not run.
UNWANTED = (*(w for w in WEIGHTS if "safetensors" not in w), *PICKLED, *CODE, ".*", "*/.*")
ADAPTER = ("adapter_config.json", "adapter_model.*")
SMALL = 2**24  # bytes; a larger folder is a trainer's log or a data set
CARD = "README.md"  # a model's card is written anew for what is made of it
MODULES = "modules.json"  # sentence-transformers: which folder holds which module of a pipeline


def small_files(folder: Path) -> list[Path]:
    """What is copied as it is: files of the folder, and of folders in it that belong to the model.

    Those are small folders without weights or pickles, such as `additional_chat_templates`, and
    those that `modules.json` names, such as `1_Pooling`, whose safetensors are the model's too.
    """
    return [*_wanted(folder.iterdir()), *_below(folder)]


def is_weights(path: Path) -> bool:
    """Whether a file, by its name, holds weights in any format but a pickle."""
    return _is(path, WEIGHTS)


def _below(folder: Path) -> Iterator[Path]:
    named = _modules(folder)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if inner.name.startswith(".") or inner.is_symlink():
            continue
        files = sorted(path for path in inner.rglob("*") if path.is_file())
        if inner.name in named:
            yield from _wanted(files)
            yield from (path for path in files if path.suffix == ".safetensors")
        elif (
            not any(_is(path, WEIGHTS + PICKLED) for path in files)
            and sum(path.stat().st_size for path in files) <= SMALL
        ):
            yield from _wanted(files)


def _wanted(files: Iterator[Path] | list[Path]) -> Iterator[Path]:
    for path in sorted(files):
        hidden = path.name.startswith(".") or path.name == CARD
        if path.is_file() and not hidden and not _is(path, (*WEIGHTS, *PICKLED, *CODE, *ADAPTER)):
            yield path


def _modules(folder: Path) -> set[str]:
    """The folders that a sentence-transformers pipeline is made of; none where there is none."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module.get("path")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name.lower(), pattern) for pattern in patterns)

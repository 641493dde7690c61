"""The small files of a model folder: everything goes with the model except weights and code.

A list of wanted names would miss what the next tokenizer needs (`bpe.codes`, chat templates). So
known weights, pickles and code are left out, and everything else is copied.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from tensorllm.io import from_json

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
CARD = "README.md"  # a model card is written anew for the compressed model
MODULES = "modules.json"  # sentence-transformers: the folder of each module of a pipeline


def small_files(folder: Path) -> list[Path]:
    """Files to copy as they are: the folder's own, and those of its subfolders that are part of it.

    These are small subfolders without weights or pickles, such as `additional_chat_templates`, and
    those that `modules.json` names, such as `1_Pooling`, whose safetensors belong to the model too.
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
    """The folders of a sentence-transformers pipeline; empty if the model is none."""
    try:
        modules = from_json((folder / MODULES).read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module.get("path")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name.lower(), pattern) for pattern in patterns)

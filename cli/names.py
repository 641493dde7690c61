"""What a shell completes: names of models, modes, datasets and the like."""

from collections.abc import Callable


def models() -> list[str]:
    """The short names."""
    from tensorllm.model_names import short_names

    return list(short_names())


def modes() -> list[str]:
    """The compressors."""
    from tensorllm.compressors import COMPRESSORS

    return COMPRESSORS.names()


def datasets() -> list[str]:
    """The datasets."""
    from tensorllm.data import DATASETS

    return DATASETS.names()


def protocols() -> list[str]:
    """The ways of scoring."""
    return ["strict", "paper"]


def kinds() -> list[str]:
    """What can be listed."""
    from tensorllm.commands.catalog import KINDS

    return list(KINDS)


def dtypes() -> list[str]:
    """Of weights."""
    return ["fp32", "bf16", "fp16"]


def devices() -> list[str]:
    """Where it may run."""
    return ["auto", "cpu", "cuda"]


def policies() -> list[str]:
    """Which factored layers run in their factors."""
    return ["auto", "always"]


def caches() -> list[str]:
    """What attention keeps of the tokens so far."""
    return ["auto", "latent", "dense"]


def layouts() -> list[str]:
    """How heads are cut."""
    return ["paper", "official"]


def loggers() -> list[str]:
    """Those that need nothing or one small package."""
    return ["tensorboard", "csv"]


# By the name of the field.
COMPLETE: dict[str, Callable[[], list[str]]] = {
    "model": models,
    "mode": modes,
    "dataset": datasets,
    "protocol": protocols,
    "dtype": dtypes,
    "device": devices,
    "policy": policies,
    "cache": caches,
    "logger": loggers,
    "layout": layouts,
    "kind": kinds,
}

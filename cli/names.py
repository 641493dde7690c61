"""Shell completion: names of models, modes, datasets and so on."""

from collections.abc import Callable


def models() -> list[str]:
    """The short names of models."""
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
    """The scoring protocols."""
    return ["strict", "paper"]


def kinds() -> list[str]:
    """The kinds of things that can be listed."""
    from tensorllm.commands.catalog import KINDS

    return list(KINDS)


def dtypes() -> list[str]:
    """The dtypes of weights."""
    return ["fp32", "bf16", "fp16"]


def devices() -> list[str]:
    """The devices to run on."""
    return ["auto", "cpu", "cuda"]


def policies() -> list[str]:
    """The policies of which layers run in their factors."""
    return ["auto", "always"]


def caches() -> list[str]:
    """What attention may keep of past tokens."""
    return ["auto", "latent", "dense"]


def layouts() -> list[str]:
    """The layouts of heads."""
    return ["paper", "official"]


def loggers() -> list[str]:
    """The loggers that need no package, or only a small one."""
    return ["tensorboard", "csv"]


# By field name.
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

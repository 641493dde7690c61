"""Registers the factored format with transformers when that is imported, without importing it.

`import tensorllm` calls `watch`, so nothing heavy may be imported here.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from tensorllm.progress import silenced

WATCHED = "transformers.quantizers.auto"  # transformers' table of quantisation methods
OURS = "tensorllm.checkpoint.quantizer"


def watch() -> None:
    """Register the factored format with transformers, now or as soon as it is imported."""
    if WATCHED in sys.modules:
        import_module(OURS)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds the watched module through the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Executes a module with its own loader, then registers the factored format."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # Where torchao is installed this imports it, and it logs which GPU libraries it lacks.
        with silenced("torchao", "torch.utils._pytree"):
            self._loader.exec_module(module)
        import_module(OURS)

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for tracebacks
        return getattr(self._loader, name)

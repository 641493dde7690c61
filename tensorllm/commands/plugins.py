"""Modules of the user's own that register compressors, architectures or datasets."""

import importlib
from collections.abc import Sequence

from tensorllm.errors import UserError


def load_plugins(modules: Sequence[str]) -> None:
    """Import the modules; one that cannot be imported, for whatever reason, is refused."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # the plugin's own code may raise anything
            raise UserError(
                f"cannot import the plugin {name!r}: {type(error).__name__}: {error}. It must be "
                "importable: install it, or add its folder to PYTHONPATH"
            ) from None

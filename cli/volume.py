"""Verbosity: `--verbose`, `--quiet`, and the messages of libraries.

It is held as the level of the logger `tensorllm`: DEBUG is verbose, ERROR quiet.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

OURS = logging.getLogger("tensorllm")
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "lightning", "optuna", "matplotlib")


class _StandardError(logging.StreamHandler[Any]):
    """Writes to the current standard error, which while a bar is shown prints above it."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        del value


def is_verbose() -> bool:
    """Whether to print tracebacks and messages of libraries."""
    return OURS.level == logging.DEBUG


def is_quiet() -> bool:
    """Whether to print only results and errors."""
    return OURS.level == logging.ERROR


def normal() -> None:
    """Print results, progress, warnings and errors: the default."""
    OURS.setLevel(logging.WARNING)


def silence_libraries() -> None:
    """Suppress messages of libraries, which would spoil the output.

    Call this before anything imports them.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_LOGS", "-all")  # means "errors only"
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.ERROR, handlers=[_StandardError()]
    )
    warnings.simplefilter("ignore")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _verbose(wanted: bool) -> None:
    if wanted:
        OURS.setLevel(logging.DEBUG)
        warnings.simplefilter("default")
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        for name in LIBRARIES:
            logging.getLogger(name).setLevel(logging.INFO)


def _quiet(wanted: bool) -> None:
    if wanted and not is_verbose():
        OURS.setLevel(logging.ERROR)


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", callback=_verbose, expose_value=False, help="Tracebacks, libraries' notices."
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", callback=_quiet, expose_value=False, help="Only results and errors."),
]


def with_volume(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with `--verbose` and `--quiet` after its own options."""

    @wraps(command)
    def run(*, verbose: bool = False, quiet: bool = False, **options: Any) -> Any:
        del verbose, quiet  # handled by their callbacks
        return command(**options)

    known = inspect.signature(command, eval_str=True).parameters
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("verbose", Verbose), ("quiet", Quiet))
    ]
    run.__signature__ = inspect.Signature([*known.values(), *added])  # type: ignore[attr-defined]
    return run

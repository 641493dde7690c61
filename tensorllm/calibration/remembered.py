"""Modules of a layer that need not run again: what they gave is kept, or known in another way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class Remembered:
    """A module of a layer whose outputs are kept and given again as long as nothing changes them.

    Args:
        path: below the layer; "" for none.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        self.path = path
        self._module = block.get_submodule(path) if path else None
        self._kept: dict[int, Any] = {}

    def forget(self) -> None:
        self._kept.clear()

    def remember(self, number: int, output: Any) -> None:
        """Let this be what the module gives on batch `number`."""
        self._kept[number] = output

    @property
    def holds(self) -> bool:
        """Whether anything is remembered."""
        return bool(self._kept)

    @contextmanager
    def within(self, number: int, usable: bool = True) -> Iterator[None]:
        """While batch `number` runs."""
        module: Any = self._module
        if module is None or not usable:
            yield
        elif number in self._kept:
            kept = self._kept[number]
            module.forward = lambda *args, **kwargs: _copied(kept)
            try:
                yield
            finally:
                del module.forward
        else:
            keep = partial(self.remember, number)
            handle = module.register_forward_hook(lambda module, args, output: keep(output))
            try:
                yield
            finally:
                handle.remove()


Rebuild = Callable[[Tensor], Any]  # what a module returns, from what one inside it gave


def giving_on(returned: Any, given: Tensor | None) -> Rebuild | None:
    """How a module's return value is made of a tensor that a module inside it gave: where it is
    that tensor, or begins with it and holds no other; else None."""
    if returned is given:
        return lambda tensor: tensor
    if isinstance(returned, tuple) and returned and returned[0] is given:
        rest = returned[1:]
        if not any(isinstance(each, Tensor) for each in rest):
            return lambda tensor: (tensor, *rest)
    return None


@contextmanager
def watched(
    block: nn.Module, path: str, inner: str, found: Callable[[Rebuild | None], None]
) -> Iterator[None]:
    """Within it, `found` gets `giving_on` of the modules at both paths whenever the outer ran."""
    given: list[Tensor] = []
    handles = [
        block.get_submodule(inner).register_forward_hook(
            lambda module, args, output: given.append(output)
        ),
        block.get_submodule(path).register_forward_hook(
            lambda module, args, output: found(giving_on(output, given.pop() if given else None))
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(output: Any) -> Any:
    """A layer may write into what its modules gave it."""
    if isinstance(output, tuple):
        return tuple(_copied(each) for each in output)
    return output.clone() if isinstance(output, Tensor) else output

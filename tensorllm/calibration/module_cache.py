"""Cached outputs of a layer's modules, so that these need not run again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class ModuleCache:
    """The outputs of one module of a layer, by batch.

    It must be cleared by whoever changes what they depend on.

    Args:
        block: the layer.
        path: of the module within the layer; "" for none.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        self.path = path
        self._module = block.get_submodule(path) if path else None
        self._outputs: dict[int, Any] = {}

    def clear(self) -> None:
        self._outputs.clear()

    def set(self, number: int, output: Any) -> None:
        """Set the module's output on batch `number`."""
        self._outputs[number] = output

    @property
    def filled(self) -> bool:
        """Whether the output of any batch is cached."""
        return bool(self._outputs)

    @contextmanager
    def active(self, number: int, usable: bool = True) -> Iterator[None]:
        """Within the block, use the module's cached output of batch `number`, or cache it.

        Does nothing if not `usable`.
        """
        module: Any = self._module
        if module is None or not usable:
            yield
        elif number in self._outputs:
            cached = self._outputs[number]
            module.forward = lambda *args, **kwargs: _copied(cached)
            try:
                yield
            finally:
                del module.forward
        else:
            keep = partial(self.set, number)
            handle = module.register_forward_hook(lambda module, args, output: keep(output))
            try:
                yield
            finally:
                handle.remove()


Rebuild = Callable[[Tensor], Any]  # a module's return value, from the output of one inside it


def rebuild_of(returned: Any, given: Tensor | None) -> Rebuild | None:
    """How a module's return value follows from the output of a module inside it.

    Known if it is that tensor, or a tuple that begins with it and holds no other tensor; else None.
    """
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
    """Within the block, pass `rebuild_of` of the two modules to `found` whenever the outer runs."""
    given: list[Tensor] = []
    handles = [
        block.get_submodule(inner).register_forward_hook(
            lambda module, args, output: given.append(output)
        ),
        block.get_submodule(path).register_forward_hook(
            lambda module, args, output: found(rebuild_of(output, given.pop() if given else None))
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(output: Any) -> Any:
    """A copy, as a layer may write into the outputs of its modules."""
    if isinstance(output, tuple):
        return tuple(_copied(each) for each in output)
    return output.clone() if isinstance(output, Tensor) else output

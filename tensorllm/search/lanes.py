"""Several edits of one model in the same forward pass: each row uses the weights of its own edit.

An edit, here a lane, changes a few matrices. A module that holds one of them runs each lane's rows
through that lane's weights; all other modules read all rows at once, and the model's own weights
stay as they are.

Shapes: B rows, T tokens, D width.
"""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorllm.models import RoleMatrices
from tensorllm.search.decompositions import ModelEdit, applied
from tensorllm.search.prefix import patched

ROWWISE = (nn.Linear, Conv1D)  # modules that treat each row of (B, T, D) by itself

Rows = tuple[int, int | None]  # a lane and how many rows are its own; None: all rows


class LaneWeights:
    """The weights that each lane uses in place of the model's.

    Args:
        model: the model that is run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._now = threading.local()  # per thread: batches may run in parallel

    @contextmanager
    def installed(self, changed: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
        """Within the block, lanes use these parameters, by name, in place of the model's."""
        by_module: dict[str, dict[int, dict[str, Tensor]]] = {}
        for lane, parameters in enumerate(changed):
            for name, w in parameters.items():
                path, _, own = name.rpartition(".")
                by_module.setdefault(path, {}).setdefault(lane, {})[own] = w
        with ExitStack() as stack:
            for path, of_lanes in by_module.items():
                module = self.model.get_submodule(path)
                others = {lane: _with(module, own) for lane, own in of_lanes.items()}
                stack.enter_context(patched(module, self._split(module.forward, others)))
            yield

    @contextmanager
    def rows(self, rows: Sequence[Rows]) -> Iterator[None]:
        """Within the block, and in this thread, a pass's rows belong to these lanes, in order."""
        before = getattr(self._now, "rows", None)
        self._now.rows = rows
        try:
            yield
        finally:
            self._now.rows = before

    def _split(self, forward: Any, others: Mapping[int, nn.Module]) -> Any:
        def run(x_BTD: Tensor) -> Tensor:
            rows: Sequence[Rows] = getattr(self._now, "rows", None) or [(-1, None)]
            if len(rows) == 1:
                return self._of(rows[0][0], forward, others)(x_BTD)
            parts = x_BTD.split([count or 0 for _, count in rows])
            read = zip(rows, parts, strict=True)
            return torch.cat([self._of(lane, forward, others)(part) for (lane, _), part in read])

        return run

    def _of(self, lane: int, forward: Any, others: Mapping[int, nn.Module]) -> Any:
        return others[lane].forward if lane in others else forward


def _with(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with other parameters and the class's own `forward`."""
    new = copy.copy(module)
    new.__dict__.pop("forward", None)
    new._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
    return new


def changed_names(edit: ModelEdit, roles: RoleMatrices) -> set[str]:
    """The names of the parameters that an edit changes."""
    matrices = [matrix for site in edit.sites for matrix in site.site.matrices]
    return {*(roles.name(*matrix) for matrix in matrices), *edit.parameters}


def changed_by(
    edit: ModelEdit, roles: RoleMatrices, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters that an edit changes, with their new values; the model stays as it is."""
    with applied(edit, roles, weights):
        return {name: weights[name].detach().clone() for name in changed_names(edit, roles)}


def rowwise(names: Iterable[str], model: nn.Module) -> bool:
    """Whether every module that holds these parameters treats each row by itself."""
    modules = (model.get_submodule(name.rpartition(".")[0]) for name in names)
    return all(isinstance(module, ROWWISE) for module in modules)

"""Where a model stores its matrices, layer by layer: by its row, or by verified structure.

Everything that reads or writes a model's matrices asks `layout_of`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tensorllm.errors import UserError
from tensorllm.models.experts import experts_in
from tensorllm.models.families import (
    Match,
    attention_matches,
    attention_with,
    ffn_matches,
    ffn_with,
    geometry_of,
)
from tensorllm.models.mixture import Mixture, mixture_of, with_mixture
from tensorllm.models.skeleton import Keyed, Skeleton, linears, skeleton
from tensorllm.models.spec import ARCHITECTURES, Architecture, ModelSpec, Stored, Task
from tensorllm.models.task import hidden_size, task_of
from tensorllm.models.verdicts import HOW, Candidates, Verdicts, signature, verified
from tensorllm.tensors.stacking import Geometry


@dataclass(frozen=True)
class LayerLayout:
    """One layer.

    Attributes:
        path: of its module in the model.
        stored: its role matrices, with paths below that.
        geometry: its sizes.
        families: of its attention and its FFN, as far as it has them.
        lacks: reasons why attention or FFN roles that might be expected are missing.
        mixture: of experts, in place of an FFN.
    """

    path: str
    stored: tuple[Stored, ...]
    geometry: Geometry
    families: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Layout:
    """All layers of a model.

    Attributes:
        layers: from first to last.
        task: whether the model predicts the next token or a masked one.
        by: `row`: from the table of architectures, tested by the project; or `structure`: found in
            the module tree and verified on a tiny model.
        shapes: of all parameters, by name.
    """

    layers: tuple[LayerLayout, ...]
    task: Task
    by: str
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @functools.cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec(tuple(layer.geometry for layer in self.layers))

    @property
    def families(self) -> tuple[str, ...]:
        """The families of all layers, without duplicates."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.families))

    @property
    def lacks(self) -> tuple[str, ...]:
        """Why layers lack roles, without duplicates."""
        return tuple(dict.fromkeys(why for layer in self.layers for why in layer.lacks))

    @property
    def plain(self) -> bool:
        """Whether layers are known to pass on nothing but hidden states.

        And to process the outputs of their matrices position by position. True for rows; a model
        found by structure may share anything else between layers (keys, convolutions, several
        streams).
        """
        return self.by == "row"

    def describe(self) -> str:
        """One line for reports on what was found by structure; empty if the model has a row."""
        if self.by == "row":
            return ""
        missing = f"; not read: {'; '.join(self.lacks)}" if self.lacks else ""
        return f"{' + '.join(self.families)}, found by structure, verified on a tiny model{missing}"


def layout_of(config: Any, row: Architecture | None = None) -> Layout:
    """The layout of a config's model; cached for equal configs.

    Args:
        row: used instead of the registered one.

    Raises:
        UserError: the model has no row and its structure matches no known family, or its row is
            wrong.
    """
    if row is not None:
        return _made(Keyed(config), row)
    known = config.model_type in ARCHITECTURES
    row = ARCHITECTURES[config.model_type] if known else None
    return _made(Keyed(config), row)


@functools.lru_cache(maxsize=16)
def _made(key: Keyed, row: Architecture | None) -> Layout:
    config = key.config
    whole = skeleton(config)
    if row is None:
        found = verified(whole, config, _by_structure)
        return _decided(whole, config, found, _by_structure, "structure", task_of(config))
    _check_block(row, whole, config)
    propose = functools.partial(_by_row, row)
    verdicts = None if row.tested else verified(whole, config, propose)
    return _decided(whole, config, verdicts, propose, "row", row.task)


def _by_structure(block: nn.Module, config: Any) -> tuple[list[Match], list[Match]]:
    ffn = [] if experts_in(block, hidden_size(config)) else ffn_matches(block)
    return attention_matches(block, config), ffn


def _by_row(row: Architecture, block: nn.Module, config: Any) -> tuple[list[Match], list[Match]]:
    there = linears(block)

    def has(stored: Sequence[Stored]) -> bool:
        return bool(stored) and all(one.path in there for one in stored)

    attention = attention_with("row", row.attention, block, config) if has(row.attention) else []
    mixed = experts_in(block, hidden_size(config)) is not None
    ffn = ffn_with("row", row.ffn, block) if has(row.ffn) and not mixed else []
    for stored, found in ((row.attention, attention), (row.ffn, ffn)):
        if has(stored) and not found and not (mixed and stored is row.ffn):
            sizes = {one.path: tuple(_weight(there[one.path]).shape) for one in stored}
            raise UserError(
                f"sizes of a {config.model_type!r} layer do not fit one another: {sizes}. The "
                "query heads must be a multiple of the KV heads, and inner widths be equal"
            )
    return attention, ffn


def _weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    return weight


def _check_block(row: Architecture, whole: Skeleton, config: Any) -> None:
    if not f".{whole.path}.{{i}}".endswith(f".{row.block}"):
        raise UserError(
            f"the row of {config.model_type!r} says that layers are at {row.block}, but they are "
            f"at {whole.path}.{{i}}"
        )


def _decided(
    whole: Skeleton,
    config: Any,
    verdicts: Verdicts | None,
    propose: Candidates,
    by: str,
    task: Task,
) -> Layout:
    layers = []
    width = whole.model.get_input_embeddings().weight.shape[1]
    for number, block in enumerate(whole.blocks):
        attention, ffn = propose(block, config)
        lacks: list[str] = []
        mixture = _mixture(block, config, verdicts, lacks)
        parts = (("attention", attention), ("ffn", ffn))[: 1 if mixture else 2]
        chosen = [_chosen(part, found, verdicts, lacks) for part, found in parts]
        one, other = (*chosen, None)[:2]
        model_width = dict(one.shapes)["o"][1] if one else width
        geometry = geometry_of(one, other, model_width)
        families = tuple(match.family for match in chosen if match)
        layers.append(
            LayerLayout(
                whole.block_path(number),
                (one.stored if one else ())
                + (other.stored if other else ())
                + (mixture.stored if mixture else ()),
                with_mixture(geometry, mixture) if mixture else geometry,
                (*families, "mixture of experts") if mixture else families,
                tuple(lacks),
                mixture,
            )
        )
    wrong = [why for layer in layers for why in layer.lacks if verdicts and ": " in why]
    if by == "row" and wrong:
        raise UserError(f"the row of {config.model_type!r} is wrong: {wrong[0]}")
    if not any(layer.stored for layer in layers):
        _refuse(whole, config, layers)
    return Layout(tuple(layers), task, by, whole.shapes)


def _mixture(
    block: nn.Module, config: Any, verdicts: Verdicts | None, lacks: list[str]
) -> Mixture | None:
    found = mixture_of(block, hidden_size(config))
    if found is None or verdicts is None:
        return found
    why = verdicts.mixture.get(found.kind, "their kind was not tried")
    if why:
        lacks.append(f"experts: {why}")
        return None
    return found


def _chosen(
    part: str, matches: Sequence[Match], verdicts: Verdicts | None, lacks: list[str]
) -> Match | None:
    if not matches:
        lacks.append(f"no known {part}")
        return None
    if verdicts is None:
        return matches[0]
    verdict = getattr(verdicts, part).get(signature(matches), "its kind was not tried")
    if isinstance(verdict, str):
        lacks.append(f"{part}: {verdict}")
        return None
    return next((match for match in matches if match.key == verdict), None)


def _refuse(whole: Skeleton, config: Any, layers: Sequence[LayerLayout]) -> None:
    there = sorted({path for block in whole.blocks for path in linears(block)})
    why = "; ".join(dict.fromkeys(reason for layer in layers for reason in layer.lacks))
    raise UserError(
        f"a {config.model_type!r} model is of no family that is known ({why}). Its layers "
        f"{whole.path}.* hold {', '.join(there[:12]) or 'no linear modules'}. {HOW}"
    )

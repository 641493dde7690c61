"""Test on a tiny model how layers of the same structure really store their matrices."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tensorllm.errors import UserError, first_line
from tensorllm.models.families import Match
from tensorllm.models.mixture import Mixture, mixture_of
from tensorllm.models.shrink import shrunk
from tensorllm.models.skeleton import Skeleton, instance, layers_path, linears
from tensorllm.models.task import hidden_size
from tensorllm.models.verify import TOKENS, Mismatch, Probe, check_attention, check_ffn, randomise
from tensorllm.models.verify_experts import check_files, check_mixture, randomise_experts
from tensorllm.tensors.threads import one_thread

HOW = "To say where its matrices are, register one row: docs/add_an_architecture.md"
TINY_PARAMETERS = 2**24  # most parameters of a model made only for testing
Candidates = Callable[[nn.Module, Any], tuple[list[Match], list[Match]]]  # of a layer and config


@dataclass
class Verdicts:
    """The verdicts of a tiny model on the candidates of each signature.

    Attributes:
        attention, ffn: by signature, the key of the match that holds, or the reason why none does.
        mixture: by kind of mixture, why it does not hold; empty if it does.
    """

    attention: dict[tuple[str, ...], tuple[str, ...] | str] = field(default_factory=dict)
    ffn: dict[tuple[str, ...], tuple[str, ...] | str] = field(default_factory=dict)
    mixture: dict[tuple[object, ...], str] = field(default_factory=dict)


def signature(matches: Sequence[Match]) -> tuple[str, ...]:
    """The candidates' paths: layers with equal paths are of one kind."""
    return tuple(sorted({one.path for match in matches for one in match.stored}))


def verified(whole: Skeleton, config: Any, propose: Candidates) -> Verdicts:
    """Try the candidates of every kind of layer on a tiny model of the same structure."""
    kinds: dict[tuple[Any, ...], int] = {}
    for number, block in enumerate(whole.blocks):
        mixture = mixture_of(block, hidden_size(config))
        own = (mixture and mixture.kind, *map(signature, propose(block, config)))
        kinds.setdefault(own, number)
    tiny = _tiny(config, max(2, 1 + max(kinds.values())))
    try:
        # The caller may be building a model on the meta device, and its random state must
        # not change. Threads only slow tiny products down.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(0)
            model = instance(tiny, "cpu", text_only=True)
            blocks = list(model.get_submodule(layers_path(model, tiny)))
            return _tried(model, blocks, tiny, propose)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"a {config.model_type!r} model has no row, and what its structure suggests could not "
            f"be verified on a tiny model: {type(error).__name__}: {first_line(error)}. {HOW}"
        ) from error


def _tiny(config: Any, layers: int) -> Any:
    """A tiny config of the same structure, for a model small enough to build."""
    try:
        tiny = shrunk(config, layers)
    except Exception as error:  # a config class checks what it is given in ways of its own
        raise UserError(
            f"no tiny {config.model_type!r} config can be made to verify its structure on: "
            f"{first_line(error)}. {HOW}"
        ) from None
    sizes = {
        name: p.numel() for name, p in instance(tiny, "meta", text_only=True).named_parameters()
    }
    if sum(sizes.values()) > TINY_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"no tiny {config.model_type!r} model can be made to verify its structure on: "
            f"{largest} stays at {sizes[largest]} numbers. {HOW}"
        )
    return tiny


def _tried(model: Any, blocks: list[Any], tiny: Any, propose: Candidates) -> Verdicts:
    """`verified`, on a tiny model with these layers."""
    call = functools.partial(_call, model)
    _check_order(call, blocks, tiny)
    verdicts = Verdicts()
    path = layers_path(model, tiny)
    for number, block in enumerate(blocks):
        modules = linears(block)
        attention, ffn = propose(block, tiny)
        paths = {one.path for match in (*attention, *ffn) for one in match.stored}
        used = {path: module for path, module in modules.items() if path in paths}
        randomise(model, used)
        for found, known, check in (
            (attention, verdicts.attention, functools.partial(check_attention, config=tiny)),
            (ffn, verdicts.ffn, check_ffn),
        ):
            kind = signature(found)
            if found and kind not in known:
                probe = Probe(call, {path: modules[path] for path in kind})
                known[kind] = _first_that_holds(found, functools.partial(check, probe))
        mixture = mixture_of(block, hidden_size(tiny))
        if mixture is not None and mixture.kind not in verdicts.mixture:
            verdicts.mixture[mixture.kind] = _why_not(
                model, f"{path}.{number}", block, mixture, call
            )
    return verdicts


def _why_not(
    model: Any, path: str, block: nn.Module, mixture: Mixture, call: Callable[[], Any]
) -> str:
    """Why a mixture is not what was found; empty if it is."""
    randomise_experts(block, mixture)
    try:
        check_mixture(call, block, mixture)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            stored: dict[str, torch.Tensor] = {}
            for file in Path(folder).glob("*.safetensors"):
                stored |= load_file(file)
        check_files(model, path, mixture.experts, stored)
    except Mismatch as mismatch:
        return str(mismatch)
    return ""


def _first_that_holds(
    matches: Sequence[Match], check: Callable[[Match], None]
) -> tuple[str, ...] | str:
    why = ""
    for match in matches:
        try:
            check(match)
        except Mismatch as mismatch:
            why = why or f"it looks like {match.family!r}, but {mismatch}"
        else:
            return match.key
    return why


def _call(model: Any) -> Any:
    vocabulary = len(model.get_input_embeddings().weight)
    return model(input_ids=torch.tensor([TOKENS]) % vocabulary, use_cache=False)


def _check_order(call: Callable[[], Any], blocks: Sequence[nn.Module], config: Any) -> None:
    """Check that layers run in order and none twice, as everything that edits a layer expects."""
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda m, args, n=n: ran.append(n))
        for n, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    if not ran or ran != sorted(set(ran)):  # some may run only with an image
        raise UserError(
            f"a {config.model_type!r} model runs its layers in the order {ran[:8]}, and not one "
            "after the other"
        )

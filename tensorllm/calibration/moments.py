"""Second moments of what matrices read and of what is felt at their outputs.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X width of an input, Y of an
output, V words.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.calibration.blocks import Blocks
from tensorllm.calibration.groups import Key
from tensorllm.calibration.sequences import Batch
from tensorllm.calibration.watch import Watch
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.progress import Progress, quiet


@dataclass(frozen=True, slots=True)
class Moments:
    """Per layer and cluster of roles, float64.

    Attributes:
        inputs: E[x xᵀ] of what the cluster reads.
        gradients: E[g gᵀ] over the joint outputs of its roles, g the gradient there of what errors
            are priced by.
    """

    inputs: dict[Key, Tensor]
    gradients: dict[Key, Tensor]


def measure_loss(
    model: nn.Module,
    roles: RoleMatrices,
    keys: Sequence[Key],
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    spill: Path | None = None,
    progress: Progress = quiet,
) -> Moments:
    """Prices by the loss: one pass forward and backward through the whole model.

    The gradient is that of the log-probability of labels drawn from the model's own predictions
    (seeded), so its second moment is the Fisher information and no labels are needed.

    Args:
        spill: a folder in which the moments live as files instead of in memory.

    Raises:
        UserError: activations that are not finite; names the module and the batch.
    """
    runner: Any = model
    draws = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    with Watch(model, roles, keys, spill) as watch, _embeddings_need_gradients(model):
        for number, batch in enumerate(batches):
            progress(number, len(batches), "measuring")
            watch.begin(number, batch)
            mask = batch.mask_BT.long().to(device)
            out = runner(input_ids=batch.ids_BT.to(device), attention_mask=mask)
            _sampled_loss(out, batch, draws).backward()
            watch.add_gradients()
        return Moments(*watch.means())


def measure_outputs(
    blocks: Blocks,
    layer: int,
    block: nn.Module,
    keys: Sequence[Key],
    hidden: Iterable[Tensor],
    *,
    seed: int = 0,
) -> Moments:
    """Prices by the layer's own output: forward and backward through this one layer.

    The gradient is that of the product of the layer's output with random vectors (seeded), one per
    token with a size of one over the output's. So an error's price is the squared change of what
    the layer puts out relative to its size, as the norm before the next layer sees it: how Q and K
    meet in the scores, V and O in the sum and the FFN's matrices in each other is all in it.

    Args:
        hidden: states (B, T, D) before the layer, one per batch.

    Raises:
        UserError: activations that are not finite; names the module and the batch.
    """
    draws = torch.Generator().manual_seed(seed + 7919 * layer)
    both = zip(blocks.calls[layer], hidden, strict=True)
    with Watch(blocks.source.model, blocks.source.roles, keys) as watch:
        for number, (call, hidden_BTD) in enumerate(both):
            batch = blocks.batches[number]
            watch.begin(number, batch)
            with torch.enable_grad():
                out_BTD = call.run(block, hidden_BTD.detach().requires_grad_()).float()
            random_BTD = torch.randn(out_BTD.shape, generator=draws).to(out_BTD)
            size_BT1 = out_BTD.detach().norm(dim=-1, keepdim=True).clamp(min=1e-20)
            random_BTD *= batch.mask_BT.to(out_BTD.device)[..., None] / size_BT1
            out_BTD.backward(random_BTD)
            watch.add_gradients()
        return Moments(*watch.means())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters, no dropout; afterwards as it was."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(training)
        for p, value in wanted.items():
            p.requires_grad_(value)


@contextmanager
def _embeddings_need_gradients(model: Any) -> Iterator[None]:
    """Gradients flow from the embeddings' output on."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def _sampled_loss(out: Any, batch: Batch, draws: torch.Generator) -> Tensor:
    """Summed cross entropy of labels that are drawn from the predictions themselves."""
    if getattr(out, "logits", None) is None:
        raise UserError(
            "weighting=loss needs a model with its language-model head, got a base model"
        )
    log_p_NV = batch.tokens(out.logits).float().log_softmax(dim=-1)
    sums_NV = log_p_NV.detach().exp().cumsum(dim=-1)
    heights_N1 = torch.rand(len(sums_NV), 1, generator=draws).to(sums_NV.device) * sums_NV[:, -1:]
    drawn_N = torch.searchsorted(sums_NV, heights_N1).flatten().clamp(max=sums_NV.shape[1] - 1)
    return nn.functional.nll_loss(log_p_NV, drawn_N, reduction="sum")
